"""How costs grow: with image size, batch, calibration images, files of a data set, and devices.

Each size beside the others, in turn, in CPU time; what matters is the growth, not the milliseconds.
"""

import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.harness import Options, Report, Spread, Table, digits, interleave, spread
from runtime.bundle import Bundle
from runtime.dataset import read_dataset
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import BundleError, DataError, FieldfitError
from runtime.recipe import CalibrationSettings, DataSettings, ModelSettings, Recipe

PIXELS = tuple(side * side for side in (96, 128, 192, 256, 384, 512))
"""Of a square image whose sides the network can halve five times."""
BATCHES = 1, 2, 4, 8, 16, 32, 64
CALIBRATION = 64, 128, 256
"""Images; they are chosen from twice as many."""
FILES = 500, 1000, 2000, 4000
DEVICES = 125, 250, 500, 1000
FORM = "int8-cpu"
STRAIGHT = 1.15
"""Exponents up to this pass for a straight line: caches and noise bend it a little."""


class Curve(NamedTuple):
    """What costs how much at which size."""

    what: str
    of: str
    """What a size counts."""
    costs: Mapping[int, Spread]
    """CPU milliseconds by size, ascending."""

    @property
    def exponent(self) -> float:
        """Of the power law that fits best: 1 is proportional."""
        costs = [cost.median for cost in self.costs.values()]
        return float(np.polyfit(np.log(list(self.costs)), np.log(costs), 1)[0])

    @property
    def doubling(self) -> float:
        """Times the cost when the largest size but one doubles."""
        (small, less), (large, more) = list(self.costs.items())[-2:]
        return float((more.median / less.median) ** (np.log(2) / np.log(large / small)))


Costs = Callable[[], object]


def measure(options: Options) -> Report:
    """Measure every kind of growth on the bundle of ``options`` and the training beside it.

    What cannot be measured is told of in words. Raises BundleError if there is no bundle.
    """
    if not options.bundle.exists():
        raise BundleError(f"{options.bundle}: no bundle there; run make train export first")
    found = {kind.what: _curve(kind, options) for kind in KINDS}
    return report(
        [curve for curve in found.values() if isinstance(curve, Curve)],
        {what: reason for what, reason in found.items() if isinstance(reason, str)},
    )


def _curve(kind: "Kind", options: Options) -> Curve | str:
    """The costs of one kind, or why they could not be measured."""
    quick = options.quick
    sizes = kind.sizes[:2] if quick else kind.sizes
    with tempfile.TemporaryDirectory() as folder:
        try:
            calls = {str(size): kind.make(options.bundle, size, Path(folder)) for size in sizes}
        except FieldfitError as error:
            return str(error)
        times = interleave(
            calls, seconds=0.0 if quick else 20.0, least=1 if quick else 5, warmup=int(not quick)
        )
    costs = {size: spread(times[str(size)].cpu, scale=1e3) for size in sizes}
    return Curve(kind.what, kind.of, costs)


def report(curves: Sequence[Curve], missing: Mapping[str, str]) -> Report:
    """How each cost grows, and what it was at every size; ``missing`` are others, and why."""
    growth = Table(
        title="Growth of CPU time",
        columns=("what", "over", "from", "to", "exponent", "twice as many cost", "so it is"),
        rows=tuple(
            (
                curve.what, curve.of, f"{min(curve.costs):,}", f"{max(curve.costs):,}",
                f"{curve.exponent:.2f}", f"{curve.doubling:.2f} times", judged(curve),
            )
            for curve in curves
        ),
        notes=(
            "Exponent of the power law that fits best: 1 is proportional, below 1 a fixed part is "
            f"shared by more, above {STRAIGHT:g} it grows faster than its cause. The last doubling "
            "tells what becomes of it where the fixed part no longer counts.",
            *(f"Not measured: {what}: {reason}" for what, reason in missing.items()),
        ),
    )  # fmt: skip
    details = Table(
        title="CPU milliseconds at every size",
        columns=("what", "size", "CPU ms", "µs for each"),
        rows=tuple(
            (curve.what, f"{size:,} {curve.of}", str(cost), digits(1e3 * cost.median / size))
            for curve in curves
            for size, cost in curve.costs.items()
        ),
        notes=("Medians (10th to 90th percentile), sizes in turn, one process.",),
    )
    figures: dict[str, object] = {
        curve.what: {
            "exponent": curve.exponent, "last doubling": curve.doubling,
            "cpu_ms": {str(size): cost for size, cost in curve.costs.items()},
        }
        for curve in curves
    }  # fmt: skip
    return Report(title="How costs grow", tables=(growth, details), figures=figures)


def judged(curve: Curve) -> str:
    """Whether the cost grows faster than its cause, at the end or all along."""
    steepest = max(curve.exponent, float(np.log2(curve.doubling)))
    return "proportional or less" if steepest <= STRAIGHT else "**more than proportional**"


def _of_pixels(bundle: Path, pixels: int, folder: Path) -> Costs:
    import onnx

    # Nothing in the float graph depends on the size of its images; INT8 knows its borders.
    graph = onnx.load_from_string(Bundle.open(bundle).model("fp32"))
    for dimension in graph.graph.input[0].type.tensor_type.shape.dim[1:3]:
        dimension.dim_value = math.isqrt(pixels)
    return _inference(graph.SerializeToString(), "fp32", 1)


def _of_batch(bundle: Path, batch: int, folder: Path) -> Costs:
    return _inference(Bundle.open(bundle).model(FORM), FORM, batch)


def _inference(model: bytes, form: str, batch: int) -> Costs:
    engine = OnnxRuntimeEngine(model, form=form, threads=1)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (batch, *engine.shape), dtype=np.uint8)
    return functools.partial(engine.infer, images)


def _of_calibration(bundle: Path, count: int, folder: Path) -> Costs:
    import onnx

    from calibration import calibrate

    opened = Bundle.open(bundle)
    graph = onnx.load_from_string(opened.model("fp32"))
    dataset = read_dataset(bundle.parent / "train" / "images.json")
    examples = dataset.select(dataset.field, "train")[: 2 * count]
    if len(examples) < 2 * count:
        raise DataError(f"expected {2 * count} training images of the field, got {len(examples)}")
    settings = CalibrationSettings(images=count, method="minmax")
    empty = _empty(folder / f"calibration-{count}")
    return lambda: calibrate(
        graph, examples, dataset.classes, opened.manifest.input, settings, seed=0,
        folder=next(empty),
    )  # fmt: skip


def _empty(folder: Path) -> Iterator[Path]:
    """A new folder each time: what is found in the last one would be used again."""
    for number in itertools.count():
        path = folder / str(number)
        path.mkdir(parents=True)
        yield path


def _of_files(bundle: Path, count: int, folder: Path) -> Costs:
    from train.data import prepare

    source = folder / f"files-{count}"
    write_files(source, count)
    recipe = Recipe(
        name="scaling",
        data=DataSettings(source=str(source)),
        input=Bundle.open(bundle).manifest.input,
        model=ModelSettings(weights="random"),
    )
    empty = _empty(folder / f"cache-{count}")
    return lambda: prepare(recipe, cache=next(empty))


def write_files(folder: Path, count: int) -> None:
    """Write ``count`` small PNG files of noise, each once, in folders of two classes."""
    random = np.random.default_rng(count)
    for number in range(count):
        path = folder / ("good", "bad")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64), dtype=np.uint8)).save(path)


def _of_devices(bundle: Path, count: int, folder: Path) -> Costs:
    from runtime.delivery.fleet import read_fleet, write_key, write_report
    from runtime.delivery.fleet_page import page
    from runtime.delivery.status_document import sign_status
    from tests.signed_devices import NOW, healthy, new_identity

    fleet = folder / f"fleet-{count}"
    for number in range(count):
        name = f"line {number}"
        identity = new_identity(folder / f"state-{count}-{number}", name)
        write_key(fleet, identity.public)
        device = identity.device.id
        write_report(fleet, device, sign_status(healthy(device, name), identity))
    return lambda: page(read_fleet(fleet, NOW), NOW, "Lines")


class Kind(NamedTuple):
    """Something whose cost grows with a size."""

    what: str
    of: str
    """What a size counts."""
    sizes: Sequence[int]
    make: Callable[[Path, int, Path], Costs]
    """From the bundle, a size and a folder, what is timed. Raises FieldfitError if it cannot be."""


KINDS = (
    Kind("one image, fp32", "pixels", PIXELS, _of_pixels),
    Kind("a batch, int8-cpu", "images at once", BATCHES, _of_batch),
    Kind("calibration: choose, measure", "images", CALIBRATION, _of_calibration),
    Kind("a data set: read, hash, split", "files", FILES, _of_files),
    Kind("the fleet's page: verify, judge, draw", "devices", DEVICES, _of_devices),
)
