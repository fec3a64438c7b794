"""How much of the source model is left in an adapted one: measures, their record, their words.

"A blurry machine is still the same machine": an adapted model should answer as the source model
did where that was right, and answer alike for an image and its degraded twin. It gets arrays; it
knows no network, no file, and not what the gate between rungs makes of the figures.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import metrics
from train.threshold import class_rates

Float64 = npt.NDArray[np.float64]

DOMAIN_IMAGES = 1000
"""Images of each domain, at most, that the domain classifier of ``proxy_a_distance`` sees."""
KERNEL_IMAGES = 500
"""Images of each domain, at most, between which ``mmd2`` measures distances."""
RIDGE = 0.1
"""Of the domain classifier, in mean eigenvalues of the Gram matrix of its fold."""
WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the kernels of ``mmd2``, in median squared distances."""
SIMILAR_CKA, DIFFERENT_CKA = 0.8, 0.7
"""CKA from which features look unchanged, and below which they look changed."""
SAME_AGREEMENT, DIFFERENT_AGREEMENT = 0.95, 0.9
"""Agreement from which the answers are the source model's, and below which they are not."""
ONE_CLASS = 0.9
"""Share of field images in one predicted class above which a model seems to name nothing else."""


class Answers(NamedTuple):
    """What one model answers on one set of images."""

    logits: metrics.Floats
    """``[N, K]``, as they ship: a shifted threshold is part of them."""
    features: metrics.Floats
    """``[N, D]``, what the linear head gets."""


class Sweep(NamedTuple):
    """What one model answers on source images and on their degraded twins."""

    clean: metrics.Floats
    """Logits ``[M, K]`` of the images as they are."""
    degraded: Mapping[str, metrics.Floats]
    """By degradation, logits ``[S, M, K]`` of the same images at severities 1 to S."""


class Portrait(NamedTuple):
    """Everything one model is asked for this report; None where there are no such images."""

    source: Answers | None
    target: Answers | None
    sweep: Sweep | None


class Similarity(msgspec.Struct, frozen=True, kw_only=True):
    """One model against the source model; None where it cannot be known.

    "Before" is the source model measured against itself. Shares are in [0, 1].
    """

    images: dict[str, int]
    """How many images each part rests on: ``source``, ``target``, ``sweep``."""
    source_accuracy: float | None
    source_balanced_accuracy: float | None
    source_auc: float | None
    agreement: float | None
    """Share of source images that get the source model's answer."""
    negative_flips: float | None
    """Share of labelled source images that the source model had right and this one has wrong."""
    churn: float | None
    """Share of source images whose answer is another one, better or worse."""
    cka: float | None
    """Linear CKA of the features of source images in both models."""
    target_cka: float | None
    """The same for field images."""
    twin_agreement: float | None
    """Share of degraded twins that get the class of their clean image, in this model."""
    twin_change: float | None
    """Mean ``|Δp|`` between them."""
    errors: dict[str, tuple[float, ...]] | None
    """By degradation, error at severities 1 to S."""
    corruption_errors: dict[str, float] | None
    """By degradation, error over all severities in units of the source model's."""
    mean_corruption_error: float | None
    proxy_a_distance: float | None
    """Between source and field features: diagnostic, no measure of success."""
    mmd2: float | None
    """Likewise."""
    predicted_rates: dict[str, tuple[float, ...]]
    """By domain, share of images in each predicted class."""
    labels_used: int
    """Field labels that the model has learned from."""
    seconds: float
    """That its training took, of the wall clock."""


def measure(
    before: Portrait,
    after: Portrait,
    *,
    source_labels: metrics.Ints | None,
    sweep_labels: metrics.Ints | None,
    labels_used: int,
    seconds: float,
    seed: int,
) -> Similarity:
    """Compare the model ``after`` with the source model ``before``; give both the same to be
    measured against itself.

    Both were asked about the same images in the same order. ``source_labels [N]`` and
    ``sweep_labels [M]`` are class indices, -1 where unknown, and None where there are no images.
    ``seed`` draws the images of the diagnostics and their folds.
    """
    result: dict[str, object] = dict.fromkeys(Similarity.__struct_fields__)
    images, rates = {}, {}
    if before.source is not None and after.source is not None and source_labels is not None:
        images["source"] = len(source_labels)
        rates["source"] = _rates(after.source.logits)
        result |= _retention(before.source, after.source, source_labels)
    if before.target is not None and after.target is not None:
        images["target"] = len(after.target.logits)
        rates["target"] = _rates(after.target.logits)
        result["target_cka"] = _known(linear_cka(before.target.features, after.target.features))
    if before.sweep is not None and after.sweep is not None and sweep_labels is not None:
        images["sweep"] = len(sweep_labels)
        result |= _robustness(before.sweep, after.sweep, sweep_labels)
    if after.source is not None and after.target is not None:
        features = after.source.features, after.target.features
        result["proxy_a_distance"] = _known(proxy_a_distance(*features, seed=seed))
        result["mmd2"] = _known(mmd2(*features, seed=seed))
    result |= {"images": images, "predicted_rates": rates}
    result |= {"labels_used": labels_used, "seconds": seconds}
    return msgspec.convert(result, Similarity)


def _retention(before: Answers, after: Answers, labels: metrics.Ints) -> dict[str, float | None]:
    old, new = before.logits.argmax(axis=1), after.logits.argmax(axis=1)
    classes = after.logits.shape[1]
    values = {
        "source_accuracy": metrics.accuracy(new, labels),
        "source_balanced_accuracy": metrics.balanced_accuracy(new, labels, classes),
        "source_auc": metrics.macro_auc(metrics.softmax(after.logits), labels),
        "agreement": metrics.agreement(before.logits, after.logits),
        "negative_flips": negative_flips(old, new, labels),
        "churn": churn(old, new),
        "cka": linear_cka(before.features, after.features),
    }
    return {name: _known(value) for name, value in values.items()}


def _robustness(before: Sweep, after: Sweep, labels: metrics.Ints) -> dict[str, object]:
    degraded = np.stack([metrics.softmax(logits) for logits in after.degraded.values()])
    agreement, change = twin_change(metrics.softmax(after.clean), degraded)
    result: dict[str, object] = {"twin_agreement": agreement, "twin_change": change}
    labelled = int((labels >= 0).sum())
    if labelled:
        errors = {name: severity_errors(x, labels) for name, x in after.degraded.items()}
        relative = {
            name: corruption_error(
                severity_errors(before.degraded[name], labels), errors[name], images=labelled
            )
            for name in errors
        }
        result |= {"errors": errors, "corruption_errors": relative}
        result["mean_corruption_error"] = float(np.mean(list(relative.values())))
    return result


def negative_flips(before: metrics.Ints, after: metrics.Ints, labels: metrics.Ints) -> float:
    """Share of known labels that class indices ``before [N]`` had right and ``after [N]`` have not.

    NaN if no label is known. (Yan et al. 2021, positive-congruent training.)
    """
    known = labels >= 0
    flipped = (before == labels) & (after != labels)
    return float(np.mean(flipped[known])) if known.any() else float("nan")


def churn(before: metrics.Ints, after: metrics.Ints) -> float:
    """Share of class indices ``[N]`` that changed, for better or worse. (Milani Fard et al. 2016.)

    It is what agreement lacks to 1; of two models of equal accuracy it says how often a user sees
    another answer.
    """
    return float(np.mean(before != after))


def _rates(logits: metrics.Floats) -> tuple[float, ...]:
    return tuple(class_rates(logits.argmax(axis=1), logits.shape[1]).tolist())


def linear_cka(x: metrics.Floats, y: metrics.Floats) -> float:
    """Linear centred kernel alignment of features ``x [N, D]`` and ``y [N, E]`` of the same images.

    ``|YᵀX|² / (|XᵀX| |YᵀY|)`` of centred columns, Frobenius norms, in [0, 1]: 1 if one is a
    rotation and uniform scaling of the other. NaN if one is constant. (Kornblith et al. 2019,
    equation 5, in its feature-space form: memory does not grow with N².)
    """
    a, b = (np.asarray(features, dtype=np.float64) for features in (x, y))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = float(np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    return float(np.square(b.T @ a).sum()) / scale if scale > 0.0 else float("nan")


def proxy_a_distance(source: metrics.Floats, target: metrics.Floats, seed: int) -> float:
    """How well a linear classifier tells features ``[N, D]`` and ``[M, D]`` of the domains apart.

    ``2 (1 - 2 e)`` with ``e`` its balanced error on images it was not fitted on: 0 if it guesses,
    2 if it is never wrong. (Ben-David et al. 2007.) The classifier is a ridge regression of the
    domain on standardised features, both domains weighing the same (Fisher's discriminant with
    shrinkage); it is fitted on one half of the images, drawn by ``seed``, and tried on the other,
    then the other way round. Values below 0, which are chance, are given as 0; NaN with fewer than
    two images in a domain.
    """
    random = np.random.default_rng(seed)
    drawn = [_draw(features, DOMAIN_IMAGES, random) for features in (source, target)]
    if min(map(len, drawn)) < 2:
        return float("nan")
    halves = [_sided(*(features[start::2] for features in drawn)) for start in (0, 1)]
    errors = [_domain_error(*fit, *held) for fit, held in (halves, halves[::-1])]
    return max(0.0, 2.0 * (1.0 - 2.0 * float(np.mean(errors))))


def _sided(source: Float64, target: Float64) -> tuple[Float64, Float64]:
    """Features of both domains in one array, and the side of each: -1 source, 1 target."""
    sides = np.repeat([-1.0, 1.0], [len(source), len(target)])
    return np.concatenate([source, target]), sides


def _domain_error(fit: Float64, fit_sides: Float64, held: Float64, sides: Float64) -> float:
    """Balanced error on ``held`` of the ridge classifier of ``fit``; sides are -1 and 1.

    Solved in the dual: there are more features than images as a rule.
    """
    first, second = fit_sides < 0, fit_sides > 0
    weights = first * (0.5 / first.sum()) + second * (0.5 / second.sum())
    mean = weights @ fit
    deviation = np.sqrt(weights @ np.square(fit - mean))
    deviation[deviation == 0.0] = 1.0  # a feature that is 0 for all images says nothing
    x, root = (fit - mean) / deviation, np.sqrt(weights)
    rows = x * root[:, None]
    gram = rows @ rows.T
    gram[np.diag_indices_from(gram)] += RIDGE * max(np.trace(gram) / len(gram), 1e-12)
    direction = rows.T @ np.linalg.solve(gram, root * fit_sides)
    guessed = ((held - mean) / deviation) @ direction > 0.0
    return float(np.mean([np.mean(guessed[sides < 0]), np.mean(~guessed[sides > 0])]))


def mmd2(source: metrics.Floats, target: metrics.Floats, seed: int) -> float:
    """Squared maximum mean discrepancy of features ``[N, D]`` and ``[M, D]``, unbiased.

    (Gretton et al. 2012, equation 3.) The kernel is the mean of ``exp(-|x - y|² / (w m))`` over
    the factors w of ``WIDTHS``, where m is the median squared distance between different images of
    both domains together. 0 for one distribution, a little below 0 by chance, at most 2. ``seed``
    draws ``KERNEL_IMAGES`` images where there are more. NaN with fewer than two in a domain.
    """
    random = np.random.default_rng(seed)
    x, y = (_draw(features, KERNEL_IMAGES, random) for features in (source, target))
    if min(len(x), len(y)) < 2:
        return float("nan")
    both = np.concatenate([x, y])
    lengths = np.square(both).sum(axis=1)
    distances = np.maximum(lengths[:, None] + lengths[None, :] - 2.0 * (both @ both.T), 0.0)
    median = float(np.median(distances[np.triu_indices(len(both), k=1)]))
    if median == 0.0:
        return 0.0
    kernel = np.mean([np.exp(-distances / (width * median)) for width in WIDTHS], axis=0)
    np.fill_diagonal(kernel, 0.0)  # an image's likeness to itself is the bias
    n, m = len(x), len(y)
    within = kernel[:n, :n].sum() / (n * (n - 1)) + kernel[n:, n:].sum() / (m * (m - 1))
    return float(within - 2.0 * kernel[:n, n:].mean())


def twin_change(clean: metrics.Floats, degraded: metrics.Floats) -> tuple[float, float]:
    """Agreement and mean ``|Δp|`` of images and their degraded twins, over all twins.

    ``clean [M, K]`` and ``degraded [..., M, K]`` are probabilities. Agreement is the share of twins
    that get the class of their clean image; ``|Δp|`` is half the sum over classes, the total
    variation in [0, 1]: with two classes, how far the probability of either moves.
    """
    same = degraded.argmax(axis=-1) == clean.argmax(axis=-1)
    change = 0.5 * np.abs(degraded - clean).sum(axis=-1)
    return float(np.mean(same)), float(np.mean(change))


def severity_errors(degraded: metrics.Floats, labels: metrics.Ints) -> tuple[float, ...]:
    """Error, 1 - accuracy, at each severity of ``degraded [S, M, K]`` logits; labels ``[M]``."""
    return tuple(1.0 - metrics.accuracy(logits.argmax(axis=1), labels) for logits in degraded)


def corruption_error(before: Sequence[float], after: Sequence[float], *, images: int) -> float:
    """Errors ``after [S]`` at all severities in units of the source model's, ``before [S]``.

    ``sum(after) / sum(before)`` (Hendrycks and Dietterich 2019). Where the source model makes no
    error at any severity that has no value; half an error, ``0.5 / images``, is then added to both
    sums, so that as good stays 1 and each error of the adapted model counts 2.
    """
    missing = 0.5 / images if sum(before) == 0.0 else 0.0
    return (sum(after) + missing) / (sum(before) + missing)


def _draw(features: metrics.Floats, most: int, random: np.random.Generator) -> Float64:
    """At most ``most`` rows in random order, float64."""
    return np.asarray(features[random.permutation(len(features))[:most]], dtype=np.float64)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


class Line(NamedTuple):
    """One line of the table: a measure of every model."""

    name: str
    read: Callable[[Similarity], float | None]
    form: str
    """Format of a value, as in f-strings."""
    meaning: str


LINES = (
    Line(
        "source AUC",
        lambda model: model.source_auc,
        ".3f",
        "how well clean images are still ranked; what is lost against the source model is "
        "forgotten",
    ),
    Line(
        "source balanced accuracy",
        lambda model: model.source_balanced_accuracy,
        ".3f",
        "mean recall of the classes on clean images, at the threshold that ships",
    ),
    Line(
        "source accuracy",
        lambda model: model.source_accuracy,
        ".3f",
        "share of clean images that are right; the common class weighs most",
    ),
    Line(
        "agreement",
        lambda model: model.agreement,
        ".1%",
        "share of clean images with the source model's answer, right or wrong",
    ),
    Line(
        "negative flips",
        lambda model: model.negative_flips,
        ".1%",
        "clean images that were right before and are wrong now: what a user notices",
    ),
    Line(
        "churn",
        lambda model: model.churn,
        ".1%",
        "clean images whose answer is another one, for better or worse",
    ),
    Line(
        "CKA, source",
        lambda model: model.cka,
        ".3f",
        "likeness of the features to the source model's on clean images; 1 is the same up to "
        "rotation and scale; it does not see a changed head",
    ),
    Line("CKA, field", lambda model: model.target_cka, ".3f", "the same on field images"),
    Line(
        "twin agreement",
        lambda model: model.twin_agreement,
        ".1%",
        "degraded twins that get the answer of their clean image: a blurry machine is still the "
        "same machine",
    ),
    Line(
        "twin Δp",
        lambda model: model.twin_change,
        ".3f",
        "how far probabilities move from an image to its degraded twin, on average",
    ),
    Line(
        "mCE",
        lambda model: model.mean_corruption_error,
        ".3f",
        "error on degraded source images in units of the source model's: below 1 is more robust",
    ),
    Line(
        "largest class, source",
        lambda model: _largest(model, "source"),
        ".1%",
        "share of clean images in the class that is predicted most",
    ),
    Line(
        "largest class, field",
        lambda model: _largest(model, "target"),
        ".1%",
        "the same on field images; near 100 % the model has stopped looking",
    ),
    Line(
        "PAD (diagnostic)",
        lambda model: model.proxy_a_distance,
        ".2f",
        "proxy A-distance: 0 if a linear classifier cannot tell source from field features, 2 if "
        "it always can",
    ),
    Line(
        "MMD² (diagnostic)",
        lambda model: model.mmd2,
        ".4f",
        "distance between the distributions of source and field features; 0 is none, and chance "
        "can take it a little below",
    ),
    Line(
        "field labels used",
        lambda model: model.labels_used,
        ".0f",
        "labelled field images that the model has learned from",
    ),
    Line("seconds", lambda model: model.seconds, ".1f", "time that it took to make the model"),
)

DIAGNOSTICS = (
    "PAD and MMD² say how far apart the domains are for the network. They are diagnostics, not "
    "success: they can fall while the field score falls too, and stay high while it rises. Nothing "
    "is chosen by them."
)


def rows(
    before: Similarity, after: Sequence[tuple[str, Similarity]]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of the source model, ``before``, and of all rungs by name.

    One row for each measure, one column for each model; "–" where it cannot be known.
    """
    columns = ["measure", "source model", *(name for name, _ in after)]
    models = [before, *(similarity for _, similarity in after)]
    return columns, [[line.name, *(_cell(line, model) for model in models)] for line in LINES]


def warnings(after: Sequence[tuple[str, Similarity]]) -> list[str]:
    """Sentences about rungs whose figures contradict each other."""
    found = []
    for name, model in after:
        if model.cka is not None and model.agreement is not None:
            figures = f"CKA {model.cka:.3f}, agreement {model.agreement:.1%}"
            if model.cka >= SIMILAR_CKA and model.agreement < DIFFERENT_AGREEMENT:
                found.append(
                    f"{name}: {figures}. Its features look unchanged but its answers are not: CKA "
                    "does not show what was forgotten. Trust agreement and negative flips."
                )
            if model.cka < DIFFERENT_CKA and model.agreement >= SAME_AGREEMENT:
                found.append(
                    f"{name}: {figures}. Its answers are the source model's, but it finds them by "
                    "other features: images unlike these may get other answers."
                )
        largest = _largest(model, "target")
        if largest is not None and largest > ONE_CLASS:
            found.append(
                f"{name}: puts {largest:.1%} of field images into one class. Unless they are that "
                "one-sided, agreement between twins proves nothing."
            )
    return found


def markdown(
    name: str,
    classes: Sequence[str],
    before: Similarity,
    after: Sequence[tuple[str, Similarity]],
) -> str:
    """The whole report on recipe ``name`` in Markdown: tables, what each figure says, warnings.

    ``classes`` are the names in the order of the logits.
    """
    models = [("source model", before), *after]
    parts = [f"# {name}: what adaptation changed", rests_on(before), _grid(*rows(before, after))]
    found = warnings([("the source model", before), *after])
    if found:
        parts += ["## Warnings", "\n".join(f"- {sentence}" for sentence in found)]
    meanings = [f"- **{line.name}**: {line.meaning}." for line in LINES]
    parts += ["## What the figures say", "\n".join(meanings), DIAGNOSTICS]
    parts += _robustness_words(models) + _rates_words(classes, models)
    return "\n\n".join(parts) + "\n"


def rests_on(before: Similarity) -> str:
    """What the figures were measured on, in a sentence or two; ``before`` is the source model."""
    words = {
        "source": "clean test images",
        "target": "field images",
        "sweep": "of the clean ones degraded in every way",
    }
    counts = [f"{before.images[key]} {word}" for key, word in words.items() if key in before.images]
    text = f"Measured on {', '.join(counts)}." if counts else "There were no images to measure on."
    if "source" in before.images:
        return f"{text} One clean image more or less is {1 / before.images['source']:.2%}."
    return f"{text} Without source images, what was forgotten cannot be measured."


def _robustness_words(models: Sequence[tuple[str, Similarity]]) -> list[str]:
    _, before = models[0]
    if before.errors is None:
        return []
    robust = [
        (name, model.corruption_errors, model.errors)
        for name, model in models
        if model.corruption_errors is not None and model.errors is not None
    ]
    columns = ["degradation", *(name for name, _, _ in robust)]
    relative = [[kind, *(f"{ce[kind]:.3f}" for _, ce, _ in robust)] for kind in before.errors]
    raw = [
        [kind, *(" ".join(f"{error:.0%}" for error in errors[kind]) for _, _, errors in robust)]
        for kind in before.errors
    ]
    return [
        "## Robustness",
        "Corruption error: error over all severities divided by the source model's (where that is "
        "0, half an error is added to both).",
        _grid(columns, relative),
        "Error at severities 1 to 5:",
        _grid(columns, raw),
    ]


def rate_rows(
    classes: Sequence[str], models: Sequence[tuple[str, Similarity]]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of the share of images in each predicted class, by domain."""
    domains = [(key, word) for key, word in (("source", "source"), ("target", "field"))]
    lines = [
        [f"{label}, {word}", *(f"{model.predicted_rates[key][index]:.1%}" for _, model in models)]
        for key, word in domains
        if all(key in model.predicted_rates for _, model in models)
        for index, label in enumerate(classes)
    ]
    return ["share", *(name for name, _ in models)], lines


def _rates_words(classes: Sequence[str], models: Sequence[tuple[str, Similarity]]) -> list[str]:
    columns, lines = rate_rows(classes, models)
    return ["## Predicted classes", _grid(columns, lines)] if lines else []


def _largest(model: Similarity, domain: str) -> float | None:
    return max(model.predicted_rates[domain]) if domain in model.predicted_rates else None


def _cell(line: Line, model: Similarity) -> str:
    value = line.read(model)
    return "–" if value is None else format(value, line.form)


def _grid(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruled = [columns, ["---", *["---:"] * (len(columns) - 1)], *lines]
    # A bar inside a cell would begin a new one.
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in cells)} |" for cells in ruled)
