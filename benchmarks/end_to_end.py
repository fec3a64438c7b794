"""From an image file to a verdict on one core, beside Ultralytics' predict with the same weights.

Each candidate is a process of its own, pinned to the same core; they take turns. Ultralytics lives
in an environment of its own, whose Python is $FIELDFIT_PEERS or build/peers/bin/python.
"""

import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks import peers
from benchmarks.harness import (
    Bar,
    Options,
    Report,
    Spread,
    Table,
    at_least,
    interleave,
    ratio,
    spread,
)
from runtime import Bundle
from runtime.engines.engine import logits_of
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import DataError
from runtime.manifest import Manifest
from runtime.metrics import agreement, sqnr_db
from runtime.preprocess import preprocess, preprocess_batch

SCRIPT = Path(__file__).with_name("peer_predict.py")
FILES = 64
ROUNDS, QUICK_ROUNDS = 15, 2
ASKED = {"one": 2.4, "stream": 3.2}
"""Times faster than Ultralytics, at least."""


class Candidate:
    """One process that classifies on request."""

    def __init__(self, name: str, python: str, model: Path, files: list[str]) -> None:
        command = [python, str(SCRIPT), name, str(model)]
        self._ended = f"{name} ended; see why with: {' '.join(command)}"
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent),
                 "YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"},
            preexec_fn=_pin,
        )  # fmt: skip
        self._say(json.dumps(files))

    def ask(self, how: str) -> dict[str, Any]:
        """One turn: CPU and wall seconds, and the answers."""
        self._say(how)
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise DataError(self._ended)
        turn: dict[str, Any] = json.loads(line)
        return turn

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _say(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def _pin() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def measure(options: Options) -> Report:
    """Turns of 64 files each."""
    python = peers.python_with("ultralytics")
    if python is None:
        raise DataError("expected Ultralytics beside fieldfit, got none; run: make bench-peers")
    bundle = Bundle.open(options.bundle)
    with tempfile.TemporaryDirectory() as folder:
        files = _files()
        peer = Path(folder) / "peer.onnx"
        graph = onnx.load_model_from_string(bundle.model("fp32"))
        onnx.save(for_ultralytics(graph, bundle.manifest), peer)
        candidates = {
            "fieldfit": Candidate("fieldfit", sys.executable, options.bundle.resolve(), files),
            "fieldfit, fp32": Candidate(
                "fieldfit-fp32", sys.executable, options.bundle.resolve(), files
            ),
            "Ultralytics": Candidate("ultralytics", python, peer, files),
        }
        rounds = QUICK_ROUNDS if options.quick else ROUNDS
        turns = {how: _take_turns(candidates, how, rounds) for how in ASKED}
        for candidate in candidates.values():
            candidate.close()
    report = _report(turns, bundle.manifest)
    table, figures = _camera_pictures(bundle, 8 if options.quick else 200)
    return msgspec.structs.replace(
        report, tables=(*report.tables, table), figures=report.figures | figures
    )


def _files(count: int = FILES) -> list[str]:
    """PNG files of 300x300 pixels, as the camera left them."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("expected the sample images; run: pip install elpv-dataset")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("cell*.png"))
    return [str(file) for file in found[:: len(found) // count][:count]]


def for_ultralytics(model: onnx.ModelProto, manifest: Manifest) -> onnx.ModelProto:
    """The same weights behind the input that Ultralytics feeds: float RGB, 0 to 1, NCHW.

    What its exporter writes into the file's metadata is in ``ultralytics/engine/exporter.py``.
    """
    height, width, channels = manifest.input.shape
    (cast, transpose), rest = list(model.graph.node)[:2], list(model.graph.node)[2:]
    if (cast.op_type, transpose.op_type) != ("Cast", "Transpose"):
        raise DataError(f"expected a graph that begins with Cast and Transpose, got {cast.op_type}")
    first = [
        helper.make_node("Slice", ["images", "from", "to", "axis"], ["planes"]),
        helper.make_node("Mul", ["planes", "levels"], [transpose.output[0]]),
    ]
    constants = {"from": [0], "to": [channels], "axis": [1]}
    model.graph.initializer.extend(
        [
            *(numpy_helper.from_array(np.array(v, np.int64), n) for n, v in constants.items()),
            numpy_helper.from_array(np.array(255, np.float32), "levels"),
        ]
    )
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend([*first, *rest])
    shape: list[str | int | None] = ["batch", 3, height, width]
    model.graph.input.append(helper.make_tensor_value_info("images", TensorProto.FLOAT, shape))
    logits = next(output for output in model.graph.output if output.name == "logits")
    del model.graph.output[:]
    model.graph.output.append(logits)
    del model.metadata_props[:]
    facts = {
        "task": "classify", "stride": 1, "batch": 1, "imgsz": [height, width], "channels": 3,
        "names": dict(enumerate(manifest.labels)), "args": {"dynamic": True, "batch": 1},
    }  # fmt: skip
    helper.set_model_props(model, {name: str(value) for name, value in facts.items()})
    onnx.checker.check_model(model)
    return model


Turns = dict[str, list[dict[str, Any]]]


def _take_turns(candidates: dict[str, Candidate], how: str, rounds: int) -> Turns:
    for candidate in candidates.values():
        candidate.ask(how)
    turns: Turns = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            turns[name].append(candidate.ask(how))
    return turns


def _report(turns: dict[str, Turns], manifest: Manifest) -> Report:
    rows, figures, bars = [], dict[str, Any](), list[Bar]()
    for how, by_name in turns.items():
        wall = {name: [turn["wall"] for turn in taken] for name, taken in by_name.items()}
        cpu = {name: [turn["cpu"] for turn in taken] for name, taken in by_name.items()}
        peer = by_name["Ultralytics"][0]["answers"]
        for name, taken in by_name.items():
            per_second: Spread = spread(FILES / seconds for seconds in wall[name])
            faster = {
                "wall": ratio(wall["Ultralytics"], wall[name]),
                "cpu": ratio(cpu["Ultralytics"], cpu[name]),
            }
            same = float(np.mean(np.equal(taken[0]["answers"], peer)))
            asked = f"{ASKED[how]}" if name == "fieldfit" else ""
            rows.append(
                (f"{name}, {_WORDS[how]}", str(per_second), str(faster["wall"]),
                 str(faster["cpu"]), asked, f"{same:.0%}")
            )  # fmt: skip
            figures[f"{name} {how}"] = {
                "images_per_second": per_second, "times_faster": faster, "same_answers": same,
                "asked": ASKED[how],
            }  # fmt: skip
            if name == "fieldfit":
                what = f"PNG file to verdict against Ultralytics, {_WORDS[how]}, wall"
                bars.append(at_least(what, faster["wall"], ASKED[how], " times"))
    size = "x".join(map(str, manifest.input.size))
    return Report(
        title="From a file to a verdict",
        tables=(
            Table(
                title=f"300x300 PNG files, one core; the model takes {size}",
                columns=("candidate", "images per second", "times faster, wall",
                         "times faster, CPU", "asked", "same answers"),
                rows=tuple(rows),
                notes=(
                    "Decoding, resizing, the network and what is made of its output. *fieldfit* "
                    "runs int8-cpu, Ultralytics the same weights in float32 on the same "
                    "onnxruntime; *fp32* is fieldfit with those. Ultralytics resizes and crops in "
                    "its own way, so some answers differ. A stream is in batches of 16.",
                ),
            ),
        ),
        figures=figures,
        bars=tuple(bars),
    )  # fmt: skip


def _camera_pictures(bundle: Bundle, count: int) -> tuple[Table, dict[str, Any]]:
    """What decoding and resizing of a 1080p JPEG costs, exactly and scaled, and changes."""
    exact = msgspec.structs.replace(bundle.manifest.input, scaled_jpeg=False)
    scaled = msgspec.structs.replace(exact, scaled_jpeg=True)
    rng = np.random.default_rng(0)
    files = _files(count)
    pictures = [_enlarged(file, rng) for file in files]
    some = itertools.cycle(pictures)
    times = interleave(
        {
            "exact": lambda: preprocess(next(some), exact),
            "scaled": lambda: preprocess(next(some), scaled),
        },
        seconds=len(pictures) / 10,
    )
    with OnnxRuntimeEngine(bundle.model("fp32"), form="fp32", threads=1) as engine:
        logits = [logits_of(engine, preprocess_batch(pictures, spec)) for spec in (exact, scaled)]
    faster = ratio(times["exact"].cpu, times["scaled"].cpu)
    same, sqnr = agreement(*logits), sqnr_db(*logits)
    kilobytes = sum(map(len, pictures)) / len(pictures) / 1000
    rows = tuple(
        (name, str(spread(times[name].cpu, scale=1e3)), *more)
        for name, *more in (
            ("exact", "1.00", "", ""),
            ("scaled", str(faster), f"{same:.1%}", f"{sqnr:.1f}"),
        )
    )
    figures = {"camera": {"times_cheaper": faster, "agreement": same, "sqnr_db": sqnr}}
    table = Table(
        title="Decoding and resizing a JPEG of 1920x1080",
        columns=("way", "ms of CPU", "times cheaper", "same answers", "logits' SQNR, dB"),
        rows=rows,
        notes=(
            f"{len(files)} cells enlarged to 1920x1080 with sensor noise, {kilobytes:.0f} kB each. "
            "*Scaled* is `[input] scaled_jpeg`. Asked: 3 times cheaper with 99.5 % of the answers "
            "the same, or else the exact way stays the default.",
        ),
    )
    return table, figures


def _enlarged(file: str, rng: np.random.Generator) -> bytes:
    with Image.open(file) as picture:
        large = picture.convert("L").resize((1920, 1080), Image.Resampling.BICUBIC)
    levels = np.asarray(large) + rng.normal(0, 2, (1080, 1920)).astype(np.float32)
    stream = io.BytesIO()
    noisy = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    noisy.convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()


_WORDS = {"one": "one at a time", "stream": "a stream of files"}
