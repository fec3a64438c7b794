"""Measuring ranges: time and peak memory beside onnxruntime's calibrators.

Each run is a process of its own on one core, so that peaks are its own. The quality of what comes
out is another benchmark's matter (quantization).
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.harness import Options, Report, Spread, Table, at_most, ratio, spread
from runtime.bundle import Bundle
from runtime.errors import DataError
from runtime.preprocess import InputSpec, preprocess
from runtime.recipe import CalibrationSettings

UInt8 = npt.NDArray[np.uint8]

SIDE = 224
IMAGES, FEW, MANY = 512, 64, 1024
PEER_IMAGES = 64
"""For the peer's histograms, which need every activation of every image in memory at once."""
ROUNDS = 3

OURS, PEER = "fieldfit minmax", "onnxruntime MinMax"
HISTOGRAM = "fieldfit percentile"
HISTOGRAM_PEERS = "onnxruntime Percentile", "onnxruntime Entropy"

MEMORY_BAR, TIME_BAR, GROWTH_BAR = 600.0, 1.0, 1.1


class Job(msgspec.Struct, frozen=True):
    """What one process measures."""

    way: str
    """The library, and its method."""
    graph: str
    images: tuple[str, ...]
    spec: InputSpec


class Cost(NamedTuple):
    """What it took: from the graph's file and the images' to the ranges."""

    cpu_s: float
    peak_mb: float
    """Of the whole process, Python and libraries included."""


def measure(options: Options) -> Report:
    """Calibrate the bundle's network, enlarged, on all embedded images that are needed.

    Raises DataError if bundle or images are missing.
    """
    from train.domains import list_domain

    paths = [c.path for c in list_domain("elpv", "source").candidates]
    share = 16 if options.quick else 1
    with tempfile.TemporaryDirectory() as folder:
        spec, graph = _enlarged(options.bundle, Path(folder))

        def cost(way: str, count: int) -> Cost:
            rows = np.linspace(0, len(paths) - 1, count).astype(int)
            return in_a_process(Job(way, graph, tuple(paths[row] for row in rows), spec))

        images = IMAGES // share
        rounds = [
            (cost(OURS, images), cost(PEER, images)) for _ in range(1 if share > 1 else ROUNDS)
        ]
        costs = {(OURS, images): [ours for ours, _ in rounds]}
        costs[HISTOGRAM, images] = [cost(HISTOGRAM, images)]
        costs[PEER, images] = [peer for _, peer in rounds]
        for way in HISTOGRAM_PEERS:
            costs[way, PEER_IMAGES // share] = [cost(way, PEER_IMAGES // share)]
        growth = {
            way: tuple(cost(way, count).peak_mb for count in (FEW // share, MANY // share))
            for way in (OURS, HISTOGRAM)
        }
    return report(costs, growth, images)


def _enlarged(path: Path, folder: Path) -> tuple[InputSpec, str]:
    """The bundle's float graph for SIDE x SIDE images: nothing in it depends on their size."""
    import onnx

    if not path.exists():
        raise DataError(f"{path}: no bundle there; run make train export first")
    bundle = Bundle.open(path)
    graph = onnx.load_from_string(bundle.model("fp32"))
    for dimension in graph.graph.input[0].type.tensor_type.shape.dim[1:3]:
        dimension.dim_value = SIDE
    onnx.save(graph, folder / "fp32.onnx")
    return msgspec.structs.replace(bundle.manifest.input, size=(SIDE, SIDE)), f"{folder}/fp32.onnx"


def in_a_process(job: Job) -> Cost:
    """Do ``job`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.calibration"]
    given = msgspec.json.encode(job)
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True)
    return Cost(**json.loads(done.stdout))


def _main() -> None:
    """The process: a Job in, its Cost out."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    # onnxruntime starts a thread for each core it sees, and its calibrators take no other number.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    library, method = job.way.split()
    calibrate = _ours if library == "fieldfit" else _peer
    begin = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):  # the peer talks
        calibrate(job, method)
    seconds = time.process_time() - begin
    print(json.dumps(Cost(seconds, _peak_mb())._asdict()))


def _peak_mb() -> float:
    # Not getrusage: its maximum begins with what the parent used when it made this process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def _ours(job: Job, method: str) -> None:
    import onnx

    from calibration.images import Choice, Chosen, batches
    from calibration.ranges import measure as measure_ranges

    chosen = [Chosen(path=path, sha256="", label=None, reason="") for path in job.images]
    choice = Choice(chosen=tuple(chosen), refused=(), candidates=len(chosen))
    settings = msgspec.convert({"method": method}, CalibrationSettings)
    measure_ranges(onnx.load(job.graph), batches(choice, job.spec), settings)


def _peer(job: Job, method: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(job.images)

        def get_next(self) -> dict[str, UInt8] | None:
            path = next(self.rest, None)  # one image, as every example of the manual has it
            return None if path is None else {"image": preprocess(Path(path), job.spec)[None]}

    calibrator = create_calibrator(
        Path(job.graph), sorted({*QDQRegistry, *QLinearOpsRegistry}),  # as quantize_static does
        augmented_model_path=f"{job.graph}.augmented",
        calibrate_method=CalibrationMethod[method],
    )  # fmt: skip
    calibrator.collect_data(Reader())
    calibrator.compute_data()


def report(
    costs: Mapping[tuple[str, int], Sequence[Cost]],
    growth: Mapping[str, tuple[float, ...]],
    images: int,
) -> Report:
    """Both tables, and whether the bars hold.

    ``costs`` are the runs of each way with so many images, ``growth`` the peaks in MB of FEW and
    of MANY images, ``images`` the number that stands for IMAGES in a quick run.
    """
    ours, peer = costs[OURS, images], costs[PEER, images]
    times = ratio([cost.cpu_s for cost in ours], [cost.cpu_s for cost in peer])
    peak = max(cost.peak_mb for way in (OURS, HISTOGRAM) for cost in costs[way, images])
    grown = max(peaks[-1] / peaks[0] for peaks in growth.values())
    cost_table = Table(
        title=f"Images of {SIDE} x {SIDE}, EfficientNet-Lite0, one core",
        columns=("way", "images", "peak MB", "CPU seconds", "CPU ms an image"),
        rows=tuple(
            (
                way, f"{count:,}", f"{max(cost.peak_mb for cost in found):.0f}",
                str(_cpu(found)), f"{_cpu(found, scale=1e3 / count).median:.0f}",
            )
            for (way, count), found in costs.items()
        ),
        notes=(
            f"{OURS} takes **{times}** of the CPU time of {PEER}, {len(ours)} rounds in turn: the "
            f"bar of {TIME_BAR:g} {_verdict(times.median <= TIME_BAR)}. Ours needs up to "
            f"{peak:.0f} MB: the bar of {MEMORY_BAR:.0f} MB {_verdict(peak <= MEMORY_BAR)}.",
            "Files are read and decoded in that time, on both sides. Ours runs a few images "
            "together, the peer one at a time as in its manual. The peer's histogram methods "
            "keep all activations of all images in memory, so that they get fewer images.",
        ),
    )  # fmt: skip
    few, many = (f"{count * images // IMAGES:,} images" for count in (FEW, MANY))
    growth_table = Table(
        title="Peak memory over the number of images",
        columns=("way", f"{few}, MB", f"{many}, MB", "ratio"),
        rows=tuple(
            (way, *(f"{peak:.0f}" for peak in peaks), f"{peaks[-1] / peaks[0]:.3f}")
            for way, peaks in growth.items()
        ),
        notes=(f"The bar of {GROWTH_BAR:g} {_verdict(grown <= GROWTH_BAR)}.",),
    )
    figures: dict[str, object] = {
        "time_share_cpu": times,
        "costs": [
            {"way": way, "images": count, "runs": [cost._asdict() for cost in found]}
            for (way, count), found in costs.items()
        ],
        "peaks_mb": growth,
    }
    bars = (
        at_most(f"calibration of {IMAGES} images, CPU time against {PEER}", times, TIME_BAR),
        at_most(f"calibration of {IMAGES} images, peak memory", peak, MEMORY_BAR, " MB"),
        at_most(f"peak memory of {MANY:,} images against {FEW}", grown, GROWTH_BAR),
    )
    return Report(
        title="Calibration", tables=(cost_table, growth_table), figures=figures, bars=bars
    )


def _cpu(costs: Sequence[Cost], *, scale: float = 1.0) -> Spread:
    return spread((cost.cpu_s for cost in costs), scale=scale)


def _verdict(held: bool) -> str:
    return "holds" if held else "does not hold"


if __name__ == "__main__":
    _main()
