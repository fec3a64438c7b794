"""Which form runs: the fastest that answers as proven, and none that is known to lose time."""

import hashlib
import platform
from pathlib import Path

import numpy as np
import pytest

from export.parity import measure
from export.write_bundle import encode_golden, write_bundle
from runtime.bundle import Bundle
from runtime.choose import choose_engine, slower
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.manifest import FORMAT, Adaptation, Artifact, FileEntry, Form, Manifest
from runtime.preprocess import InputSpec
from tests.test_engines import CHANNELS, tiny_model

SIZE = (24, 16)
HERE = platform.machine()


def bundle(folder: Path, *, speed: float | None, machine: str | None) -> Bundle:
    """One tiny graph under the names of two forms, ``int8-cpu`` of a speed that was measured."""
    model = tiny_model(size=SIZE).SerializeToString()
    images = np.random.default_rng(1).integers(0, 256, (3, *SIZE, CHANNELS), dtype=np.uint8)
    with OnnxRuntimeEngine(model, form="fp32", threads=1) as engine:
        logits = engine.infer(images).logits
    quality = measure(logits, logits, np.array([0, 1, 2]), seed=0)
    forms: dict[Form, tuple[float | None, str | None]] = {
        "fp32": (1.0, machine), "int8-cpu": (speed, machine),
    }  # fmt: skip
    files = {f"{form}.onnx": model for form in forms}
    files["golden.npz"] = encode_golden(images, dict.fromkeys(forms, logits))
    manifest = Manifest(
        format=FORMAT, name="tiny", version="1", labels=("a", "b", "c", "d"),
        input=InputSpec(size=SIZE, channels=CHANNELS),
        adaptation=Adaptation(rung="as is", verified=True, reason="so", labels_used=0),
        artifacts=tuple(
            Artifact(form=form, file=f"{form}.onnx", quality=quality, relative_speed=relative,
                     speed_machine=where)
            for form, (relative, where) in forms.items()
        ),
        files=tuple(
            FileEntry(name=name, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
            for name, data in files.items()
        ),
        golden="golden.npz", recipe_sha256="0" * 64, checkpoint_sha256="1" * 64,
    )  # fmt: skip
    write_bundle(folder / "bundle", folder / "tiny.zip", manifest, files)
    return Bundle.open(folder / "bundle")


@pytest.mark.parametrize(
    ("speed", "machine", "expected"),
    [
        (2.1, HERE, "int8-cpu"),
        (1.0, HERE, "int8-cpu"),
        (0.82, HERE, "fp32"),
        (0.82, "another", "int8-cpu"),
        (0.82, None, "int8-cpu"),
        (None, None, "int8-cpu"),
    ],
)
def test_a_form_that_was_slower_on_such_a_processor_is_not_chosen(
    tmp_path: Path, speed: float | None, machine: str | None, expected: str
) -> None:
    choice = choose_engine(bundle(tmp_path, speed=speed, machine=machine), threads=1)
    assert choice.engine.form == expected
    assert choice.steps[-1].accepted


def test_the_reason_has_the_speed_and_asking_for_the_form_overrules_it(tmp_path: Path) -> None:
    slow = bundle(tmp_path, speed=0.82, machine=HERE)
    passed_over = choose_engine(slow, threads=1).steps[0]
    assert str(passed_over) == (
        "onnxruntime CPU, int8-cpu: passed over: slower than fp32 where it was made (0.82x on "
        f"{HERE}); asking for this form runs it all the same"
    )
    assert choose_engine(slow, form="int8-cpu", threads=1).engine.form == "int8-cpu"


def test_speed_says_nothing_about_what_was_not_measured(tmp_path: Path) -> None:
    assert slower(None, HERE) == ""
    artifact = bundle(tmp_path, speed=0.5, machine=HERE).manifest.artifact("int8-cpu")
    assert artifact is not None
    assert "0.50x" in slower(artifact, HERE)
    assert slower(artifact, "riscv64") == ""
