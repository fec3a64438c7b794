"""Plain measures on arrays, the same in every room: no model, no file, no framework.

Labels are integer class indices, ``-1`` where the label is unknown; unknown ones never count.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]


def softmax(logits: Floats, *, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Probabilities ``[N, K]`` of logits ``[N, K]``, divided by ``temperature`` first."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    exponent = np.exp(scaled)
    return np.asarray(exponent / exponent.sum(axis=-1, keepdims=True))


def accuracy(predicted: Ints, labels: Ints) -> float:
    """Share of known labels that were predicted; NaN if none is known."""
    known = labels >= 0
    return float(np.mean(predicted[known] == labels[known])) if known.any() else float("nan")


def recalls(predicted: Ints, labels: Ints, classes: int) -> npt.NDArray[np.float64]:
    """Recall of each class ``[K]``; NaN for a class that no label names."""
    result = np.full(classes, np.nan)
    for index in range(classes):
        members = labels == index
        if members.any():
            result[index] = np.mean(predicted[members] == index)
    return result


def balanced_accuracy(predicted: Ints, labels: Ints, classes: int) -> float:
    """Mean recall over the classes that occur; NaN if no label is known."""
    values = recalls(predicted, labels, classes)
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def worst_recall(predicted: Ints, labels: Ints, classes: int) -> float:
    """Smallest recall over the classes that occur; NaN if no label is known."""
    values = recalls(predicted, labels, classes)
    return float(np.nanmin(values)) if not np.isnan(values).all() else float("nan")


def auc(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """Area under the ROC curve by the rank-sum statistic, ties counted half.

    NaN if only one side occurs. (Mann and Whitney 1947; Hanley and McNeil 1982.)
    """
    positives = int(positive.sum())
    negatives = positive.size - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2.0)[inverse]
    rank_sum = float(ranks[positive].sum())
    return (rank_sum - positives * (positives + 1) / 2.0) / (positives * negatives)


def macro_auc(probabilities: Floats, labels: Ints) -> float:
    """AUC of the last class for two classes, mean of one-against-rest AUCs for more."""
    known = labels >= 0
    probabilities, labels = probabilities[known], labels[known]
    classes = probabilities.shape[1]
    if classes == 2:
        return auc(probabilities[:, 1], labels == 1)
    values = np.array([auc(probabilities[:, k], labels == k) for k in range(classes)])
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def agreement(one: Floats, other: Floats) -> float:
    """Share of rows in which two models' logits ``[N, K]`` name the same class."""
    return float(np.mean(one.argmax(axis=1) == other.argmax(axis=1)))


def sqnr_db(reference: Floats, other: Floats) -> float:
    """Signal-to-quantization-noise ratio of ``other`` against ``reference``, in decibels.

    ``10 log10(sum(reference²) / sum((reference - other)²))``; infinite for equal arrays.
    Logits are centred per row first: a constant added to all classes changes no answer.
    """
    signal = np.asarray(reference, dtype=np.float64)
    signal = signal - signal.mean(axis=-1, keepdims=True)
    quantized = np.asarray(other, dtype=np.float64)
    quantized = quantized - quantized.mean(axis=-1, keepdims=True)
    noise = float(np.sum((signal - quantized) ** 2))
    power = float(np.sum(signal**2))
    if noise == 0.0:
        return float("inf")
    return float(10.0 * np.log10(power / noise)) if power > 0.0 else float("-inf")


def paired_bootstrap(
    before: npt.NDArray[np.bool_],
    after: npt.NDArray[np.bool_],
    *,
    rounds: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Two-sided percentile interval of ``mean(after) - mean(before)`` on the same samples.

    ``before`` and ``after`` say for each sample ``[N]`` whether the answer was right. Pairing
    removes the variation that both share. (Efron and Tibshirani 1993, chapter 13.)
    """
    if before.size == 0:
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    _, lost, won, _ = _resampled_pairs(before, after, rounds, random).T
    return _percentiles((won - lost) / before.size, confidence)


def worst_recall_bootstrap(
    before: Ints,
    after: Ints,
    labels: Ints,
    classes: int,
    *,
    rounds: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Two-sided percentile interval of the change of worst_recall from ``before`` to ``after``.

    All three are class indices ``[N]`` of the same samples, which are resampled within their
    class; in each resample the worst class is found anew on both sides. NaN if no label is known.
    """
    random = np.random.default_rng(seed)
    worst = np.full((2, rounds), np.inf)
    for index in range(classes):
        members = labels == index
        if members.any():
            right = before[members] == index, after[members] == index
            both, lost, won, _ = _resampled_pairs(*right, rounds, random).T
            recalls_drawn = np.stack([both + lost, both + won]) / members.sum()
            worst = np.minimum(worst, recalls_drawn)
    if np.isinf(worst).any():
        return float("nan"), float("nan")
    return _percentiles(worst[1] - worst[0], confidence)


def _resampled_pairs(
    before: npt.NDArray[np.bool_],
    after: npt.NDArray[np.bool_],
    rounds: int,
    random: "np.random.Generator",  # whose module a device need not load
) -> npt.NDArray[np.int64]:
    """Counts ``[rounds, 4]`` of right both times, only before, only after, never.

    Drawing samples with replacement and counting them is drawing the counts from a multinomial:
    the same distribution, for no memory, and the order of the samples does not matter.
    """
    cells = [before & after, before & ~after, ~before & after, ~before & ~after]
    shares = np.array([cell.mean() for cell in cells])
    return random.multinomial(before.size, shares / shares.sum(), size=rounds)


def _percentiles(values: npt.NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)


def mcnemar_p(lost: int, won: int) -> float:
    """Two-sided p of McNemar's exact test: are answers lost as often as they are won?

    Of the ``lost + won`` samples that only one of two models got right, each is a fair coin if
    both are equally good; samples on which both are right or wrong say nothing. 1.0 if there is
    none. (McNemar 1947; the exact form is the sign test.)
    """
    total = lost + won
    if lost == won:
        return 1.0
    ways = sum(math.comb(total, few) for few in range(min(lost, won) + 1))
    return float(2 * ways / 2**total)


def wilson_interval(hits: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided score interval of a share, honest at 0 and 1 too. (Wilson 1927.)"""
    from statistics import NormalDist  # a device that only answers need not wait for it

    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = hits / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def largest_unseen(samples: int, *, confidence: float = 0.95) -> float:
    """Largest share of an event that none of ``samples`` showed and that may still be there.

    About ``3 / samples`` at 95 %. (Hanley and Lippman-Hand 1983.)
    """
    return float(1.0 - (1.0 - confidence) ** (1.0 / samples))


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """The temperature in [0.05, 20] that minimises the negative log-likelihood.

    Golden-section search over its logarithm; the loss is unimodal in it. (Guo et al. 2017.)
    Returns 1.0 if no label is known, or every answer is right: the likelihood would then grow
    without end as the temperature falls, and every score would be 1.
    """
    known = labels >= 0
    logits, labels = logits[known], labels[known]
    if (logits.argmax(axis=1) == labels).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        probabilities = softmax(logits, temperature=float(np.exp(log_temperature)))
        picked = probabilities[np.arange(len(labels)), labels]
        return float(-np.mean(np.log(np.maximum(picked, 1e-12))))

    low, high = np.log(0.05), np.log(20.0)
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2.0))


def percentiles_ms(seconds: Floats) -> dict[str, float]:
    """Latency percentiles in milliseconds: p50, p90, p99 and the maximum."""
    p50, p90, p99, top = np.percentile(np.asarray(seconds) * 1e3, [50, 90, 99, 100])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(top)}
