"""What is left of the source model, and how far apart the domains are, before and after.

The measures and what they mean are train/similarity's.
"""

from export.report.facts import Facts
from export.report.page import Section, Tile, render
from train import similarity
from train.record import Training
from train.similarity import Similarity

Model = tuple[str, Similarity]
"""With its name."""


def make(facts: Facts) -> Section | None:
    """Every measure of the source model and of what was kept; None where there were no images."""
    models = measured(facts.training)
    before = models[0][1]
    if not before.images:
        return None
    kept = [(r.name, r.similarity) for r in facts.training.rungs if r.kept and r.similarity]
    shown = [models[0], *(model for model in kept if model[1] is not before)]
    columns, rows = similarity.rows(before, shown[1:])
    body = render(
        "retention.html",
        rests_on=similarity.rests_on(before),
        tiles=tiles(before, shown[-1][1]) if shown[1:] else (),
        warnings=similarity.warnings(shown),
        columns=columns,
        rows=zip(rows, (line.meaning for line in similarity.LINES), strict=True),
        diagnostics=similarity.DIAGNOSTICS,
        every=similarity.rows(before, models[1:]),
        others=[w for w in similarity.warnings(models) if w not in similarity.warnings(shown)],
        rates=similarity.rate_rows(facts.dataset.classes, models),
    )
    lead = "The source model ships as it is: nothing could be forgotten."
    if shown[1:]:
        lead = _lead(*shown[-1])
    return Section("retention", "Retention and domain gap", lead, body)


def measured(training: Training) -> list[Model]:
    """Every model that was compared with the source model, which comes first."""
    first, *others = [(r.name, r.similarity) for r in training.rungs if r.similarity is not None]
    return [("the source model", first[1]), *others]


def tiles(before: Similarity, after: Similarity) -> list[Tile]:
    """What was forgotten and how far the domains are apart, as far as it is known."""
    found = []
    if after.negative_flips is not None:
        found.append(Tile(f"{after.negative_flips:.1%}", "of clean images right before, wrong now"))
    if before.source_auc is not None and after.source_auc is not None:
        found.append(_change(before.source_auc, after.source_auc, ".3f", "AUC on clean images"))
    if after.cka is not None:
        found.append(Tile(f"{after.cka:.3f}", "likeness of features on clean images (CKA)"))
    if before.proxy_a_distance is not None and after.proxy_a_distance is not None:
        distances = before.proxy_a_distance, after.proxy_a_distance
        found.append(_change(*distances, ".2f", "domain gap (PAD; 0 none, 2 apart)"))
    return found


def _change(before: float, after: float, form: str, words: str) -> Tile:
    old, new = format(before, form), format(after, form)
    return Tile(new if old == new else f"{old} → {new}", words)


def _lead(name: str, after: Similarity) -> str:
    if after.agreement is None:
        return "Without source images, what was forgotten cannot be measured."
    lead = f"“{name}” gives {after.agreement:.1%} of the clean images the source model's answer"
    if after.negative_flips is None:
        return f"{lead}."
    return f"{lead}; {after.negative_flips:.1%} were right before and are wrong now."
