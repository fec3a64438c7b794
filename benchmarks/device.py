"""What a device pays for fieldfit: time to the first answer, the install, and the wrapper's cost.

Each beside what a person would write without it, and held to a bar. It does not time the model
itself (inference does), nor a GPU (gpu does, with ``starts`` of this file).
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tomllib

from benchmarks.harness import (
    Bar,
    Clocks,
    Options,
    Report,
    Spread,
    Table,
    Times,
    at_most,
    difference,
    interleave,
    ratio,
    spread,
    verdict,
)
from runtime.bundle import Bundle
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import BundleError, EngineError

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements" / "device.txt"

START_BAR, IMPORT_BAR = 1.3, 1.3
"""Times the bare script's, and times the imports that it needs."""
DEPENDENCIES_BAR = 6
WRAPPER_BAR = 10.0
"""Microseconds."""

OURS, BARE = "`Classifier.open`, first answer", "bare script"

OURS_CODE = """
import sys
from runtime import Classifier
answer = Classifier.open(sys.argv[1])(sys.argv[2])
print(answer.label)
"""

BARE_CODE = """
import sys
import numpy as np
import onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
_, height, width, channels = session.get_inputs()[0].shape
with Image.open(sys.argv[2]) as picture:
    picture = picture.convert("L" if channels == 1 else "RGB").resize((width, height))
image = np.asarray(picture, np.uint8).reshape(1, height, width, channels)
print(session.run(["logits"], {"image": image})[0].argmax())
"""

CHOSEN_CODE = """
import json, sys
from runtime import Classifier
engine = Classifier.open(sys.argv[1]).engine
facts = {"engine": str(engine), "name": engine.name, "form": engine.form}
print(json.dumps({**facts, "provider": engine.provider}))
"""

_IMPORT = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import {modules}
print(time.process_time() - cpu, time.perf_counter() - wall)
"""

RUNTIME, PEERS = "runtime", "onnxruntime, numpy, PIL"
BOTH = "runtime, onnxruntime"
"""What the first session makes of ``RUNTIME``: it loads onnxruntime only then."""


class Environment(NamedTuple):
    """An interpreter with fieldfit, and where it came from."""

    python: str
    what: str
    packages: Mapping[str, int] | None
    """Installed bytes by package; None in an environment that is not a device's."""


class Part(NamedTuple):
    """One table, its figures unrounded, and the bars that it is held to."""

    table: Table
    figures: object
    bars: tuple[Bar, ...]


def run_code(python: str, code: str, *arguments: object) -> str:
    """What ``code`` prints in a process of its own.

    Raises EngineError with the last line of its complaint if it fails.
    """
    done = subprocess.run(
        # Isolated: the folder of this source must not stand in for what is installed.
        [python, "-I", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise EngineError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return done.stdout


def measure(options: Options) -> Report:
    """Measure the bundle of ``options``, and an installation made for the purpose.

    Raises BundleError if there is no bundle.
    """
    if not options.bundle.exists():
        raise BundleError(f"{options.bundle}: no bundle there; run make train export first")
    seconds = 0.0 if options.quick else 40.0
    with tempfile.TemporaryDirectory() as folder, cache(Path(folder) / "cache"):
        environment = here() if options.quick else _device_environment(Path(folder))
        parts = {
            "start": _start(options.bundle, environment, Path(folder), seconds),
            "imports": _imports(environment, seconds / 2),
            "install": _install(environment),
            "wrapper": _wrapper(seconds / 8),
        }
    return Report(
        title="What a device pays for fieldfit",
        tables=tuple(part.table for part in parts.values()),
        figures={name: part.figures for name, part in parts.items()},
        bars=tuple(bar for part in parts.values() for bar in part.bars),
    )


def here() -> Environment:
    """The interpreter that runs this."""
    return Environment(sys.executable, "the workstation's environment", None)


def starts(
    processes: Mapping[str, Callable[[], object]], seconds: float, *, least: int = 10
) -> dict[str, Times]:
    """Whole processes in turn; CPU time is that of all their threads."""
    return interleave(processes, seconds=seconds, least=least, warmup=1, clocks=CHILDREN)


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


CHILDREN = Clocks(cpu=_children_cpu, wall=time.perf_counter)
"""CPU time of processes that have ended."""


def start_table(
    times: Mapping[str, Times], bare: str, title: str, *notes: str
) -> tuple[Table, dict[str, dict[str, Spread]]]:
    """How long until the first answer, and whether the bar holds by both clocks."""
    figures = {
        name: {
            "wall_ms": spread(taken.wall, scale=1e3),
            "cpu_ms": spread(taken.cpu, scale=1e3),
            "wall_ratio": ratio(taken.wall, times[bare].wall),
            "cpu_ratio": ratio(taken.cpu, times[bare].cpu),
        }
        for name, taken in times.items()
    }
    holds = all(
        max(values["wall_ratio"].median, values["cpu_ratio"].median) <= START_BAR
        for name, values in figures.items()
        if name != bare
    )
    table = Table(
        title=title,
        columns=("process", "wall ms", "CPU ms", "wall, against bare", "CPU, against bare"),
        rows=tuple((name, *map(str, values.values())) for name, values in figures.items()),
        notes=(
            f"Whole processes, {len(times[bare].wall)} rounds in turn. The bar of {START_BAR:g} by "
            f"wall and by CPU time: {verdict(holds)}.",
            *notes,
        ),
    )
    return table, figures


def _start(bundle: Path, environment: Environment, folder: Path, seconds: float) -> Part:
    image = folder / "image.png"
    write_sample(bundle, image)
    # The first opening builds and measures whatever there is to be kept; from then on it is known.
    chosen = json.loads(run_code(environment.python, CHOSEN_CODE, bundle.resolve()))
    if chosen["provider"] != "cpu":
        raise EngineError(f"expected a CPU engine, got {chosen['engine']}; run the gpu benchmark")
    model = folder / "model.onnx"
    model.write_bytes(Bundle.open(bundle).model(chosen["form"]))
    run = functools.partial(functools.partial, run_code, environment.python)
    processes = {
        OURS: run(OURS_CODE, bundle.resolve(), image),
        BARE: run(BARE_CODE, model, image),
    }
    table, figures = start_table(
        starts(processes, seconds), BARE, f"Second start, first answer: {chosen['engine']}",
        f"The bare script decodes and resizes the same image with PIL and runs the same "
        f"{chosen['form']} file once with onnxruntime's defaults: it checks no digest and replays "
        f"no golden sample. Both in {environment.what}.",
    )  # fmt: skip
    ours = figures[OURS]
    bars = tuple(
        at_most(f"second start to first answer against a bare script, {clock}",
                ours[f"{clock}_ratio"], START_BAR, " times")
        for clock in ("wall", "cpu")
    )  # fmt: skip
    return Part(table, {"engine": chosen, "processes": figures}, bars)


def write_sample(bundle: Path, target: Path) -> None:
    """An encoded image at ``target``: a sample beside the bundle, else its first golden one."""
    from PIL import Image

    samples = sorted((bundle.parent / "samples").glob("*.png"))
    if samples:
        target.write_bytes(samples[0].read_bytes())
    else:
        Image.fromarray(Bundle.open(bundle).golden()["images"][0].squeeze()).save(target)


def _imports(environment: Environment, seconds: float) -> Part:
    """Of the import statement alone: the interpreter's own start would flatter the ratio."""
    taken: dict[str, Times] = {name: Times() for name in (RUNTIME, BOTH, PEERS)}

    def timed(name: str) -> Callable[[], None]:
        code = _IMPORT.format(modules=name)

        def call() -> None:
            cpu, wall = map(float, run_code(environment.python, code).split())
            taken[name].cpu.append(cpu)
            taken[name].wall.append(wall)

        return call

    calls = {name: timed(name) for name in taken}
    interleave(calls, seconds=0.0, least=1, warmup=0)  # compiles modules, fills the disk cache
    taken.update({name: Times(cpu=[], wall=[]) for name in taken})
    interleave(calls, seconds=seconds, least=10, warmup=0)
    measured = {
        name: {
            "cpu_ms": spread(times.cpu, scale=1e3),
            "cpu_ratio": ratio(times.cpu, taken[PEERS].cpu),
            "wall_ratio": ratio(times.wall, taken[PEERS].wall),
        }
        for name, times in taken.items()
    }
    rows = [(f"`import {name}`", *map(str, spreads.values())) for name, spreads in measured.items()]
    ours = measured[RUNTIME]
    holds = max(ours["cpu_ratio"].median, ours["wall_ratio"].median) <= IMPORT_BAR
    table = Table(
        title="Imports, in fresh processes",
        columns=(
            "statement",
            "CPU ms",
            "CPU, against the libraries",
            "wall, against the libraries",
        ),
        rows=tuple(rows),
        notes=(
            f"The bar of {IMPORT_BAR:g} for `import {RUNTIME}` by wall and by CPU time: "
            f"{verdict(holds)}. onnxruntime is imported with the first session.",
        ),
    )
    bars = tuple(
        at_most(f"import {RUNTIME} against {PEERS}, {clock}", ours[f"{clock}_ratio"],
                IMPORT_BAR, " times")
        for clock in ("wall", "cpu")
    )  # fmt: skip
    return Part(table, measured, bars)


def _install(environment: Environment) -> Part:
    direct = direct_dependencies((ROOT / "pyproject.toml").read_text())
    sizes = environment.packages
    rows = [
        ("direct dependencies", str(len(direct)), ", ".join(direct)),
        ("packages in all", str(len(sizes)) if sizes else "", ", ".join(sizes or ())),
        ("megabytes on disk", f"{sum(sizes.values()) / 1e6:.0f}" if sizes else "", _largest(sizes)),
    ]
    holds = len(direct) <= DEPENDENCIES_BAR
    table = Table(
        title="The base install",
        columns=("what", "figure", "which"),
        rows=tuple(rows),
        notes=(
            f"The bar of at most {DEPENDENCIES_BAR} direct dependencies: {verdict(holds)}.",
            f"Measured in {environment.what}." if sizes else f"No sizes: {environment.what}.",
        ),
    )
    bar = at_most("direct dependencies of the base install", len(direct), DEPENDENCIES_BAR)
    return Part(table, {"direct": direct, "bytes": dict(sizes) if sizes else None}, (bar,))


def direct_dependencies(pyproject: str) -> list[str]:
    """Names of what the base install asks for, extras not counted."""
    requirements = tomllib.loads(pyproject)["project"]["dependencies"]
    return [requirement.partition(">")[0].strip() for requirement in requirements]


def _largest(sizes: Mapping[str, int] | None) -> str:
    largest = sorted((sizes or {}).items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} {size / 1e6:.0f}" for name, size in largest)


def _device_environment(folder: Path) -> Environment:
    """A fresh environment with the pinned device packages and the wheel, as a device has it."""
    python = folder / "device" / "bin" / "python"
    uv, into = [sys.executable, "-m", "uv"], ["--quiet", "--python", str(python)]
    steps = [
        [*uv, "venv", "--quiet", "--python", sys.executable, str(folder / "device")],
        [
            sys.executable, "-m", "build", "--wheel", "--no-isolation",
            "--outdir", str(folder), str(ROOT),
        ],
        [*uv, "pip", "install", *into, "--compile-bytecode", "--require-hashes", "-r", str(LOCK)],
    ]  # fmt: skip
    try:
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, text=True)
        (wheel,) = folder.glob("*.whl")
        install = [*uv, "pip", "install", *into, "--compile-bytecode", "--no-deps", str(wheel)]
        subprocess.run(install, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [str(error)])[-1]
        return here()._replace(
            what=f"the workstation's environment, for a device's could not be made: {reason}"
        )
    (site,) = (folder / "device" / "lib").glob("python*/site-packages")
    what = "a fresh environment of `requirements/device.txt` and the wheel"
    return Environment(str(python), what, installed_bytes(site))


def installed_bytes(site: Path) -> dict[str, int]:
    """Bytes of each distribution in the folder ``site``, compiled modules among them."""
    return {
        distribution.metadata["Name"]: sum(
            path.stat().st_size
            for file in distribution.files or ()
            if (path := Path(str(distribution.locate_file(file)))).is_file()
        )
        for distribution in sorted(
            importlib.metadata.distributions(path=[str(site)]), key=lambda d: d.metadata["Name"]
        )
    }


def _wrapper(seconds: float) -> Part:
    engine = OnnxRuntimeEngine(identity(), form="fp32", threads=1)
    image = np.zeros((1, *engine.shape), np.uint8)
    # The engine's own session, so that nothing but the wrapper differs.
    bare = functools.partial(engine._session.run, ["logits", "features"], {"image": image})
    calls = {"`session.run`": bare, "`Engine.infer`": functools.partial(engine.infer, image)}
    # One call is too short for the clock.
    times = interleave(calls, seconds=seconds, settle=2, calls=100)
    figures = {name: spread(taken.cpu, scale=1e6) for name, taken in times.items()}
    added = difference(times["`Engine.infer`"].cpu, times["`session.run`"].cpu, scale=1e6)
    figures["difference"] = added
    table = Table(
        title="What `Engine.infer` adds to `session.run`, batch 1, on a model that does nothing",
        columns=("call", "CPU µs"),
        rows=tuple((name, str(value)) for name, value in figures.items()),
        notes=(
            f"The bar of {WRAPPER_BAR:g} µs more: {verdict(added.median <= WRAPPER_BAR)}. Blocks "
            "of 100 calls in turn.",
        ),
    )
    bar = at_most("what Engine.infer adds to session.run, CPU", added, WRAPPER_BAR, " µs")
    return Part(table, figures, (bar,))


def identity() -> bytes:
    """The smallest graph that keeps the contract: the bytes themselves are features and logits."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["levels"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["levels"], ["features"]),
            helper.make_node("Identity", ["features"], ["logits"]),
        ],
        "identity",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, 2, 1])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2])
            for name in ("logits", "features")
        ],
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


@contextlib.contextmanager
def cache(folder: Path) -> Iterator[None]:
    """While entered, what the device keeps goes to ``folder`` and not to this user's own cache."""
    before = os.environ.get("FIELDFIT_CACHE")
    os.environ["FIELDFIT_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["FIELDFIT_CACHE"]
        else:
            os.environ["FIELDFIT_CACHE"] = before
