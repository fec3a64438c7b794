"""Where decisions change: class offsets chosen on labels, or matched to expected class rates.

An offset is added to a class's logit and ends up in the head's bias, so that every artifact,
golden sample and gate sees the decisions that ship. It knows logits, not images.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from runtime.recipe import Threshold

Floats = npt.NDArray[np.floating]
Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SWEEPS = 10
"""Rounds over the classes; two classes need one."""

MIN_LABELS = 20
"""Labelled images below which a domain has no say in the threshold."""


def choose_offsets(
    domains: Sequence[tuple[Floats, Ints]],
    aim: Threshold,
    allowed: Callable[[Float64], bool] | None = None,
) -> Float64:
    """Offsets ``[K]`` that are best for ``aim`` on all ``domains``, each counting the same.

    A domain is logits ``[N, K]`` and labels ``[N]`` (-1 unknown). ``balanced-accuracy`` is the
    mean recall (for two classes, Youden's index), ``accuracy`` the share of right answers. Both
    are smoothed by a Gaussian kernel of Silverman's width, since the optimum of the raw counts
    jumps with single images (Fluss, Faraggi and Reiser 2005). Classes beyond two are taken in
    turn, each exactly, until nothing changes. The first class's offset is 0.

    ``allowed`` says whether offsets ``[K]`` keep what must be kept; among those that do the best
    is taken, and if none does the best of all.
    """
    classes = domains[0][0].shape[1]
    offsets = np.zeros(classes)
    labelled = [(np.asarray(x, np.float64)[y >= 0], y[y >= 0]) for x, y in domains]
    labelled = [(x, y) for x, y in labelled if len(y) >= MIN_LABELS]
    if aim == "none" or not labelled:
        return offsets
    for _ in range(1 if classes == 2 else SWEEPS):
        before = offsets.copy()
        for index in range(1, classes):
            offsets[index] = _best_offset(labelled, offsets, index, aim, allowed)
        if np.allclose(before, offsets):
            break
    return offsets


def match_rates(logits: Floats, expected: Floats) -> Float64:
    """Offsets ``[K]`` with which the predicted class rates of ``logits [N, K]`` are ``expected``.

    Prior matching for a field without labels: right if its classes are as frequent as expected,
    whatever happened to the scores. (Saerens, Latinne and Decaestecker 2002 adjust the same
    logits by the ratio of priors; with hard counts the match is exact.)
    """
    scores = np.asarray(logits, dtype=np.float64)
    offsets = np.zeros(scores.shape[1])
    for _ in range(1 if len(offsets) == 2 else SWEEPS * 5):
        before = offsets.copy()
        for index in range(1, len(offsets)):
            offsets[index] = np.quantile(_needed(scores, offsets, index)[0], expected[index])
        if np.allclose(before, offsets):
            break
    return offsets


def class_rates(predicted: Ints, classes: int) -> Float64:
    """Share of each class ``[K]`` among class indices; those below 0 do not count."""
    known = predicted[predicted >= 0]
    return np.bincount(known, minlength=classes) / max(1, len(known))


def rates_off(
    predicted: Floats, expected: Floats, ratio: float, names: Sequence[str]
) -> str | None:
    """Why the rates ``predicted [K]`` of classes ``names`` are not within a factor ``ratio`` of
    ``expected [K]``; None if they are."""
    for name, rate, wanted in zip(names, predicted, expected, strict=True):
        if wanted > 0 and not wanted / ratio <= rate <= wanted * ratio:
            return (
                f"{name!r} is predicted for {rate:.0%} of the field images, expected "
                f"{wanted:.0%}, within a factor {ratio:g}"
            )
    return None


def _needed(scores: Float64, offsets: Float64, index: int) -> tuple[Float64, Ints]:
    """The offset from which on each image is called ``index``, and what it is called below it."""
    others = scores + offsets
    others[:, index] = -np.inf
    rival = others.argmax(axis=1)
    return others.max(axis=1) - scores[:, index], rival


def _best_offset(
    domains: Sequence[tuple[Float64, Ints]],
    offsets: Float64,
    index: int,
    aim: Threshold,
    allowed: Callable[[Float64], bool] | None,
) -> float:
    parts = []
    for scores, labels in domains:
        needed, rival = _needed(scores, offsets, index)
        if aim == "accuracy":
            weight = np.full(len(labels), 1 / len(labels))
        else:
            counts = np.bincount(labels, minlength=len(offsets))
            weight = 1 / (counts[labels] * (counts > 0).sum())
        # Above ``needed`` an image of the class becomes right, one that its rival has right wrong.
        sign = (labels == index).astype(np.float64) - (labels == rival)
        parts.append((needed, sign * weight))
    needed = np.concatenate([n for n, _ in parts])
    signs = np.concatenate([s for _, s in parts])
    spread = np.minimum(needed.std(), np.subtract(*np.quantile(needed, [0.75, 0.25])) / 1.34)
    width = max(0.9 * spread * len(needed) ** -0.2, 1e-9)
    grid = np.linspace(needed.min() - width, needed.max() + width, 801)
    value = np.zeros(len(grid))
    for start in range(0, len(needed), 4096):
        part = slice(start, start + 4096)
        value += _normal_cdf((grid[:, None] - needed[part]) / width) @ signs[part]
    best_first = grid[np.argsort(-value, kind="stable")]
    if allowed is not None:
        trial = offsets.copy()
        for offset in best_first:
            trial[index] = offset
            if allowed(trial):
                return float(offset)
    return float(best_first[0])


def _normal_cdf(x: Float64) -> Float64:
    """Within 3e-4, without SciPy: the logistic approximation of Page (1977)."""
    x = np.clip(x, -6.0, 6.0)
    return np.asarray(1 / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
