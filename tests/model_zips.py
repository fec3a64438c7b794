"""Bundles around one tiny real graph: good ones, and each kind of bad one."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.parity import measure
from export.write_bundle import encode_golden, write_bundle
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.manifest import FORMAT, Adaptation, Artifact, FileEntry, Manifest, Minimum
from runtime.preprocess import InputSpec
from tests.test_engines import CHANNELS, tiny_model

SIZE = (24, 16)
LABELS = ("a", "b", "c", "d")
FOREVER = 2**62


class Bad(NamedTuple):
    """A bundle that must not come to answer, and what is said of it."""

    zip: Callable[[Path], Path]
    fault: str
    says: str


def frames(count: int) -> list[np.ndarray]:
    """Pictures of the size that the graph takes, each of another level."""
    return [np.full((*SIZE, CHANNELS), level % 256, np.uint8) for level in range(count)]


def model_zip(
    folder: Path, version: str, *, model: onnx.ModelProto | None = None,
    labels: Sequence[str] = LABELS, minimum: Minimum | None = None, turned: bool = False,
    recorded: bool = False,
) -> Path:  # fmt: skip
    """Write ``tiny-VERSION.zip``. Its golden logits are those of the sound graph.

    ``turned`` turns them round; ``recorded`` takes those of ``model`` itself.
    """
    sound = tiny_model(size=SIZE)
    data = (model or sound).SerializeToString()
    images = np.random.default_rng(1).integers(0, 256, (3, *SIZE, CHANNELS), dtype=np.uint8)
    answers = data if recorded else sound.SerializeToString()
    with OnnxRuntimeEngine(answers, form="fp32", threads=1) as engine:
        logits = engine.infer(images).logits
    golden = encode_golden(images, {"fp32": -logits if turned else logits})
    files = {"fp32.onnx": data, "golden.npz": golden}
    manifest = Manifest(
        format=FORMAT, name="tiny", version=version, labels=tuple(labels),
        input=InputSpec(size=SIZE, channels=CHANNELS),
        adaptation=Adaptation(rung="as is", verified=True, reason="so", labels_used=0),
        artifacts=(
            Artifact(
                form="fp32", file="fp32.onnx",
                quality=measure(logits, logits, np.array([0, 1, 2]), seed=0),
            ),
        ),
        files=tuple(
            FileEntry(name=name, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
            for name, content in files.items()
        ),
        golden="golden.npz", recipe_sha256="0" * 64, checkpoint_sha256="1" * 64,
        required_provider=minimum,
    )  # fmt: skip
    archive = folder / f"tiny-{version}.zip"
    write_bundle(folder / f"tiny-{version}", archive, manifest, files)
    return archive


def looping(count: int) -> onnx.ModelProto:
    """The sound answers, after an even ``count`` of times round a loop that does nothing."""
    model = tiny_model(size=SIZE)
    out = _rename_logits(model)
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["still_on"]),
            helper.make_node("Neg", ["x"], ["turned"]),
        ],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("on", TensorProto.BOOL, []),
            value("x", TensorProto.FLOAT, [None, 4]),
        ],
        [value("still_on", TensorProto.BOOL, []), value("turned", TensorProto.FLOAT, [None, 4])],
    )
    with_constants(model, count=np.array(count, np.int64), yes=np.array(True))
    model.graph.node.append(helper.make_node("Loop", ["count", "yes", "sound"], [out], body=body))
    return model


def crash_that_reads_a_model(folder: Path) -> Path:
    """A PYTHONPATH with which a process that is started opens a model's file, and crashes.

    No graph is known at which onnxruntime does so on every processor: the flaw is made here.
    """
    (folder / "sitecustomize.py").write_text(
        "import ctypes, sys\n"
        "def look(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('fp32.onnx'):\n"
        "        ctypes.string_at(0)\n"
        "sys.addaudithook(look)\n"
    )
    return folder


def overflowing() -> onnx.ModelProto:
    """Its logits are NaN."""
    model = tiny_model(size=SIZE)
    out = _rename_logits(model)
    with_constants(model, nothing=np.array(np.nan, np.float32))
    model.graph.node.append(helper.make_node("Add", ["sound", "nothing"], [out]))
    return model


def _rename_logits(model: onnx.ModelProto) -> str:
    last = model.graph.node[-1]
    out = str(last.output[0])
    last.output[0] = "sound"
    return out


def with_constants(model: onnx.ModelProto, **arrays: np.ndarray) -> None:
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in arrays.items()
    )


CRASHES = "crashes"
"""It takes ``crash_that_reads_a_model`` besides."""

BAD = {
    CRASHES: Bad(lambda f: model_zip(f, "2"), "crashed", "SIGSEGV"),
    "hangs": Bad(
        lambda f: model_zip(f, "2", model=looping(FOREVER)), "no answer in time", "within"
    ),
    "answers NaN": Bad(
        lambda f: model_zip(f, "2", model=overflowing()), "failed self-test", "NaN or overflow"
    ),
    "answers other classes": Bad(
        lambda f: model_zip(f, "2", turned=True), "failed self-test", "golden answers differ"
    ),
    "takes another shape": Bad(
        lambda f: model_zip(f, "2", model=tiny_model(size=(8, 8))), "failed", "[N, 8, 8, 3]"
    ),
    "answers another shape": Bad(
        lambda f: model_zip(f, "2", labels=LABELS[:3]), "wrong shape", "expected 3 logits"
    ),
    "is too slow": Bad(
        lambda f: model_zip(f, "2", model=looping(3_000)),
        "too slow",
        "as the slot that answers now takes",
    ),
    "has its labels in another order": Bad(
        lambda f: model_zip(f, "2", labels=("b", "a", "c", "d")), "wrong labels", "another order"
    ),
    "needs a provider that is missing": Bad(
        lambda f: model_zip(f, "2", minimum="tensorrt"), "no device", "tensorrt is required"
    ),
}
"""By what is wrong with it; each has version 2."""
