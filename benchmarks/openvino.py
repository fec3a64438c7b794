"""OpenVINO against onnxruntime on the CPU: speed of each form, answers, and what opening costs.

It runs where OpenVINO is, here or in the peers' environment. Both run behind the seam of the
runtime's engines; what came of it is weighed in docs/decisions/0009-no-openvino.md.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks import peers
from benchmarks.harness import Options, Report, Spread, Table, interleave, ratio, spread
from benchmarks.openvino_engine import OpenVinoEngine
from runtime.bundle import Bundle
from runtime.engines.engine import Engine
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import BundleError, EngineError
from runtime.selftest import replay

UInt8 = npt.NDArray[np.uint8]

LONG = True
FORMS = ("fp32", "int8-cpu", "int8")
BATCHES = (1, 16)
THREADS = (1, 2)
SETTLE = 2
"""Calls until the caches hold this model again and not the other one."""
BASE = "onnxruntime, int8-cpu"

_OPEN = r"""
import json, re, sys, time
import numpy as np
from pathlib import Path
def peak():  # of this program alone: getrusage counts what started it
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
start = time.perf_counter()
{blocked}import {library}
imported = time.perf_counter()
from {module} import {name}
opening = time.perf_counter()
engine = {name}(Path(sys.argv[1]).read_bytes(), form="int8-cpu", threads=1)
engine.infer(np.zeros((1, *engine.shape), np.uint8))
opened = time.perf_counter()
print(json.dumps([imported - start, opened - opening, peak() - before]))
"""


def measure(options: Options) -> Report:
    """Time the bundle of ``options``.

    Raises BundleError if there is none, EngineError if OpenVINO is not installed.
    """
    if not options.bundle.exists():
        raise BundleError(f"{options.bundle}: no bundle there; run make train export first")
    python = peers.python_with("openvino")
    if python is None:
        raise EngineError(f"openvino is not installed: {peers.WAY_OUT}")
    return _measure(options) if python == sys.executable else _elsewhere(python, options)


def _elsewhere(python: str, options: Options) -> Report:
    """Have the Python of another environment measure the same."""
    quick = ["--quick"] if options.quick else []
    done = subprocess.run(
        [python, "-m", "benchmarks.openvino", str(options.bundle), *quick],
        stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONPATH": str(peers.ROOT)},
    )  # fmt: skip
    return msgspec.json.decode(done.stdout, type=Report)


def _measure(options: Options) -> Report:
    bundle = Bundle.open(options.bundle)
    seconds = 1.0 if options.quick else 20.0
    speeds, timings = _speeds(bundle, seconds)
    answers, version = _answers(bundle)
    opening, costs = _opening(options.bundle, rounds=1 if options.quick else 10)
    model = f"{bundle.manifest.name} {bundle.manifest.version}"
    return Report(
        title=f"OpenVINO {version} and onnxruntime on {model}",
        tables=(*speeds, answers, opening),
        figures={"speeds": timings, "opening": costs},
    )


def _engines(bundle: Bundle, threads: int) -> dict[str, Engine]:
    forms = [form for form in FORMS if bundle.manifest.artifact(form)]
    engines: dict[str, Engine] = {}
    for kind in (OnnxRuntimeEngine, OpenVinoEngine):
        for form in forms:
            engine = kind(bundle.model(form), form=form, threads=threads)
            engines[f"{engine.name}, {form}"] = engine
    return engines


def _speeds(bundle: Bundle, seconds: float) -> tuple[list[Table], list[object]]:
    golden: UInt8 = bundle.golden()["images"]
    tables, figures = [], list[object]()
    for threads in THREADS:
        engines = _engines(bundle, threads)
        for batch in BATCHES:
            images = np.resize(golden, (batch, *golden.shape[1:]))
            calls = {name: functools.partial(e.infer, images) for name, e in engines.items()}
            times = interleave(calls, seconds=seconds, settle=SETTLE, calls=6)
            rows = []
            for name, taken in times.items():
                figure = {
                    "cpu": ratio(times[BASE].cpu, taken.cpu),
                    "wall": ratio(times[BASE].wall, taken.wall),
                    "wall_ms": spread(taken.wall, scale=1e3),
                }
                rows.append((name, *map(str, figure.values())))
                figures.append({"name": name, "threads": threads, "batch": batch, **figure})
            tables.append(
                Table(
                    title=f"Speed relative to {BASE}: batch {batch}, threads {threads}",
                    columns=("engine and form", "by CPU time", "by wall time", "wall ms"),
                    rows=tuple(rows),
                )
            )
    return tables, figures


def _answers(bundle: Bundle) -> tuple[Table, str]:
    golden, engines = bundle.golden(), _engines(bundle, threads=1)
    rows = [(name, replay(engine, golden).reason) for name, engine in engines.items()]
    (version,) = {engine.version for engine in engines.values() if engine.name == "openvino"}
    table = Table(
        title="Golden samples, whose logits onnxruntime gave when the bundle was made",
        columns=("engine and form", "self-test"),
        rows=tuple(rows),
    )
    return table, version


def _opening(path: Path, rounds: int) -> tuple[Table, object]:
    """Each in a process of its own, in turn."""
    engines = {
        "onnxruntime": _OPEN.format(
            library="onnxruntime",
            module="runtime.engines.onnxruntime_engine",
            name="OnnxRuntimeEngine",
            blocked="",
        ),
        "openvino": _OPEN.format(
            library="openvino",
            module="benchmarks.openvino_engine",
            name="OpenVinoEngine",
            blocked="sys.modules['openvino_telemetry'] = None\n",
        ),
    }
    model = path / "int8-cpu.onnx"
    taken: dict[str, list[list[float]]] = {library: [] for library in engines}
    for _ in range(rounds):
        for library, code in engines.items():
            done = subprocess.run(
                [sys.executable, "-c", code, str(model)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            taken[library].append(json.loads(done.stdout))
    costs: dict[str, list[Spread]] = {
        library: [spread(column) for column in zip(*values, strict=True)]
        for library, values in taken.items()
    }
    table = Table(
        title="What opening int8-cpu costs, up to the first answer",
        columns=("engine", "import, s", "open, s", "memory, MB"),
        rows=tuple((library, *map(str, spreads)) for library, spreads in costs.items()),
    )
    return table, costs


if __name__ == "__main__":
    bundle, *rest = sys.argv[1:]
    report = _measure(Options(bundle=Path(bundle), quick="--quick" in rest))
    sys.stdout.buffer.write(msgspec.json.encode(report))
