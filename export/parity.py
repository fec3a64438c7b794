"""Run artifacts and checkpoint on the same images and say how far apart they are.

Numbers only; budgets and verdicts belong to export/gate.
"""

import numpy as np
import numpy.typing as npt

from runtime import metrics
from runtime.engines.engine import Engine
from runtime.errors import ExportError
from runtime.manifest import Quality

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

BATCH_SIZES = (1, 2, 5, 33)
"""At which a dynamic batch is proven; 33 is larger than any batch that is usual."""

MIN_PARITY_DB = 60.0
"""Float32 in another order of operations costs less than a millionth of the signal."""


def run(engine: Engine, images: UInt8, batch: int = 16) -> Floats:
    """Logits ``[N, K]`` of uint8 ``images [N, H, W, C]``."""
    rows = [engine.infer(images[i : i + batch]).logits for i in range(0, len(images), batch)]
    return np.concatenate(rows)


def check_batches(engine: Engine, images: UInt8) -> None:
    """Raise ExportError unless every batch size gives the same logits, image by image."""
    images = np.resize(images, (max(BATCH_SIZES), *images.shape[1:]))
    alone = run(engine, images, batch=1)
    for size in BATCH_SIZES:
        together = engine.infer(np.ascontiguousarray(images[:size])).logits
        if together.shape != alone[:size].shape:
            raise ExportError(f"{engine}: a batch of {size} gives logits {list(together.shape)}")
        # Different kernels serve different batches: equal up to rounding of float32.
        if not np.allclose(together, alone[:size], rtol=1e-3, atol=1e-3):
            worst = float(np.abs(together - alone[:size]).max())
            raise ExportError(f"{engine}: a batch of {size} changes logits by up to {worst:.4g}")


def check_checkpoint(reference: Floats, logits: Floats) -> float:
    """SQNR of the fp32 graph against the checkpoint, in dB.

    Raises ExportError if they are not the same function: nothing may be released then.
    """
    sqnr = metrics.sqnr_db(reference, logits)
    if not np.isfinite(logits).all() or sqnr < MIN_PARITY_DB:
        agreement = metrics.agreement(reference, logits)
        raise ExportError(
            f"the fp32 ONNX graph is not the checkpoint: SQNR {sqnr:.1f} dB, at least "
            f"{MIN_PARITY_DB:.0f} expected, {agreement:.1%} of the answers agree; nothing is "
            "released. Report this with the architecture's name"
        )
    return sqnr


def measure(reference: Floats, logits: Floats, labels: Ints, *, seed: int) -> Quality:
    """What ``logits`` are worth against the checkpoint's ``reference``, both ``[N, K]``."""
    classes = reference.shape[1]
    predicted, before = logits.argmax(axis=1), reference.argmax(axis=1)
    known = labels >= 0
    interval = metrics.paired_bootstrap(
        before[known] == labels[known], predicted[known] == labels[known], seed=seed
    )
    return Quality(
        samples=len(labels),
        labelled=int(known.sum()),
        agreement=metrics.agreement(reference, logits),
        sqnr_db=float(np.clip(metrics.sqnr_db(reference, logits), -200.0, 200.0)),
        accuracy=_known(metrics.accuracy(predicted, labels)),
        # The interval of what was lost: positive is worse.
        accuracy_drop_interval=(-interval[1], -interval[0]) if known.any() else None,
        balanced_accuracy=_known(metrics.balanced_accuracy(predicted, labels, classes)),
        worst_recall=_known(metrics.worst_recall(predicted, labels, classes)),
        auc=_known(metrics.macro_auc(metrics.softmax(logits), labels)),
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
