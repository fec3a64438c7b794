"""Run artifacts and checkpoint on the same images and say how far apart they are.

Numbers only; budgets and verdicts belong to export/gate.
"""

import numpy as np
import numpy.typing as npt

from runtime import metrics
from runtime.engines.engine import Engine, logits_of
from runtime.errors import ExportError
from runtime.manifest import Quality

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

BATCH_SIZES = (1, 2, 5, 33)
"""At which a dynamic batch is proven; 33 is larger than any batch that is usual."""

CONFIDENCE = 0.9
"""Of two-sided intervals: with 95 % confidence nothing is worse than their worse end."""

MIN_PARITY_DB = 60.0
"""Float32 in another order of operations costs less than a millionth of the signal."""


def check_batches(engine: Engine, images: UInt8) -> None:
    """Raise ExportError unless every batch size gives the same logits, image by image."""
    images = np.resize(images, (max(BATCH_SIZES), *images.shape[1:]))
    alone = logits_of(engine, images, batch=1)
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
    """What ``logits`` are worth against the checkpoint's ``reference``, both ``[N, K]``.

    ``labels [N]`` are class indices, -1 where unknown. A row of ``logits`` that is not finite is
    no answer: it agrees with nothing and is right for no label. The same images give the same
    figures in whatever order.
    """
    classes = reference.shape[1]
    finite = np.isfinite(logits).all(axis=1)
    predicted, before = np.where(finite, logits.argmax(axis=1), -1), reference.argmax(axis=1)
    known = labels >= 0
    right_before, right = (p[known] == labels[known] for p in (before, predicted))
    lost, won = int((right_before & ~right).sum()), int((right & ~right_before).sum())
    accuracy = metrics.paired_bootstrap(right_before, right, confidence=CONFIDENCE, seed=seed)
    worst = metrics.worst_recall_bootstrap(
        before, predicted, labels, classes, confidence=CONFIDENCE, seed=seed
    )
    agreeing = int((predicted == before).sum())
    sqnr = metrics.sqnr_db(reference, logits) if finite.all() else -np.inf
    area = metrics.macro_auc(metrics.softmax(logits), labels) if finite.all() else np.nan
    return Quality(
        samples=len(labels),
        labelled=int(known.sum()),
        agreement=agreeing / len(labels),
        agreement_interval=metrics.wilson_interval(agreeing, len(labels), confidence=CONFIDENCE),
        sqnr_db=float(np.clip(sqnr, -200.0, 200.0)),
        accuracy=_known(metrics.accuracy(predicted, labels)),
        accuracy_drop_interval=_lost(accuracy),
        lost=lost if known.any() else None,
        won=won if known.any() else None,
        p_value=metrics.mcnemar_p(lost, won) if known.any() else None,
        balanced_accuracy=_known(metrics.balanced_accuracy(predicted, labels, classes)),
        worst_recall=_known(metrics.worst_recall(predicted, labels, classes)),
        worst_recall_drop_interval=_lost(worst),
        auc=_known(area),
    )


def _lost(change: tuple[float, float]) -> tuple[float, float] | None:
    """The interval of what was lost from that of the change: positive is worse, 0 has no sign."""
    low, high = change
    return None if np.isnan(low) else (0.0 - high, 0.0 - low)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
