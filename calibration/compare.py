"""Compare calibration methods by what they do to the logits, in both dialects.

It does not know how ranges were chosen. The float graph and both dialects run in onnxruntime on
the CPU, whose own guesses at further quantization are off; TensorRT may round differently, but a
range that hurts here hurts there.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from calibration import onnxruntime_dialect, tensorrt_dialect
from calibration.table import LARGEST_DB, Fidelity, MethodScore, Table
from runtime.engines.engine import Float32, logits_of
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.metrics import agreement, sqnr_db
from runtime.preprocess import UInt8

MARGIN_DB = 0.25
"""What a method must be better by than MinMax. Another draw of calibration images moves the ratio
by about as much, so less is no reason to cut off values that do occur."""

_BATCH = 8


def compare(
    graph: onnx.ModelProto, tables: Mapping[str, Table], images: UInt8
) -> tuple[MethodScore, ...]:
    """How near the logits come to those of the float ``graph`` with each of ``tables``.

    ``tables`` go by the names of their methods, ``images`` are uint8 ``[N, H, W, C]``, best such
    that no table has seen.
    """
    reference = _logits(graph, images, "fp32")
    return tuple(
        MethodScore(
            method=method,
            tensorrt=_fidelity(
                reference, _logits(tensorrt_dialect.emit(graph, table).model, images, "int8")
            ),
            onnxruntime=_fidelity(
                reference, _logits(onnxruntime_dialect.emit(graph, table).model, images, "int8-cpu")
            ),
        )
        for method, table in tables.items()
    )


def decide(scores: Sequence[MethodScore]) -> tuple[str, str]:
    """The best method of ``scores``, and why.

    The first stays unless another is better by MARGIN_DB, in the mean over both dialects.
    """
    first = scores[0]
    best = max(scores, key=lambda score: score.sqnr_db)
    if best.sqnr_db < first.sqnr_db + MARGIN_DB:
        return first.method, (
            f"no method is better than {first.method} ({first.sqnr_db:.2f} dB) by {MARGIN_DB} dB; "
            f"best is {best.method} ({best.sqnr_db:.2f} dB)"
        )
    return best.method, (
        f"{best.method} is best with {best.sqnr_db:.2f} dB; {first.method} has "
        f"{first.sqnr_db:.2f} dB"
    )


def _logits(model: onnx.ModelProto, images: UInt8, form: str) -> Float32:
    with OnnxRuntimeEngine(model.SerializeToString(), form=form) as engine:
        return logits_of(engine, images, _BATCH)


def _fidelity(reference: Float32, logits: Float32) -> Fidelity:
    ratio = float(np.clip(sqnr_db(reference, logits), -LARGEST_DB, LARGEST_DB))
    return Fidelity(sqnr_db=ratio, agreement=agreement(reference, logits))
