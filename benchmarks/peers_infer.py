"""One candidate of ``inference`` in a process and, if need be, an environment of its own.

    python -m benchmarks.peers_infer CANDIDATE JOB

``JOB`` is JSON: files that the candidate needs. Each line of stdin asks for a turn (threads, batch,
settle, calls), which is answered with seconds, or for all logits (``answers``, a file). It imports
nothing of fieldfit unless it is fieldfit or runs its checkpoint.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

Predict = Callable[[UInt8], Floats]
"""Images ``[N, H, W, C]`` to logits ``[N, K]``."""
Maker = Callable[[int], Predict]
"""Of so many threads."""
Job = dict[str, Any]

BATCH = 16


class NotHereError(Exception):
    """Why this candidate cannot run here."""


def fieldfit(job: Job) -> Maker:
    """The engine that fieldfit runs on a CPU."""
    from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

    def make(threads: int) -> Predict:
        model = Path(job["model"]).read_bytes()
        engine = OnnxRuntimeEngine(model, form=job["form"], threads=threads)
        return lambda images: engine.infer(images).logits

    return make


def onnxruntime(job: Job) -> Maker:
    """A session as its manual has it, https://onnxruntime.ai/docs/get-started/with-python.html."""
    import onnxruntime

    def make(threads: int) -> Predict:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            job["model"], options, providers=["CPUExecutionProvider"]
        )
        return lambda images: session.run(["logits"], {"image": images})[0]

    return make


def torch(job: Job, way: str = "eager") -> Maker:
    """The checkpoint itself: eager, with channels last, or compiled."""
    import torch

    from train.checkpoint import read_checkpoint

    model, _ = read_checkpoint(Path(job["checkpoint"]))
    layout = torch.channels_last if way == "channels last" else torch.contiguous_format
    model = model.to(memory_format=layout)
    mean, std = -model.shift / model.scale, 1 / model.scale

    def forward(images: "torch.Tensor") -> "torch.Tensor":
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        logits: torch.Tensor = model.head(model.backbone((pixels - mean) / std))
        return logits

    if way == "compile":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise NotHereError(f"torch.compile needs a C++ compiler, and there is no {compiler}")
        # Folds batch norms and packs weights, which is the option for inference.
        inductor: Any = import_module("torch._inductor.config")
        inductor.freezing = True
        forward = torch.compile(forward, dynamic=False)

    def make(threads: int) -> Predict:
        def predict(images: UInt8) -> Floats:
            torch.set_num_threads(threads)
            with torch.no_grad():
                logits: Floats = forward(torch.from_numpy(images)).numpy()
            return logits

        return predict

    return make


def openvino(job: Job, settings: dict[str, str] | None = None) -> Maker:
    """OpenVINO's CPU plugin with its defaults, but for the number of threads."""
    # Its import reports to an analytics service, and asks nobody.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    core = openvino.Core()
    return _openvino(core, core.read_model(job["model"]), settings or {})


def nncf(job: Job) -> Maker:
    """NNCF's post-training quantization on OpenVINO, https://docs.openvino.ai."""
    nncf: Any = import_module("nncf")
    import openvino

    core = openvino.Core()
    images = np.load(job["calibration"], allow_pickle=False)
    quantized = nncf.quantize(
        core.read_model(job["model"]),
        nncf.Dataset([image[None] for image in images]),
        subset_size=len(images),
        ignored_scope=nncf.IgnoredScope(names=job["before"], validate=False),
    )
    return _openvino(core, quantized, FLOAT32)


FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def _openvino(core: Any, model: Any, settings: dict[str, str]) -> Maker:
    def make(threads: int) -> Predict:
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                **settings,
            },
        )
        request = compiled.create_infer_request()

        def predict(images: UInt8) -> Floats:
            request.infer({"image": images}, share_inputs=True)
            logits: Floats = request.get_tensor("logits").data
            return logits

        return predict

    return make


CANDIDATES: dict[str, Callable[[Job], Maker]] = {
    "fieldfit": fieldfit,
    "onnxruntime": onnxruntime,
    "torch": torch,
    "torch-channels-last": lambda job: torch(job, "channels last"),
    "torch-compile": lambda job: torch(job, "compile"),
    "openvino": openvino,
    "openvino-float32": lambda job: openvino(job, FLOAT32),
    "nncf": nncf,
}


def turn(predict: Predict, images: UInt8, settle: int, calls: int) -> dict[str, Sequence[float]]:
    """CPU and wall seconds of a call after others ran, and of one once the caches are its own."""
    first = _timed(predict, images, 1)
    for _ in range(settle):
        predict(images)
    return {"first": first, "again": _timed(predict, images, calls)}


def _timed(predict: Predict, images: UInt8, calls: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        predict(images)
    wall = time.perf_counter() - wall
    return (time.process_time() - cpu) / calls, wall / calls


def main(name: str, given: str) -> None:
    """Answer requests until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, not all of them from Python

    def say(answer: object) -> None:
        print(json.dumps(answer), file=out, flush=True)

    job: Job = json.loads(given)
    images = np.load(job["images"], allow_pickle=False)
    try:
        make = CANDIDATES[name](job)
    except (NotHereError, ImportError) as error:
        say({"failed": str(error)})
        return
    say({"ready": {}})
    predicts: dict[int, Predict] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        threads = asked["threads"]
        predict = predicts.get(threads) or predicts.setdefault(threads, make(threads))
        if "answers" in asked:
            starts = range(0, len(images), BATCH)
            rows = [predict(images[i : i + BATCH]).copy() for i in starts]
            np.save(asked["answers"], np.concatenate(rows))
            say({})
        else:
            batch = np.resize(images, (asked["batch"], *images.shape[1:]))
            say(turn(predict, batch, asked["settle"], asked["calls"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
