"""A model on a CPU beside what a user would pick instead: speed, and whether the answers stay.

The same weights, the same images: fieldfit's float32 and INT8, torch as it is, with channels last
and compiled, onnxruntime's own quantizer, OpenVINO and NNCF. Also where a call of the classifier
spends time. The quality of INT8 is another benchmark's matter (quantization).
"""

import contextlib
import functools
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks import peers
from benchmarks.harness import (
    Bar,
    Options,
    Report,
    Seconds,
    Table,
    Times,
    at_least,
    interleave,
    ratio,
    spread,
    take_turns,
)
from runtime import Bundle, Classifier
from runtime.dataset import read_dataset
from runtime.errors import BundleError, EngineError
from runtime.metrics import agreement, sqnr_db
from runtime.preprocess import preprocess_batch

UInt8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

MODULE = "benchmarks.peers_infer"
OURS, FLOAT, CHECKPOINT = "fieldfit, int8-cpu", "fieldfit, fp32", "torch, eager"
BARS = {1: 2.0, 16: 2.3}
"""Times faster than float32, at least, by batch; one thread."""
CALLS = {1: (2, 6), 16: (1, 2)}
"""Of a turn, by batch: those until the caches hold this model again, and those that count."""
THREADS = 1, 2
QUICK_IMAGES = 32


class Material(NamedTuple):
    """What candidates are made of, all of one build."""

    models: Mapping[str, Path]
    """ONNX files by form."""
    images: UInt8
    """Held-out field images ``[N, H, W, C]``."""
    what: str
    """Where the images are from."""
    calibration: UInt8 | None
    """What INT8 was calibrated on; None if nothing says it any more."""
    checkpoint: Path | None


class Candidate(NamedTuple):
    """A way to run the model in a process of its own."""

    way: str
    """By the name that peers_infer has for it."""
    package: str
    """What must be installed."""
    job: Mapping[str, object]


class Unmade(NamedTuple):
    """Why there is no such candidate."""

    reason: str


def measure(options: Options) -> Report:
    """Time the bundle of ``options``, and what else can run its weights.

    Raises BundleError if there is none, or it lacks a form.
    """
    if not options.bundle.exists():
        raise BundleError(f"{options.bundle}: no bundle there; run make train export first")
    bundle = Bundle.open(options.bundle)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        material = gather(options, bundle, Path(name))
        made = candidates(material, Path(name), quick=options.quick)
        ends = {shown: start(given, material, Path(name), stack) for shown, given in made.items()}
        running = {shown: end for shown, end in ends.items() if isinstance(end, Started)}
        processes = {shown: end.process for shown, end in running.items()}
        speeds = measure_speeds(processes, quick=options.quick)
    stages, stage_ms = _stages(options.bundle, 0.3 if options.quick else 5.0)
    answers = {shown: end.answers for shown, end in running.items()}
    unmade = {shown: end.reason for shown, end in ends.items() if isinstance(end, Unmade)}
    return report(bundle, material, answers, speeds, unmade, stages, stage_ms)


def gather(options: Options, bundle: Bundle, folder: Path) -> Material:
    """Write what the candidates read to ``folder``."""
    build = options.bundle.parent
    limit = QUICK_IMAGES if options.quick else None
    models = {form: folder / f"{form}.onnx" for form in ("fp32", "int8-cpu")}
    for form, path in models.items():
        path.write_bytes(bundle.model(form))
    images, what = bundle.golden()["images"], "golden samples, for no training lies beside"
    if (build / "train" / "images.json").exists():
        dataset = read_dataset(build / "train" / "images.json")
        examples = dataset.select(dataset.field, "test")[:limit]
        images = preprocess_batch([e.path for e in examples], bundle.manifest.input)
        what = f"held-out {dataset.field} images"
    calibration = None
    if (build / "calibration" / "images.json").exists():
        chosen = msgspec.json.decode((build / "calibration" / "images.json").read_bytes())["chosen"]
        calibration = preprocess_batch([c["path"] for c in chosen[:limit]], bundle.manifest.input)
    checkpoint = build / "train" / "checkpoint.safetensors"
    return Material(models, images, what, calibration, checkpoint if checkpoint.exists() else None)


def candidates(material: Material, folder: Path, *, quick: bool) -> dict[str, Candidate | Unmade]:
    """All that the tables speak of, in their order; those that need what is not there, why not."""
    fp32 = {"model": str(material.models["fp32"])}
    made: dict[str, Candidate | Unmade] = {
        OURS: Candidate(
            "fieldfit", "onnxruntime",
            {"model": str(material.models["int8-cpu"]), "form": "int8-cpu"},
        ),
        FLOAT: Candidate("fieldfit", "onnxruntime", {**fp32, "form": "fp32"}),
        **_of_torch(material.checkpoint, quick=quick),
        **_of_quantizers(material, folder),
        "OpenVINO, defaults": Candidate("openvino", "openvino", fp32),
        "OpenVINO, float32 kept": Candidate("openvino-float32", "openvino", fp32),
    }  # fmt: skip
    return made


def _of_torch(checkpoint: Path | None, *, quick: bool) -> dict[str, Candidate | Unmade]:
    ways = {
        CHECKPOINT: "torch",
        "torch, channels last": "torch-channels-last",
        "torch.compile": "torch-compile",
    }
    if checkpoint is None:
        return dict.fromkeys(ways, Unmade("no checkpoint lies beside the bundle"))
    found: dict[str, Candidate | Unmade] = {
        shown: Candidate(way, "torch", {"checkpoint": str(checkpoint)})
        for shown, way in ways.items()
    }
    if quick:
        found["torch.compile"] = Unmade("left out of a quick run: it compiles for a minute")
    return found


def _of_quantizers(material: Material, folder: Path) -> dict[str, Candidate | Unmade]:
    """The other ways to INT8, on the calibration images that fieldfit chose."""
    import onnx

    from benchmarks.quantization import (
        CPU,
        PEERS,
        before_first_convolution,
        quantize_statically,
    )

    static = {f"onnxruntime, {name}": peer for name, peer in PEERS.items() if peer.engine == CPU}
    nncf = "OpenVINO, NNCF INT8"
    if material.calibration is None:
        return dict.fromkeys([*static, nncf], Unmade("no calibration images lie beside the bundle"))
    graph = onnx.load(material.models["fp32"])
    found: dict[str, Candidate | Unmade] = {}
    for number, (shown, peer) in enumerate(static.items()):
        path = folder / f"static-{number}.onnx"
        onnx.save(quantize_statically(graph, material.calibration, peer), path)
        found[shown] = Candidate("onnxruntime", "onnxruntime", {"model": str(path)})
    np.save(folder / "calibration.npy", material.calibration)
    job = {
        "model": str(material.models["fp32"]), "calibration": str(folder / "calibration.npy"),
        "before": before_first_convolution(graph),
    }  # fmt: skip
    return {**found, nncf: Candidate("nncf", "nncf", job)}


class Started(NamedTuple):
    """A process that runs, and its logits ``[N, K]`` of all images."""

    process: peers.Process
    answers: Floats


def start(
    candidate: Candidate | Unmade, material: Material, folder: Path, stack: contextlib.ExitStack
) -> Started | Unmade:
    """Start ``candidate`` and let it answer once; ``stack`` ends it."""
    if isinstance(candidate, Unmade):
        return candidate
    python = peers.python_with(candidate.package)
    if python is None:
        return Unmade(f"{candidate.package} is not installed: {peers.WAY_OUT}")
    images, answers = folder / "images.npy", folder / "answers.npy"
    np.save(images, material.images)
    job = msgspec.json.encode({**candidate.job, "images": str(images)}).decode()
    try:
        process = stack.enter_context(peers.Process(python, MODULE, candidate.way, job))
        process.ask(threads=1, answers=str(answers))
    except EngineError as error:
        return Unmade(str(error))
    return Started(process, np.load(answers, allow_pickle=False))


class Speeds(NamedTuple):
    """What turns took with so many threads and images at once."""

    threads: int
    batch: int
    again: Mapping[str, Times]
    """With the caches its own."""
    first: Mapping[str, Times]
    """Right after the others."""


def measure_speeds(processes: Mapping[str, peers.Process], *, quick: bool) -> list[Speeds]:
    """All candidates in turn, for each number of threads and each batch."""
    found = []
    for threads in THREADS[:1] if quick else THREADS:
        for batch, (settle, calls) in CALLS.items():
            asked = {"threads": threads, "batch": batch, "settle": settle, "calls": calls}
            for process in processes.values():
                process.ask(**asked)  # compiles, allocates
            first = {name: Times(cpu=[], wall=[]) for name in processes}
            turns = {
                name: functools.partial(_turn, process, asked, first[name])
                for name, process in processes.items()
            }
            again = take_turns(turns, seconds=1.0 if quick else 60.0, least=2 if quick else 5)
            found.append(Speeds(threads, batch, again, first))
    return found


def _turn(process: peers.Process, asked: Mapping[str, int], first: Times) -> Seconds:
    taken = process.ask(**asked)
    for clock, seconds in zip((first.cpu, first.wall), taken["first"], strict=True):
        clock.append(seconds)
    return Seconds(*taken["again"])


def report(
    bundle: Bundle,
    material: Material,
    answers: Mapping[str, Floats],
    speeds: Sequence[Speeds],
    unmade: Mapping[str, str],
    stages: Table,
    stage_ms: object,
) -> Report:
    """The tables, and whether the bars hold."""
    judge = CHECKPOINT if CHECKPOINT in answers else FLOAT
    same = {
        name: (agreement(answers[judge], logits), sqnr_db(answers[judge], logits))
        for name, logits in answers.items()
    }
    height, width, channels = bundle.manifest.input.shape
    tables, bars = [], list[Bar]()
    for found in speeds:
        tables.append(speed_table(found, same, unmade, f"{height} x {width} x {channels}"))
        if found.threads == 1:
            bars.append(bar(found))
    notes = (
        "Median (10th to 90th percentile) of round-by-round ratios: how many times longer a "
        f"candidate takes than {OURS}. *Again and again* is a device that runs one model: the "
        "first calls of a turn are not counted. *Alternating* is one on which something else "
        "empties the caches before every call. Each candidate is a process of its own.",
        f"Answers are compared with those of {judge} on {len(material.images)} {material.what}. "
        "quantize_static and NNCF are calibrated on the images that fieldfit chose, with what "
        "turns bytes into the first convolution's input left float. OpenVINO's defaults compute "
        "in bfloat16 where the processor can. torch.compile folds constants (freezing).",
        f"Versions: {peers.versions('onnxruntime', 'torch', 'openvino', 'nncf')}.",
    )
    tables[0] = msgspec.structs.replace(tables[0], notes=notes)
    return Report(
        title=f"Inference of {bundle.manifest.name} {bundle.manifest.version}",
        tables=(*tables, stages),
        figures={
            "speeds": [
                {
                    "candidate": name, "threads": found.threads, "batch": found.batch,
                    "rounds": len(found.again[name].cpu), **figures(found, name),
                }
                for found in speeds
                for name in found.again
            ],
            "answers": {
                name: {"agreement": agreed, "sqnr_db": decibel}
                for name, (agreed, decibel) in same.items()
            },
            "not measured": dict(unmade),
            "stages_ms": stage_ms,
        },
        bars=tuple(bars),
    )  # fmt: skip


def bar(found: Speeds) -> Bar:
    """INT8 against float32, both ours."""
    faster = ratio(found.again[FLOAT].cpu, found.again[OURS].cpu)
    what = f"int8-cpu over fp32, batch {found.batch}, one thread, CPU time"
    return at_least(what, faster, BARS[found.batch], " times")


def figures(found: Speeds, name: str) -> dict[str, object]:
    """What the table shows of a candidate's speed, unrounded."""
    again, first = found.again, found.first
    return {
        "wall_ms": spread(again[name].wall, scale=1e3),
        "cpu": ratio(again[name].cpu, again[OURS].cpu),
        "wall": ratio(again[name].wall, again[OURS].wall),
        "cpu_alternating": ratio(first[name].cpu, first[OURS].cpu),
    }


def speed_table(
    found: Speeds,
    same: Mapping[str, tuple[float, float]],
    unmade: Mapping[str, str],
    size: str,
) -> Table:
    """A row for each candidate; one that could not be measured says why."""
    rows = [
        (
            name, f"{same[name][0]:.1%}", f"{same[name][1]:.1f}",
            *map(str, figures(found, name).values()),
        )
        for name in found.again
    ]  # fmt: skip
    rows += [(f"{name}: not measured, {reason}", *[""] * 6) for name, reason in unmade.items()]
    plural = "s" if found.threads > 1 else ""
    return Table(
        title=f"Batch {found.batch}, {found.threads} thread{plural}, {size}",
        columns=(
            "candidate", "same answers", "SQNR dB", "wall ms",
            "times longer: CPU, again and again", "wall, again and again", "CPU, alternating",
        ),
        rows=tuple(rows),
    )  # fmt: skip


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
