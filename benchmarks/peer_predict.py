"""One candidate of ``end_to_end`` in a process and, if need be, an environment of its own.

    python peer_predict.py NAME MODEL < FILES

The first line of stdin is a JSON list of image files. Each further line is ``one`` or ``stream``:
the files are classified one at a time or as one stream, and a JSON object with CPU and wall seconds
and the labels' indices goes to stdout. It imports nothing of fieldfit unless it is fieldfit.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable

Predict = Callable[[list[str]], list[int]]


def fieldfit(model: str, form: str | None = None) -> tuple[Predict, Predict]:
    """fieldfit's own, as ``docs`` shows it; ``model`` is a bundle."""
    from runtime import Classifier

    classifier = Classifier.open(model, threads=1, engine="onnxruntime-cpu", form=form)
    labels = classifier.bundle.manifest.labels

    def one(files: list[str]) -> list[int]:
        return [labels.index(classifier(file).label) for file in files]

    def stream(files: list[str]) -> list[int]:
        return [labels.index(answer.label) for answer in classifier.stream(files)]

    return one, stream


def ultralytics(model: str) -> tuple[Predict, Predict]:
    """Ultralytics' ``predict``, https://docs.ultralytics.com/modes/predict/."""
    import onnxruntime
    import torch
    from ultralytics import YOLO  # type: ignore[import-not-found]  # not of this environment

    torch.set_num_threads(1)
    yolo = YOLO(model, task="classify")
    side = list(onnxruntime.InferenceSession(model).get_inputs()[0].shape)[2]

    def one(files: list[str]) -> list[int]:
        return [yolo.predict(file, imgsz=side, verbose=False)[0].probs.top1 for file in files]

    def stream(files: list[str]) -> list[int]:
        results = yolo.predict(files, stream=True, batch=16, imgsz=side, verbose=False)
        return [result.probs.top1 for result in results]

    return one, stream


CANDIDATES = {
    "fieldfit": fieldfit,
    "fieldfit-fp32": lambda model: fieldfit(model, "fp32"),
    "ultralytics": ultralytics,
}


def main(name: str, model: str) -> None:
    """Answer requests until stdin ends."""
    out = os.fdopen(os.dup(1), "w")  # libraries print to stdout
    with contextlib.redirect_stdout(sys.stderr):
        files = json.loads(sys.stdin.readline())
        one, stream = CANDIDATES[name](model)
        for line in sys.stdin:
            predict = one if line.strip() == "one" else stream
            cpu, wall = time.process_time(), time.perf_counter()
            answers = predict(files)
            seconds = time.process_time() - cpu, time.perf_counter() - wall
            print(json.dumps({"cpu": seconds[0], "wall": seconds[1], "answers": answers}), file=out)
            out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
