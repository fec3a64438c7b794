"""What can be proven only on a GPU: CUDA, TensorRT engines, mixed precision, second start.

Each part runs in a process of its own and ends in words where it cannot run: a missing library, a
GPU that a library refuses, a crash. It knows which parts there are, not what a bar should be.
"""

import ctypes
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks import cases, device, training
from benchmarks.harness import Options, Report, Spread, Table, interleave, ratio, spread
from runtime import machine, metrics
from runtime.bundle import Bundle
from runtime.engines import cudart, tensorrt_build
from runtime.engines.engine import Engine, logits_of
from runtime.engines.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.engines.plan_cache import PlanCache
from runtime.engines.tensorrt_engine import Memory, TensorRTEngine
from runtime.engines.tensorrt_library import Flavour, TensorRT, load_library
from runtime.errors import DataError, EngineError, FieldfitError

if TYPE_CHECKING:
    from train.device import Device

UInt8 = npt.NDArray[np.uint8]

LONG = True
"""Runs only when it is named: without a GPU it would only say so."""
PAGE = Path(__file__).with_suffix(".md")
"""Where its tables go."""

COMMAND = "python -m benchmarks.run gpu"
ROOT = Path(__file__).parent.parent

FORMS = ("fp32", "fp16", "int8", "int8-fp16")
BATCHES = (1, 16)
PROFILE = (1, 1, 16)
IMAGES, QUICK_IMAGES = 256, 16
"""Test images that a form's answers are compared on."""

COPIES = (25_600, 1 << 20, 64 << 20)
"""Bytes: one gray picture of 160 x 160, a megabyte, and enough to fill the bus."""


class Findings(NamedTuple):
    """What a part measured."""

    tables: tuple[Table, ...]
    figures: object


class Part(NamedTuple):
    """One thing to find out."""

    title: str
    measure: Callable[[Options], Findings]
    """Raises FieldfitError with the reason where it cannot be found out here."""


def measure(options: Options) -> Report:
    """Run every part, and say of each what came of it."""
    outcomes = {part.title: isolated(part, options) for part in PARTS}
    return report(outcomes, options)


def report(outcomes: Mapping[str, Findings | str], options: Options) -> Report:
    """The tables of the parts that ran, under one of what ran and what did not."""
    ran = {title: found for title, found in outcomes.items() if isinstance(found, Findings)}
    rows = [
        (title, "measured" if title in ran else f"not run: {outcome}")
        for title, outcome in outcomes.items()
    ]
    notes = [
        "Where the GPU is, with a bundle made by `make train export`, the whole page is one "
        f"command: `{COMMAND}`. Nothing else is claimed here.",
        "Not part of it: training on several GPUs (`torchrun --nproc-per-node 2 -m train "
        "train/recipes/solar.toml`; `tests/test_distributed.py` runs it as two CPU processes) and "
        "`[train] compile = true`.",
    ]
    if not ran:
        notes.insert(0, "No figure on this page: nothing here has run on a GPU yet.")
    what = Table(
        title="What ran", columns=("part", "outcome"), rows=tuple(rows), notes=tuple(notes)
    )
    tables = itertools.chain.from_iterable(found.tables for found in ran.values())
    figures = {
        title: outcome.figures if isinstance(outcome, Findings) else outcome
        for title, outcome in outcomes.items()
    }
    return Report(title="On a GPU", tables=(what, *tables), figures=figures)


def isolated(part: Part, options: Options) -> Findings | str:
    """What ``part`` found, or why it found nothing; a crash in a library is a reason as well."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(part, options, sender))
    process.start()
    sender.close()  # or its end would never be noticed
    try:
        outcome: Findings | str = receiver.recv()
    except EOFError:
        process.join()
        outcome = _how_it_ended(process.exitcode)
    process.join()
    return outcome


def _work(part: Part, options: Options, sender: Connection) -> None:
    try:
        outcome: Findings | str = part.measure(options)
    except FieldfitError as error:
        outcome = str(error)
    except Exception as error:  # a bug of ours, which must not cost the other parts their turn
        traceback.print_exc()
        outcome = f"broke off: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    sender.send(outcome)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code} and said nothing"


def cuda(options: Options) -> Findings:
    """The GPU, copies to it and back, and whether a captured graph does what was captured."""
    gpu = require_gpu()
    library = cudart.load()
    stream = library.stream()
    copies, figures = [], list[dict[str, object]]()
    for size in COPIES[: 2 if options.quick else None]:
        speeds = _copies(library, stream, size, rounds=5 if options.quick else 50)
        copies.append((f"{size:,}", *map(str, speeds.values())))
        figures.append({"bytes": size, **speeds})
    facts = _facts(gpu, library, graph=_graph_works(library, stream))
    library.destroy_stream(stream)
    return Findings(
        (
            Table(
                title="CUDA through `runtime/engines/cudart.py`",
                columns=("fact", "value"),
                rows=tuple(facts.items()),
            ),
            Table(
                title="Copies, GB a second by CUDA's events",
                columns=("bytes", *speeds),
                rows=tuple(copies),
                notes=("Pageable is ordinary memory, which CUDA copies through a buffer first.",),
            ),
        ),
        {"facts": facts, "copies": figures},
    )


def require_gpu() -> cudart.Device:
    """The first GPU. Raises EngineError with CUDA's reason if there is none."""
    gpu = cudart.probe()
    if isinstance(gpu, str):
        raise EngineError(gpu, "no device")
    return gpu


def _facts(gpu: cudart.Device, library: cudart.Cudart, *, graph: bool) -> dict[str, str]:
    return {
        "GPU": ", ".join(machine.gpus()) or "the driver does not name it",
        "compute capability": gpu.capability,
        "memory": f"{gpu.total_bytes / 2**30:.1f} GiB"
        + (", shared with the CPU" if gpu.integrated else ""),
        "CUDA runtime, driver": f"{gpu.runtime_version}, {gpu.driver_version}",
        "maps the host's memory": "yes" if library.can_map_host_memory(gpu.ordinal) else "no",
        "a captured graph copies what was captured": "yes" if graph else "no",
    }


def _copies(library: cudart.Cudart, stream: int, size: int, *, rounds: int) -> dict[str, Spread]:
    on_gpu, pinned = library.malloc(size), library.host_alloc(size)
    pageable = np.zeros(size, np.uint8)
    start, end = library.event(), library.event()
    to, back = library.copy_to_device, library.copy_to_host
    ways = {
        "pinned to GPU": functools.partial(to, on_gpu, pinned, size, stream),
        "GPU to pinned": functools.partial(back, pinned, on_gpu, size, stream),
        "pageable to GPU": functools.partial(to, on_gpu, pageable.ctypes.data, size, stream),
        "GPU to pageable": functools.partial(back, pageable.ctypes.data, on_gpu, size, stream),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first turn warms up
        for name, copy in ways.items():
            library.record(start, stream)
            copy()
            library.record(end, stream)
            if turn:
                speeds[name].append(size / library.elapsed_ms(start, end) / 1e6)
            library.synchronize(stream)
    for event in (start, end):
        library.destroy_event(event)
    library.free(on_gpu)
    library.free_host(pinned)
    return {name: spread(values) for name, values in speeds.items()}


def _graph_works(library: cudart.Cudart, stream: int) -> bool:
    """Whether bytes that are changed after the capture come back, and not those before it."""
    size = 1024
    there, back, on_gpu = library.host_alloc(size), library.host_alloc(size), library.malloc(size)

    def copies() -> None:
        library.copy_to_device(on_gpu, there, size, stream)
        library.copy_to_host(back, on_gpu, size, stream)

    graph = library.capture(stream, copies)
    message = bytes(range(256)) * (size // 256)
    ctypes.memmove(there, message, size)
    library.launch(graph, stream)
    library.synchronize(stream)
    works = ctypes.string_at(back, size) == message
    library.destroy_graph(graph)
    library.free(on_gpu)
    library.free_host(there)
    library.free_host(back)
    return works


def tensorrt(options: Options, flavour: Flavour) -> Findings:
    """Every form of the bundle: what its engine is, how it answers, how fast it is."""
    library, gpu = load_library(flavour), cudart.probe()
    if isinstance(library, str) or isinstance(gpu, str):
        missing = (reason for reason in (library, gpu) if isinstance(reason, str))
        raise EngineError("; ".join(missing), "no device")
    bundle = _bundle(options)
    subject = Subject.of(bundle, options)
    built_rows, answers, calls = (list[tuple[str, ...]]() for _ in range(3))
    figures = list[dict[str, object]]()
    for form in (form for form in FORMS if bundle.manifest.artifact(form)):
        try:
            built = _build(bundle, form, library)
        except EngineError as error:
            built_rows.append((form, "", "", "", "", str(error)))
            figures.append({"form": form, "refused": str(error)})
            continue
        row = _built_row(form, built)
        built_rows.append(row)
        with TensorRTEngine(built.plan, sha256=built.sha256, form=form) as engine:
            score = subject.score(engine)
        answers.append((form, *score.cells))
        times = _plan_times(built, form, subject.images, 0.0 if options.quick else 5.0)
        calls += [(f"{form}, {name}", *map(str, spreads)) for name, spreads in times.items()]
        figures.append(
            {"form": form, "built": row, "answers": score._asdict(), "milliseconds": times}
        )
    title = f"{flavour} {library.version}"
    return Findings(
        (
            Table(
                title=f"{title}: engines",
                columns=(
                    "form", "seconds to build", "MB", "typing", "convolutions", "rungs before",
                ),
                rows=tuple(built_rows),
            ),
            subject.table(title, answers),
            Table(
                title=f"{title}: milliseconds of one call",
                columns=("form, memory, CUDA graph", *(f"batch {batch}" for batch in BATCHES)),
                rows=tuple(calls),
                notes=("Wall time with copies, variants taking turns, median (10th to 90th).",),
            ),
        ),
        figures,
    )  # fmt: skip


def _bundle(options: Options) -> Bundle:
    if not options.bundle.exists():
        raise DataError(f"{options.bundle}: no bundle there; run make train export first")
    return Bundle.open(options.bundle)


def _build(bundle: Bundle, form: str, library: TensorRT) -> tensorrt_build.Built:
    shape = bundle.manifest.input.shape
    return tensorrt_build.build(bundle.model(form), batch=PROFILE, shape=shape, library=library)


def _built_row(form: str, built: tensorrt_build.Built) -> tuple[str, ...]:
    kinds = list(tensorrt_build.conv_precisions(built).values())
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    return (
        form,
        f"{built.seconds:.1f}",
        f"{len(built.plan) / 1e6:.1f}",
        built.typing,
        counts or "not listed",
        "; ".join(built.attempts) or "none",
    )


def _plan_times(
    built: tensorrt_build.Built, form: str, images: UInt8, seconds: float
) -> dict[str, list[Spread]]:
    """Milliseconds of one call in each way to run a plan, one spread for each of BATCHES."""
    ways: Sequence[tuple[Memory, bool]] = (
        ("pinned", True), ("pinned", False), ("mapped", True), ("mapped", False),
    )  # fmt: skip
    engines: dict[str, Engine] = {}
    for memory, graphs in ways:
        if memory == "mapped" and not cudart.load().can_map_host_memory(0):
            continue
        engines[f"{memory}, {'graph' if graphs else 'no graph'}"] = TensorRTEngine(
            built.plan, sha256=built.sha256, form=form, memory=memory, graphs=graphs
        )
    times = latencies(engines, images, seconds)
    for engine in engines.values():
        engine.close()
    return times


def latencies(
    engines: Mapping[str, Engine], images: UInt8, seconds: float
) -> dict[str, list[Spread]]:
    """Wall milliseconds of one call by name, one spread for each of BATCHES."""
    result: dict[str, list[Spread]] = {name: [] for name in engines}
    for batch in BATCHES:
        chosen = np.ascontiguousarray(np.resize(images, (batch, *images.shape[1:])))
        calls = {name: functools.partial(e.infer, chosen) for name, e in engines.items()}
        times = interleave(calls, seconds=seconds, settle=2, calls=10)
        for name, taken in times.items():
            result[name].append(spread(taken.wall, scale=1e3))
    return result


class Score(NamedTuple):
    """How an engine's answers differ from those of fp32 on a CPU, and from its own form's there."""

    agreement: float
    sqnr_db: float
    own_sqnr_db: float
    """Against the same form on onnxruntime's CPU provider: what the engine itself changes."""

    @property
    def cells(self) -> tuple[str, ...]:
        """As a table shows it."""
        return f"{self.agreement:.1%}", f"{self.sqnr_db:.1f}", f"{self.own_sqnr_db:.1f}"


class Subject(NamedTuple):
    """Pictures, and what the bundle's fp32 form says to them on a CPU."""

    bundle: Bundle
    images: UInt8
    what: str
    reference: npt.NDArray[np.float32]

    @classmethod
    def of(cls, bundle: Bundle, options: Options) -> "Subject":
        """Test images of the training beside the bundle; without one, its golden samples."""
        limit = QUICK_IMAGES if options.quick else IMAGES
        try:
            case = cases.exported(options.bundle)
            images = case.pixels(case.examples("test")[:limit])
            what = f"{len(images)} held-out images"
        except DataError:
            images = bundle.golden()["images"]
            what = f"the bundle's {len(images)} golden samples"
        with OnnxRuntimeEngine(bundle.model("fp32"), form="fp32") as engine:
            return cls(bundle, images, what, logits_of(engine, images))

    def score(self, engine: Engine) -> Score:
        """Run ``engine`` on the pictures."""
        logits = logits_of(engine, self.images)
        with OnnxRuntimeEngine(self.bundle.model(engine.form), form=engine.form) as same:
            own = logits_of(same, self.images)
        return Score(
            agreement=metrics.agreement(self.reference, logits),
            sqnr_db=min(metrics.sqnr_db(self.reference, logits), 200.0),
            own_sqnr_db=min(metrics.sqnr_db(own, logits), 200.0),
        )

    def table(self, title: str, rows: Iterable[tuple[str, ...]]) -> Table:
        """Scores by form."""
        return Table(
            title=f"{title}: answers",
            columns=("form", "agrees with fp32", "SQNR dB", "SQNR dB, its own form on the CPU"),
            rows=tuple(rows),
            notes=(f"On {self.what}, against onnxruntime's CPU provider.",),
        )


def onnxruntime_cuda(options: Options) -> Findings:
    """The float forms on onnxruntime's CUDA provider."""
    bundle = _bundle(options)
    forms = [form for form in ("fp32", "fp16") if bundle.manifest.artifact(form)]
    engines: dict[str, Engine] = {
        form: OnnxRuntimeCudaEngine(bundle.model(form), form=form) for form in forms
    }
    subject = Subject.of(bundle, options)
    scores = {form: subject.score(engine) for form, engine in engines.items()}
    times = latencies(engines, subject.images, 0.0 if options.quick else 10.0)
    title = f"onnxruntime CUDA {engines[forms[0]].version}"
    return Findings(
        (
            subject.table(title, [(form, *score.cells) for form, score in scores.items()]),
            Table(
                title=f"{title}: milliseconds of one call",
                columns=("form", *(f"batch {batch}" for batch in BATCHES)),
                rows=tuple((form, *map(str, spreads)) for form, spreads in times.items()),
                notes=("Wall time with copies, forms taking turns, median (10th to 90th).",),
            ),
        ),
        {"answers": {form: s._asdict() for form, s in scores.items()}, "milliseconds": times},
    )


def mixed_precision(options: Options) -> Findings:
    """Steps of fine-tuning in the precision that training chooses here, beside float32."""
    import torch

    from train.device import choose_device

    chosen = choose_device()
    if chosen.kind != "cuda":
        raise EngineError(f"torch trains on the {chosen.reason}", "no device")
    plain = chosen._replace(precision=torch.float32)
    return training_steps(
        {str(d.precision).removeprefix("torch."): d for d in (plain, chosen)}, options
    )


def training_steps(devices: "Mapping[str, Device]", options: Options) -> Findings:
    """Images a second on each of ``devices``, the first of which the others are compared to."""
    losses: dict[str, list[float]] = {name: [] for name in devices}
    recipe = training.make_recipe(training.QUICK_IMAGES if options.quick else training.IMAGES)

    def counted(name: str, chosen: "Device") -> Callable[[], None]:
        step = training.make_stepper(training.make_material(recipe, chosen), kept=False)
        return lambda: losses[name].append(step())

    times = interleave(
        {name: counted(name, chosen) for name, chosen in devices.items()},
        seconds=0.0 if options.quick else 60.0, least=2, warmup=2,
    )  # fmt: skip
    first = next(iter(devices))
    rows = []
    for name, taken in times.items():
        finite = sum(map(math.isfinite, losses[name]))
        rows.append((
            name,
            str(spread([training.BATCH / seconds for seconds in taken.wall])),
            str(ratio(times[first].wall, taken.wall)),
            f"{finite} of {len(losses[name])}",
        ))  # fmt: skip
    table = Table(
        title="Fine-tuning in mixed precision",
        columns=("precision", "images a second", f"against {first}", "finite losses"),
        rows=tuple(rows),
        notes=(
            f"Steps of {training.BATCH} images taking turns, reading and augmenting included. "
            f"{'; '.join(chosen.reason for chosen in devices.values())}.",
        ),
    )
    return Findings((table,), {"losses": losses, "wall": {n: t.wall for n, t in times.items()}})


def gpu_tests(options: Options) -> Findings:
    """The tests that need a GPU."""
    require_gpu()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    result = done.stdout.strip().splitlines()[-1]
    table = Table(
        title="Tests marked gpu", columns=("command", "result"), rows=(("pytest -m gpu", result),)
    )
    return Findings((table,), {"exit code": done.returncode, "output": done.stdout[-4000:]})


PLAN_CODE = """
import ctypes, importlib, sys
import numpy as np
from PIL import Image
library, cudart, plan, picture = sys.argv[1:]
trt, cuda = importlib.import_module(library), ctypes.CDLL(cudart)
class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, message):
        pass
runtime = trt.Runtime(Logger())
engine = runtime.deserialize_cuda_engine(open(plan, "rb").read())
context = engine.create_execution_context()
_, height, width, channels = engine.get_tensor_shape("image")
with Image.open(picture) as opened:
    opened = opened.convert("L" if channels == 1 else "RGB").resize((width, height))
host = {"image": np.asarray(opened, np.uint8).reshape(1, height, width, channels)}
for name in ("logits", "features"):
    host[name] = np.empty((1, engine.get_tensor_shape(name)[1]), np.float32)
context.set_input_shape("image", host["image"].shape)
stream = ctypes.c_void_p()
cuda.cudaStreamCreateWithFlags(ctypes.byref(stream), 1)
def copy(to, source, size, kind):
    cuda.cudaMemcpyAsync(to, source, ctypes.c_size_t(size), kind, stream)
memory = {}
for name, array in host.items():
    memory[name] = ctypes.c_void_p()
    cuda.cudaMalloc(ctypes.byref(memory[name]), ctypes.c_size_t(array.nbytes))
    context.set_tensor_address(name, memory[name].value)
image, logits = host["image"], host["logits"]
copy(memory["image"], ctypes.c_void_p(image.ctypes.data), image.nbytes, 1)
context.execute_async_v3(stream.value)
copy(ctypes.c_void_p(logits.ctypes.data), memory["logits"], logits.nbytes, 2)
cuda.cudaStreamSynchronize(stream)
print(logits.argmax())
"""

BARE_PLAN = "bare script that deserialises the same plan"


def second_start(options: Options) -> Findings:
    """Whole processes to the first answer, once the plan is built."""
    require_gpu()
    _bundle(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FIELDFIT_CACHE"] = str(folder / "cache")  # this process is this part's own
        image, plan = folder / "image.png", folder / "engine.plan"
        device.write_sample(options.bundle, image)
        bundle = options.bundle.resolve()
        chosen = json.loads(device.run_code(sys.executable, device.CHOSEN_CODE, bundle))
        if not chosen["name"].startswith("tensorrt"):
            raise EngineError(f"the engine chosen here is {chosen['engine']}, which has no plan")
        plan.write_bytes(plan_of(folder / "cache", chosen["form"]))
        module = chosen["name"].replace("-", "_")
        run = functools.partial(functools.partial, device.run_code, sys.executable)
        processes = {
            device.OURS: run(device.OURS_CODE, bundle, image),
            BARE_PLAN: run(PLAN_CODE, module, cudart.load()._library._name, plan, image),
        }
        table, figures = device.start_table(
            device.starts(processes, 0.0 if options.quick else 60.0),
            BARE_PLAN,
            f"Second start, first answer: {chosen['engine']}",
        )
    return Findings((table,), {"engine": chosen, "processes": figures})


def plan_of(cache: Path, form: str) -> bytes:
    """The plan of ``form`` that was kept in ``cache``; EngineError if there is none."""
    plans = PlanCache(cache)
    keys = [record.key for record in plans.entries() if record.key.form == form]
    plan = plans.find(keys[0]) if keys else "none is in the cache"
    if isinstance(plan, str):
        raise EngineError(f"no plan of {form} was kept: {plan}")
    return plan.plan


PARTS = (
    Part("CUDA: memory, copies, graphs", cuda),
    Part("TensorRT", functools.partial(tensorrt, flavour="tensorrt")),
    Part("TensorRT-RTX", functools.partial(tensorrt, flavour="tensorrt-rtx")),
    Part("onnxruntime CUDA", onnxruntime_cuda),
    Part("second start", second_start),
    Part("training in mixed precision", mixed_precision),
    Part("tests that need a GPU", gpu_tests),
)
