"""A fresh process until its first answer, and the most memory it took: ours and its peers'.

Whole processes in turn, in this environment, their files in the disk's cache. Whether fieldfit's
second start meets its bar on a device's own installation is another benchmark's matter (device).
"""

import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

from benchmarks import device, peers
from benchmarks.end_to_end import for_ultralytics
from benchmarks.harness import Options, Report, Spread, Table, Times, ratio, spread
from runtime.bundle import Bundle
from runtime.errors import BundleError

FIRST, SECOND = "fieldfit, with an empty cache", "fieldfit, from the second start on"
BARE, BARE_FLOAT = "onnxruntime in a bare script, int8-cpu", "onnxruntime in a bare script, fp32"
TORCH, ULTRALYTICS = "torch, eager, in a bare script", "Ultralytics' predict, fp32"

FIRST_CODE = f"import os, sys\nos.environ['FIELDFIT_CACHE'] = sys.argv[3]\n{device.OURS_CODE}"

TORCH_CODE = """
import sys
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
_, path, file, architecture, height, width, channels, mean, std = sys.argv
tensors = load_file(path)
weights = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
backbone = timm.create_model(architecture, num_classes=0, in_chans=int(channels)).eval()
backbone.load_state_dict(weights, strict=False)
with Image.open(file) as picture:
    picture = picture.convert("L" if channels == "1" else "RGB").resize((int(width), int(height)))
image = torch.from_numpy(np.array(picture)).reshape(1, int(height), int(width), int(channels))
with torch.inference_mode():
    features = backbone((image.permute(0, 3, 1, 2).float() - float(mean)) / float(std))
    print((features @ weights["head.weight"].T + weights["head.bias"]).argmax())
"""

ULTRALYTICS_CODE = """
import os, sys
os.environ.update(YOLO_AUTOINSTALL="false", YOLO_OFFLINE="true")
from ultralytics import YOLO
result = YOLO(sys.argv[1], task="classify").predict(sys.argv[2], imgsz=int(sys.argv[3]),
                                                    verbose=False)
print(result[0].probs.top1)
"""

# Not getrusage: its maximum begins with what the parent used when it made this process.
PEAK_CODE = """
import re
with open("/proc/self/status") as status:
    print(int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) * 1024 / 1e6)
"""


def measure(options: Options) -> Report:
    """Start every candidate that is installed, again and again.

    Raises BundleError if there is no bundle.
    """
    if not options.bundle.exists():
        raise BundleError(f"{options.bundle}: no bundle there; run make train export first")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with device.cache(folder / "cache"):
            made, missing = candidates(options.bundle.resolve(), folder)
            peaks: dict[str, list[float]] = {name: [] for name in made}
            calls = {
                name: functools.partial(_start, call, peaks[name]) for name, call in made.items()
            }
            quick = options.quick
            times = device.starts(calls, 0.0 if quick else 120.0, least=1 if quick else 10)
    return report(times, peaks, missing)


def candidates(bundle: Path, folder: Path) -> tuple[dict[str, Callable[[], str]], dict[str, str]]:
    """What starts a process and returns what it printed, by name; and why others are missing."""
    opened, image = Bundle.open(bundle), folder / "image.png"
    device.write_sample(bundle, image)
    spec = opened.manifest.input
    models = {form: folder / f"{form}.onnx" for form in ("fp32", "int8-cpu")}
    for form, path in models.items():
        path.write_bytes(opened.model(form))
    numbers = itertools.count()
    here = functools.partial(functools.partial, _code, sys.executable)
    made: dict[str, Callable[[], str]] = {
        SECOND: here(device.OURS_CODE, bundle, image),
        FIRST: lambda: _code(sys.executable, FIRST_CODE, bundle, image,
                             folder / f"cache-{next(numbers)}"),
        BARE: here(device.BARE_CODE, models["int8-cpu"], image),
        BARE_FLOAT: here(device.BARE_CODE, models["fp32"], image),
    }  # fmt: skip
    missing = {}
    checkpoint = bundle.parent / "train" / "checkpoint.safetensors"
    if checkpoint.exists():
        from train.checkpoint import read_checkpoint

        _, facts = read_checkpoint(checkpoint)
        made[TORCH] = here(
            TORCH_CODE,
            checkpoint,
            image,
            facts.model.architecture,
            *spec.shape,
            spec.mean,
            spec.std,
        )
    else:
        missing[TORCH] = "no checkpoint lies beside the bundle"
    python = peers.python_with("ultralytics")
    if python is not None:
        peer = folder / "peer.onnx"
        onnx.save(for_ultralytics(onnx.load(models["fp32"]), opened.manifest), peer)
        made[ULTRALYTICS] = functools.partial(
            _code, python, ULTRALYTICS_CODE, peer, image, spec.shape[0]
        )
    else:
        missing[ULTRALYTICS] = f"ultralytics is not installed: {peers.WAY_OUT}"
    return made, missing


def _code(python: str, code: str, *arguments: object) -> str:
    return device.run_code(python, code + PEAK_CODE, *arguments)


def _start(call: Callable[[], str], peaks: list[float]) -> None:
    peaks.append(float(call().split()[-1]))


def report(
    times: Mapping[str, Times], peaks: Mapping[str, list[float]], missing: Mapping[str, str]
) -> Report:
    """One row for each candidate; one that could not be started says why."""
    figures: dict[str, dict[str, Spread]] = {
        name: {
            "wall_ms": spread(taken.wall, scale=1e3),
            "cpu_ms": spread(taken.cpu, scale=1e3),
            "wall_ratio": ratio(taken.wall, times[SECOND].wall),
            "peak_mb": spread(peaks[name]),
        }
        for name, taken in times.items()
    }
    rows = [(name, *map(str, values.values())) for name, values in figures.items()]
    rows += [(f"{name}: not measured, {reason}", *[""] * 4) for name, reason in missing.items()]
    table = Table(
        title="A fresh process, until its first answer",
        columns=("process", "wall ms", "CPU ms", "times fieldfit's, wall", "peak memory, MB"),
        rows=tuple(rows),
        notes=(
            f"Medians (10th to 90th percentile) of {len(times[SECOND].wall)} rounds in turn. From "
            "the start of Python to the printed answer for one image file; memory is the most "
            "that the process held at once (VmHWM). fieldfit verifies the bundle and replays its "
            "golden samples in that time, the others check nothing. With an empty cache it also "
            "finds out which engine is fastest here.",
            f"Versions: {peers.versions('onnxruntime', 'torch', 'timm', 'ultralytics')}.",
        ),
    )
    return Report(title="Cold start", tables=(table,), figures={"processes": figures})
