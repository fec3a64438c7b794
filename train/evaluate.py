"""Score a model on the images of one domain and split, in the words of runtime.metrics."""

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import metrics
from runtime.recipe import Metric
from train.head import log_loss


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """What a model does on one set of images; None where no label is known."""

    images: int
    labelled: int
    accuracy: float | None
    balanced_accuracy: float | None
    worst_recall: float | None
    auc: float | None
    log_loss: float | None

    def metric(self, name: Metric) -> float:
        """The value of the recipe's metric; minus infinity if it cannot be known."""
        value = {
            "auc": self.auc,
            "balanced-accuracy": self.balanced_accuracy,
            "accuracy": self.accuracy,
        }[name]
        return -np.inf if value is None else value


def score(logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Scores:
    """Scores of ``logits [N, K]`` against ``labels [N]``, -1 where unknown."""
    classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    return Scores(
        images=len(labels),
        labelled=int((labels >= 0).sum()),
        accuracy=_known(metrics.accuracy(predicted, labels)),
        balanced_accuracy=_known(metrics.balanced_accuracy(predicted, labels, classes)),
        worst_recall=_known(metrics.worst_recall(predicted, labels, classes)),
        auc=_known(metrics.macro_auc(metrics.softmax(logits), labels)),
        log_loss=_known(log_loss(logits, labels)),
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
