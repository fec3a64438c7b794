"""INT8 against FP32 on onnxruntime's CPU provider, and where a call of the classifier spends time.

One thread, so that the figures say something about a device whose other cores have other work.
"""

import functools
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Options, Report, Table, Times, interleave, ratio, spread
from runtime import Bundle, Classifier
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import BundleError

UInt8 = npt.NDArray[np.uint8]

FORMS = ("fp32", "int8-cpu")
BATCHES = (1, 16)
SETTLE = 2
"""Calls until the caches hold this model again and not the other one."""


def measure(options: Options) -> Report:
    """Time the bundle of ``options``.

    Raises BundleError if there is none, or it lacks a form.
    """
    if not options.bundle.exists():
        raise BundleError(f"{options.bundle}: no bundle there; run make train export first")
    bundle = Bundle.open(options.bundle)
    seconds = 1.0 if options.quick else 15.0
    forms, timings = _forms(bundle, seconds)
    stages, stage_ms = _stages(options.bundle, seconds / 3)
    return Report(
        title=f"Inference of {bundle.manifest.name} {bundle.manifest.version}",
        tables=(forms, stages),
        figures={"forms": timings, "stages_ms": stage_ms},
    )


def _forms(bundle: Bundle, seconds: float) -> tuple[Table, list[object]]:
    engines = [OnnxRuntimeEngine(bundle.model(form), form=form, threads=1) for form in FORMS]
    golden: UInt8 = bundle.golden()["images"]
    rows, figures = [], list[object]()
    for batch in BATCHES:
        images = np.resize(golden, (batch, *golden.shape[1:]))
        calls = {engine.form: functools.partial(engine.infer, images) for engine in engines}
        again = interleave(calls, seconds=seconds, settle=SETTLE, calls=6)
        alternating = interleave(calls, seconds=seconds / 2)
        for form in FORMS:
            figure = {
                "speed_again": ratio(again[FORMS[0]].cpu, again[form].cpu),
                "speed_again_wall": ratio(again[FORMS[0]].wall, again[form].wall),
                "speed_alternating": ratio(alternating[FORMS[0]].cpu, alternating[form].cpu),
                "cpu_ms": spread(again[form].cpu, scale=1e3),
            }
            rows.append((f"{form}, batch {batch}", *map(str, figure.values())))
            rounds = len(again[form].cpu), len(alternating[form].cpu)
            figures.append({"form": form, "batch": batch, "rounds": rounds, **figure})
    height, width, channels = bundle.manifest.input.shape
    table = Table(
        title=f"Speed relative to {FORMS[0]}, {height} x {width} x {channels}, one thread",
        columns=(
            "form", "again and again", "the same by wall time", "alternating call by call",
            "CPU ms again and again",
        ),
        rows=tuple(rows),
        notes=(
            "Median (10th to 90th percentile) of round-by-round ratios; higher is faster. "
            "*Again and again* is a device that runs one model: the first calls of a turn are "
            "not counted. *Alternating* is a device on which something else empties the caches "
            "before every call.",
        ),
    )  # fmt: skip
    return table, figures


def _stages(path: Path, seconds: float) -> tuple[Table, object]:
    with Classifier.open(path, threads=1) as classifier:
        images, what = _encoded(path, classifier.bundle)
        stages: dict[str, list[float]] = {"preprocess": [], "infer": []}

        def classify() -> None:
            for image in images:
                for stage, milliseconds in classifier(image).milliseconds.items():
                    stages[stage].append(milliseconds)

        times: Times = interleave({"all": classify}, seconds=seconds, warmup=1)["all"]
        engine = str(classifier.engine)
    known = {stage: spread(values) for stage, values in stages.items()}
    known["whole call"] = spread(times.wall, scale=1e3 / len(images))
    table = Table(
        title=f"Where `classifier(image)` spends its time: {what}, {engine}, one thread",
        columns=("stage", "wall ms"),
        rows=tuple((stage, str(value)) for stage, value in known.items()),
        notes=("Preprocessing decodes and resizes; the rest of the call is softmax and answer.",),
    )
    return table, known


def _encoded(path: Path, bundle: Bundle) -> tuple[list[bytes], str]:
    """Encoded images as a camera or a folder would give them."""
    samples = sorted((path.parent / "samples").glob("*.png"))
    if samples:
        return [sample.read_bytes() for sample in samples], "the samples beside the bundle"
    from PIL import Image

    encoded = []
    for pixels in bundle.golden()["images"]:
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded, "the golden samples as PNG"
