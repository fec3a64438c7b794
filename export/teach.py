"""Between a quantized graph and the training that teaches a network to be rounded like it.

It reads from the graph how each layer's input is rounded. It does not know how training works
(train/quantization_aware), nor whether the result is any good: that is the gate's to say.
"""

import hashlib

import numpy as np
import onnx
from onnx import numpy_helper

from calibration.quantize import Emitted
from runtime.dataset import Dataset
from runtime.recipe import Recipe
from train import console
from train.device import choose_device
from train.model import ImageClassifier
from train.pipeline import CACHE
from train.pixels import load_pixels
from train.quantization_aware import Layer, LayerQuantization, Plan, quantize_aware
from train.watch import Watched


def teach(
    model: ImageClassifier, emitted: Emitted, dataset: Dataset, recipe: Recipe
) -> ImageClassifier | None:
    """A copy of ``model`` whose weights bear to be rounded as in ``emitted``.

    It learns from training images of the field, and of the source where there are any, without
    their labels. None if no epoch came nearer to the float network's answers. An interrupted
    training goes on where it was.
    """
    folder = recipe.build / "calibration-taught"
    folder.mkdir(parents=True, exist_ok=True)
    examples = [e for e in dataset.examples if e.split == "train"]
    of_field = np.array([e.domain == dataset.field for e in examples])
    plan = plan_of(model, emitted)
    digest = hashlib.sha256(emitted.model.SerializeToString(deterministic=True)).hexdigest()
    state = folder / f"resume-{digest[:16]}.safetensors"
    with Watched("quantization-aware", "SQNR in dB", folder / "log") as watch:
        taught, history = quantize_aware(
            model, plan, pixels=load_pixels(examples, recipe.input, CACHE),
            field=np.flatnonzero(of_field), source=np.flatnonzero(~of_field),
            augment=recipe.train.augment, seed=recipe.seed, state_path=state,
            device=choose_device(), watch=watch,
        )  # fmt: skip
    state.unlink(missing_ok=True)
    if history.kept_epoch == 0:
        console.say(f"quantization-aware: {history.reason}")
        return None
    return taught


def plan_of(model: ImageClassifier, emitted: Emitted) -> Plan:
    """How the inputs of the layers that ``emitted`` quantizes are rounded, by layer.

    What is no convolution or linear layer among the modules of ``model`` (a function's own matrix
    product, a module that computes one itself) is left out: it stays as it is in training.
    """
    modules = {name for name, module in model.named_modules() if isinstance(module, Layer)}
    producers = {t: node for node in emitted.model.graph.node for t in node.output}
    constants = {t.name: t for t in emitted.model.graph.initializer}
    plan = {}
    for node in emitted.model.graph.node:
        if node.name not in emitted.quantized or node.name not in modules:
            continue
        rounding: onnx.NodeProto = producers[node.input[0]]
        scale, zero_point = (numpy_helper.to_array(constants[t]) for t in rounding.input[1:3])
        limits = np.iinfo(zero_point.dtype)
        plan[node.name] = LayerQuantization(
            float(scale.flat[0]), int(zero_point.flat[0]), int(limits.min), int(limits.max)
        )
    return plan
