"""Fit a linear head on cached features: multinomial logistic regression by L-BFGS.

A convex problem with one answer: no learning rate, no seed. It does not know the backbone.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from runtime import metrics

Features = npt.NDArray[np.floating]
Float32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CHUNK = 4096
"""Rows that are in memory at a time where there are more: 20 MB of 1,280 features."""

CV_EPOCHS = 30
"""Passes of a fit that only compares strengths; it starts from the source head, near its end."""


class Head(NamedTuple):
    """``weight [K, D]`` and ``bias [K]``, float32."""

    weight: Float32
    bias: Float32

    def logits(self, features: Features) -> Float32:
        """``[N, K]`` for ``features [N, D]``."""
        return np.asarray(features, dtype=np.float32) @ self.weight.T + self.bias


def fit_head(
    features: Features,
    targets: Ints | Float32,
    weights: Float32,
    *,
    classes: int,
    l2: float,
    epochs: int,
    start: Head | None = None,
    rows: Ints | None = None,
    report: Callable[[int, float], None] | None = None,
) -> Head:
    """The head that minimises the weighted cross-entropy plus ``l2 * |W - W0|²``.

    ``features [M, D]`` may be a memory map; ``rows [N]`` are those to fit on, all by default, with
    sample ``weights [N]`` and ``targets``: labels ``[N]`` or probabilities ``[N, K]``. ``l2``
    holds for features scaled to RMS 1. ``W0`` is the weight of ``start``, from which the fit also
    sets out (Li et al. 2018, L2-SP: regularise towards what is known, not towards nothing);
    without one it is 0 and the penalty the usual one.

    One epoch is one pass over the features; L-BFGS with a strong-Wolfe line search (Nocedal and
    Wright 2006, chapters 3 and 7) needs a few dozen. ``report`` gets the number and loss of each.
    """
    chosen = np.arange(len(features)) if rows is None else rows
    scale = _rms(features, chosen)
    y = torch.from_numpy(targets)
    share = torch.from_numpy(weights / weights.sum())
    zero = Head(np.zeros((classes, features.shape[1]), np.float32), np.zeros(classes, np.float32))
    begin = start or zero
    centre = torch.from_numpy(begin.weight * np.float32(scale))
    weight = centre.clone().requires_grad_()
    bias = torch.from_numpy(begin.bias.copy()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=epochs, max_eval=epochs, history_size=10,
        tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe",
    )  # fmt: skip
    chunks = _chunks(features, chosen, scale)
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        optimizer.zero_grad()
        penalty = l2 * (weight - centre).square().sum()
        penalty.backward()  # type: ignore[no-untyped-call]
        total = penalty.detach()
        for part, x in chunks():
            entropy = F.cross_entropy(x @ weight.T + bias, y[part], reduction="none")
            loss = (entropy * share[part]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        passes += 1
        if report is not None:
            report(passes, float(total))
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    fitted = (weight.detach() / scale).numpy().astype(np.float32)
    return Head(fitted, bias.detach().numpy().astype(np.float32))


def choose_strength(
    features: Features,
    source: tuple[Ints, Ints | Float32, Float32],
    field: tuple[Ints, Ints, Float32],
    *,
    strengths: tuple[float, ...],
    folds: int,
    start: Head,
    seed: int,
    track: Callable[[int], None] | None = None,
) -> tuple[float, dict[float, float]]:
    """The strength with the least log-loss on held-out field labels, and the losses of all.

    ``source`` and ``field`` are rows, targets and weights as fit_head takes them; source rows are
    fitted on in every fold, field rows (hard labels) in all folds but the one they are scored in.
    Folds are stratified by label. Of equal losses the stronger pull wins. ``track`` is called with
    the number of fits done. (Stone 1974, cross-validatory choice.)
    """
    rows, labels, weights = field
    fold = _folds(labels, folds, seed)
    losses: dict[float, float] = {}
    done = 0
    for strength in strengths:
        logits = np.zeros((len(rows), len(start.bias)), dtype=np.float32)
        for index in range(folds):
            inside = fold != index
            head = fit_head(
                features, join_targets(source[1], labels[inside], len(start.bias)),
                np.concatenate([source[2], weights[inside]]), classes=len(start.bias),
                l2=strength, epochs=CV_EPOCHS, start=start,
                rows=np.concatenate([source[0], rows[inside]]),
            )  # fmt: skip
            logits[~inside] = head.logits(features[rows[~inside]])
            done += 1
            if track is not None:
                track(done)
        losses[strength] = log_loss(logits, labels)
    best = min(sorted(losses, reverse=True), key=lambda strength: losses[strength])
    return best, losses


def join_targets(one: Ints | Float32, other: Ints, classes: int) -> Float32:
    """Probabilities ``[N + M, K]`` of ``one`` (labels or probabilities) and labels ``other``."""
    eye = np.eye(classes, dtype=np.float32)
    first = one if one.ndim == 2 else eye[one.astype(np.int64)]
    return np.concatenate([first.astype(np.float32), eye[other]])


def _folds(labels: Ints, folds: int, seed: int) -> Ints:
    """A fold for each label ``[N]``, every class dealt out evenly."""
    random = np.random.default_rng((seed, 5))
    fold = np.empty(len(labels), dtype=np.int64)
    dealt = 0
    for name in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == name))
        fold[members] = (dealt + np.arange(len(members))) % folds
        dealt += len(members)
    return fold


def _rms(features: Features, rows: Ints) -> float:
    """One scale for all features conditions the problem; one for each would give INT8 a
    heavy-tailed weight matrix when it is folded back."""
    total = sum(
        float(np.square(features[rows[i : i + CHUNK]], dtype=np.float64).sum())
        for i in range(0, len(rows), CHUNK)
    )
    return float(np.sqrt(total / max(1, len(rows) * features.shape[1]))) or 1.0


def _chunks(
    features: Features, rows: Ints, scale: float
) -> Callable[[], Iterator[tuple[slice, Tensor]]]:
    """Passes over the scaled rows: from memory if they are one chunk, else read again each time."""

    def read(part: slice) -> Tensor:
        return torch.from_numpy(features[rows[part]].astype(np.float32) / np.float32(scale))

    parts = [slice(i, min(i + CHUNK, len(rows))) for i in range(0, len(rows), CHUNK)]
    if len(parts) == 1:
        only = read(parts[0])
        return lambda: iter([(parts[0], only)])
    return lambda: ((part, read(part)) for part in parts)


def log_loss(logits: Float32, labels: Ints) -> float:
    """Mean negative log-likelihood of known ``labels [N]`` under ``logits [N, K]``, in nats."""
    known = labels >= 0
    if not known.any():
        return float("nan")
    picked = metrics.softmax(logits[known])[np.arange(int(known.sum())), labels[known]]
    return float(-np.mean(np.log(np.maximum(picked, 1e-12))))
