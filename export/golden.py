"""Choose the golden samples: few held-out images that say much about an engine.

They travel in the bundle and are replayed on every device that opens it.
"""

import numpy as np
import numpy.typing as npt

from runtime import metrics


def choose_golden(logits: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Indices of ``count`` images, spread evenly over the checkpoint's answers ``logits [N, K]``.

    Sorted by predicted class and then by confidence, so that every class that is predicted and
    every degree of confidence appears; the same images for the same logits.
    """
    count = min(count, len(logits))
    confidence = metrics.softmax(logits).max(axis=1)
    order = np.lexsort((np.arange(len(logits)), confidence, logits.argmax(axis=1)))
    chosen = np.unique(np.linspace(0, len(order) - 1, count).round().astype(np.int64))
    return np.asarray(order[chosen], dtype=np.int64)
