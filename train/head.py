"""Fit a linear head on cached features: multinomial logistic regression by L-BFGS.

A convex problem with one answer: no learning rate, no seed. It does not know the backbone.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from runtime import metrics

Float32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def fit_head(
    features: Float32,
    labels: Ints,
    weights: Float32,
    *,
    classes: int,
    l2: float,
    epochs: int,
    report: Callable[[int, float], None] | None = None,
) -> tuple[Float32, Float32]:
    """Return weight ``[K, D]`` and bias ``[K]`` that minimise the weighted cross-entropy.

    ``features [N, D]``, ``labels [N]`` and sample ``weights [N]``; ``l2`` multiplies the sum
    of squared weights, for features scaled to RMS 1. One epoch is one pass over the features;
    L-BFGS with a strong-Wolfe line search (Nocedal and Wright 2006, chapters 3 and 7) needs a few
    dozen. ``report`` gets the number and the loss of each.
    """
    # One scale for all features conditions the problem; one for each would give INT8 a
    # heavy-tailed weight matrix when it is folded back.
    scale = float(np.sqrt(np.mean(np.square(features, dtype=np.float64)))) or 1.0
    x = torch.from_numpy(features / np.float32(scale))
    y = torch.from_numpy(labels)
    share = torch.from_numpy(weights / weights.sum())
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=epochs, max_eval=epochs, history_size=10,
        tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe",
    )  # fmt: skip
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        optimizer.zero_grad()
        entropy = F.cross_entropy(x @ weight.T + bias, y, reduction="none")
        loss = (entropy * share).sum() + l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        passes += 1
        if report is not None:
            report(passes, float(loss.detach()))
        return loss.detach()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    fitted = weight.detach() / scale
    return fitted.numpy().astype(np.float32), bias.detach().numpy().astype(np.float32)


def log_loss(logits: Float32, labels: Ints) -> float:
    """Mean negative log-likelihood of known ``labels [N]`` under ``logits [N, K]``, in nats."""
    known = labels >= 0
    if not known.any():
        return float("nan")
    picked = metrics.softmax(logits[known])[np.arange(int(known.sum())), labels[known]]
    return float(-np.mean(np.log(np.maximum(picked, 1e-12))))
