"""Does drift stay quiet while nothing changes, and is it raised when something does?

A bundle's own held-out field images are dealt out at random, again and again, into a reference and
a window: nothing drifts, by construction. Then the window's images get worse, or of another
product. The two-sample tests are `runtime.monitoring`'s, as a device runs them.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.harness import Options, Report, Spread, Table, interleave, ratio
from export.reference import fit_projection
from runtime import metrics
from runtime.bundle import Bundle
from runtime.dataset import Dataset, Split, read_dataset
from runtime.engines.engine import Outputs
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import DataError
from runtime.monitoring.drift import WINDOW, Drift, DriftReport
from runtime.monitoring.image_quality import Flag, Limits, Watch, limits_of, look
from runtime.monitoring.image_quality import measure as measured
from runtime.monitoring.kolmogorov_smirnov import p_value, steps_apart
from runtime.monitoring.reference import Projection, Reference
from runtime.preprocess import preprocess_batch
from train.degradations import DEGRADATIONS, SEVERITIES, degrade

LONG = True

CLEAN, QUICK_CLEAN = 1000, 30
PLANTED, QUICK_PLANTED = 20, 3
RATES = (0.05, 0.01, 0.001)
STATED = 0.001
SHARES = (0.1, 0.25, 0.5, 1.0)
FIT = 256
BATCH = 16

UInt8 = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Planted = dict[str, dict[str, dict[str, float]]]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Field(NamedTuple):
    """The images of a bundle's field, and how its forms answer them."""

    labels: tuple[str, ...]
    temperature: float
    projection: Projection
    limits: dict[str, Limits]
    held_out: UInt8
    """Validation and test images."""
    test: UInt8
    other: UInt8
    """Images of the source domain: another product."""
    answers: dict[str, Outputs]
    """To ``held_out``, by form."""
    form: str
    """The one that a CPU runs."""
    ask: Callable[[UInt8], Outputs]
    """What it answers."""


def measure(options: Options) -> Report:
    """Clean windows, planted faults, single frames."""
    bundle = Bundle.open(options.bundle)
    dataset = read_dataset(options.bundle.parent / "train" / "images.json")
    form = "int8-cpu" if bundle.manifest.artifact("int8-cpu") else "fp32"
    with OnnxRuntimeEngine(bundle.model(form), form=form, threads=1) as engine:
        field = _field(bundle, dataset, form, engine)
        clean = {f: _clean(field, f, options) for f in field.answers}
        planted = _planted(field, options)
        another = _another_product(field, options)
        cost = interleave(
            {
                "look": lambda: look(field.held_out[0], field.held_out[1], field.limits),
                "infer": lambda: engine.infer(field.held_out[:1]),
            },
            seconds=1.0 if options.quick else 5.0,
        )
    single = _single_frames(field)
    one_reference = _one_reference(len(field.held_out), options)
    share = ratio(cost["look"].cpu, cost["infer"].cpu)
    return Report(
        title="Drift and image quality",
        tables=(
            _clean_table(clean, one_reference, len(field.held_out)),
            _planted_table(planted, "Windows that drifted", "drift"),
            _planted_table(planted, "Frames on which image quality alarms", "alarmed"),
            _another_table(another),
            _frames_table(single, share),
        ),
        figures={
            "images": len(field.held_out),
            "window": WINDOW,
            "clean": {f: _counts(reports) for f, reports in clean.items()},
            "one reference": one_reference,
            "planted": planted,
            "another product": another,
            "single frames": single,
            "look over inference, CPU time": share,
        },
    )


def _field(bundle: Bundle, dataset: Dataset, form: str, engine: OnnxRuntimeEngine) -> Field:
    manifest = bundle.manifest
    train, validation, test, other = (
        preprocess_batch([example.path for example in chosen], manifest.input)
        for chosen in (
            *(dataset.select(dataset.field, split) for split in SPLITS),
            dataset.select("source", "test") if dataset.field == "target" else (),
        )
    )
    held_out = np.concatenate([validation, test])
    if len(held_out) < 2 * WINDOW:
        raise DataError(
            f"{bundle.path}: expected {2 * WINDOW} held-out images beside it, got {len(held_out)}"
        )
    with OnnxRuntimeEngine(bundle.model("fp32"), form="fp32", threads=1) as exact:
        spaced = np.ascontiguousarray(train[:: -(-len(train) // FIT)])
        projection = fit_projection(_ask(exact, spaced).features)
        answers = {"fp32": _ask(exact, held_out)}
    answers[form] = _ask(engine, held_out)
    return Field(
        manifest.labels, manifest.temperature, projection,
        limits_of(np.stack([measured(image) for image in (*train, *validation)])),
        held_out, test, other, answers, form, lambda images: _ask(engine, images),
    )  # fmt: skip


def _ask(engine: OnnxRuntimeEngine, images: UInt8) -> Outputs:
    parts = [engine.infer(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return Outputs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _reference(field: Field, rows: Ints) -> Reference:
    """Of these held-out images, by the fp32 form, as export makes it."""
    logits, features = field.answers["fp32"]
    return Reference(
        field.labels,
        metrics.softmax(logits[rows], temperature=field.temperature).astype(np.float32),
        field.projection, field.projection(features[rows]), field.limits,
    )  # fmt: skip


def _window(field: Field, reference: Reference, outputs: Outputs) -> DriftReport:
    """The report on one window of ``outputs``."""
    drift = Drift(reference, window=len(outputs.logits), alpha=STATED)
    probabilities = metrics.softmax(outputs.logits, temperature=field.temperature)
    reports = [drift.observe(*pair) for pair in zip(probabilities, outputs.features, strict=True)]
    report = reports[-1]
    assert report is not None
    return report


def _clean(field: Field, form: str, options: Options) -> list[DriftReport]:
    """Windows of ``form`` against references of the other held-out images, dealt anew each time."""
    random = np.random.default_rng(0)
    reports = []
    for _ in tqdm(range(QUICK_CLEAN if options.quick else CLEAN), desc=form, disable=None):
        order = random.permutation(len(field.held_out))
        window = Outputs(*(values[order[:WINDOW]] for values in field.answers[form]))
        reports.append(_window(field, _reference(field, order[WINDOW:]), window))
    return reports


def _counts(reports: Sequence[DriftReport]) -> dict[str, object]:
    """How many of the windows would be called drifted at each rate that could be asked for."""
    tests = round(reports[0].alpha / reports[0].threshold)
    smallest = [report.tests[0].p_value for report in reports]
    raised = {f"{rate:g}": sum(p < rate / tests for p in smallest) for rate in RATES}
    return {"windows": len(reports), "tests": tests, "raised at": raised}


def _one_reference(samples: int, options: Options) -> dict[str, float]:
    """How the rate varies from one reference to another, when one is kept and windows come and go.

    The test does not know what the values are: uniform numbers say it for all.
    """
    random = np.random.default_rng(0)
    limit = 1
    while p_value(limit, samples, WINDOW) >= STATED:
        limit += WINDOW
    windows = np.sort(random.random((20 if options.quick else 400, WINDOW)), axis=1)
    rates = []
    for _ in range(20 if options.quick else 300):
        reference = np.sort(random.random(samples))
        rates.append(np.mean([steps_apart(reference, window) >= limit for window in windows]))
    spread = {"mean": np.mean(rates), "p90": np.quantile(rates, 0.9), "largest": max(rates)}
    return {name: float(value) for name, value in spread.items()}


def _planted(field: Field, options: Options) -> Planted:
    """Shares of windows and of frames, by fault and severity."""
    found: Planted = {}
    severities = SEVERITIES[-1:] if options.quick else SEVERITIES
    cases = [(name, severity) for name in DEGRADATIONS for severity in severities]
    test = torch.from_numpy(field.test)
    for name, severity in tqdm(cases, desc="faults", disable=None):
        worse = degrade(test, name, severity, list(range(len(test)))).numpy()
        found.setdefault(name, {})[str(severity)] = _noticed(field, worse, 1.0, options)
    return found


def _another_product(field: Field, options: Options) -> dict[str, dict[str, float]]:
    """By its share of the window."""
    shares = SHARES if len(field.other) else ()
    return {f"{share:.0%}": _noticed(field, field.other, share, options) for share in shares}


def _noticed(field: Field, images: UInt8, share: float, options: Options) -> dict[str, float]:
    """``share`` of a window is of ``images``, the rest of what is not in the reference."""
    random = np.random.default_rng(1)
    clean, other = field.answers[field.form], field.ask(images)
    drifted = []
    for _ in range(QUICK_PLANTED if options.quick else PLANTED):
        order = random.permutation(len(field.held_out))
        changed = random.permutation(len(images))[: round(share * WINDOW)]
        kept = order[: WINDOW - len(changed)]
        window = Outputs(
            *(
                np.concatenate([new[changed], old[kept]])
                for new, old in zip(other, clean, strict=True)
            )
        )
        drifted.append(_window(field, _reference(field, order[WINDOW:]), window).drifted)
    flags = [look(image, None, field.limits) for image in images]
    alarms = [any(flag.alarms for flag in found) for found in flags]
    return {
        "drift": float(np.mean(drifted)),
        "flagged": float(np.mean([bool(found) for found in flags])),
        "alarmed": float(np.mean(alarms)),
    }


def _single_frames(field: Field) -> dict[str, dict[str, float]]:
    """Faults that a frame has or has not: share of the test images on which each is noticed."""
    found = {}
    for name, spoil in SPOILT.items():
        flags = [look(spoil(image), None, field.limits) for image in field.test]
        found[name] = {
            "flagged": float(np.mean([bool(flag) for flag in flags])),
            "alarmed": float(np.mean([any(f.alarms for f in flag) for flag in flags])),
        }
    repeated = [_repeated(field, image) for image in field.test]
    found["the same frame again, 3 times"] = {
        "flagged": float(np.mean([bool(flags) for flags in repeated])),
        "alarmed": float(np.mean([any(f.word == "frozen" and f.alarms for f in flags)
                                  for flags in repeated])),
    }  # fmt: skip
    moving = Watch(field.limits)
    words = [flag.word for image in field.test for flag in moving.look("camera", image)]
    found["other frames, called frozen"] = {
        "flagged": words.count("frozen") / len(field.test), "alarmed": 0.0,
    }  # fmt: skip
    return found


def _repeated(field: Field, image: UInt8) -> tuple[Flag, ...]:
    watch = Watch(field.limits)
    return [watch.look("camera", image) for _ in range(4)][-1]


def _black(image: UInt8) -> UInt8:
    noise = np.random.default_rng(0).integers(0, 3, image.shape)
    return noise.astype(np.uint8)


def _lower_half(level: int) -> Callable[[UInt8], UInt8]:
    def spoil(image: UInt8) -> UInt8:
        image = image.copy()
        image[len(image) // 2 :] = level
        return image

    return spoil


def _rows_lost(image: UInt8) -> UInt8:
    image = image.copy()
    image[80:88] = 128
    return image


def _white(image: UInt8) -> UInt8:
    return np.full_like(image, 255)


def _jpeg(lost: int) -> Callable[[UInt8], UInt8]:
    """As a JPEG file of which ``lost`` bytes in the middle are zeros; decoders take it."""

    def spoil(image: UInt8) -> UInt8:
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze()).save(buffer, "JPEG", quality=90)
        data = bytearray(buffer.getvalue())
        data[len(data) // 2 : len(data) // 2 + lost] = bytes(lost)
        return np.asarray(Image.open(io.BytesIO(data))).reshape(image.shape)

    return spoil


SPOILT: dict[str, Callable[[UInt8], UInt8]] = {
    "nothing": np.asarray,
    "black, with noise of 0 to 2 levels": _black,
    "white": _white,
    "lower half black": _lower_half(0),
    "lower half gray": _lower_half(128),
    "8 rows gray": _rows_lost,
    "JPEG, quality 90": _jpeg(0),
    "JPEG, 400 bytes of it zeroed": _jpeg(400),
}


def _clean_table(
    clean: Mapping[str, list[DriftReport]], rates: Mapping[str, float], images: int
) -> Table:
    counts = {form: _counts(reports) for form, reports in clean.items()}
    rows = []
    for form, count in counts.items():
        raised = count["raised at"]
        assert isinstance(raised, dict)
        rows.append((form, str(count["windows"]), *(str(raised[f"{rate:g}"]) for rate in RATES)))
    return Table(
        title="Windows in which nothing had changed",
        columns=("form that answers", "windows", *(f"raised at {rate:g}" for rate in RATES)),
        rows=tuple(rows),
        notes=(
            f"{WINDOW} of {images} held-out images against the others, dealt anew for each "
            "window; the reference is the fp32 form's. A rate of 0.01 allows 10 of 1,000.",
            "A device keeps one reference. From one to another the rate of a single test asked to "
            f"be {STATED:g} is {rates['mean']:.4f} on average, at most {rates['p90']:.4f} for nine "
            f"of ten references, {rates['largest']:.4f} for the worst of 300 (uniform numbers; the "
            "test does not depend on the distribution).",
        ),
    )  # fmt: skip


def _planted_table(planted: Planted, title: str, what: str) -> Table:
    columns = [str(severity) for severity in SEVERITIES]
    rows = [
        (name, *(f"{cases[column][what]:.0%}" if column in cases else "" for column in columns))
        for name, cases in planted.items()
    ]
    return Table(title=title, columns=("fault", *columns), rows=tuple(rows), notes=NOTES[what])


def _another_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    return Table(
        title="Windows that drifted when another product came",
        columns=("its share of the window", "drifted"),
        rows=tuple((share, f"{case['drift']:.0%}") for share, case in found.items()),
        notes=("Images of the source domain: the solar bundle's are monocrystalline cells.",),
    )


NOTES = {
    "drift": (
        f"Of windows of {WINDOW} answers, at a stated rate of {STATED:g}, by severity "
        "(docs/degradations.md).",
    ),
    "alarmed": ("The same images one by one, against limits learned at export.",),
}


def _frames_table(found: Mapping[str, Mapping[str, float]], cost: Spread) -> Table:
    return Table(
        title="Single frames: share of the test images",
        columns=("what was done to it", "noticed", "alarms"),
        rows=tuple(
            (name, f"{case['flagged']:.1%}", f"{case['alarmed']:.1%}")
            for name, case in found.items()
        ),
        notes=(f"Looking at a frame costs {cost} of what the model's answer to it costs.",),
    )
