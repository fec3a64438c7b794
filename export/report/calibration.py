"""The section ``calibration``: which images set the INT8 ranges and why, and what the ranges miss.

It does not know how images are chosen (calibration/images) nor ranges (calibration/ranges).
"""

from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from calibration.gallery import UNLABELLED, data_url
from calibration.images import Choice
from calibration.plots import draw_ranges
from calibration.table import Table
from export.report.facts import Facts
from export.report.figure import svg
from export.report.page import Section, render
from export.report.thumbnails import thumbnail
from runtime.preprocess import InputSpec

FIRST = 24
"""Images that are seen without unfolding."""
DRAWN = 40
"""Tensors in the drawing; the table has all."""


class Coverage(NamedTuple):
    """How much of what a network holds its ranges do not represent."""

    tensors: int
    clipping: int
    """Tensors with any value outside."""
    worst: str
    share: float
    """Of the values of the worst, 0 to 1."""


class Picture(NamedTuple):
    """A calibration image, or one that was refused."""

    image: Markup
    reason: str


def make(facts: Facts) -> Section | None:
    """The section; None where no INT8 form was asked for."""
    choice, table = facts.choice, facts.table
    if choice is None or table is None:
        return None
    spec = facts.recipe.input
    held_out = {name: tensor.held_out_outside for name, tensor in table.tensors.items()}
    on_calibration, on_others = coverage(table, unseen=False), coverage(table, unseen=True)
    drawing = draw_ranges(table, held_out if table.held_out else {}, most=DRAWN)
    body = render(
        "calibration.html",
        choice=choice,
        table=table,
        per_class=choice.per_class(facts.dataset.classes),
        pictures=_chosen(choice, spec),
        refused=_refused(choice, spec),
        first=FIRST,
        drawing=svg(drawing, describe(table, on_calibration, DRAWN)),
        drawn=min(DRAWN, len(table.tensors)),
        on_calibration=on_calibration,
        on_others=on_others,
    )
    return Section("calibration", "Calibration", _lead(choice, table, on_others), body)


def coverage(table: Table, *, unseen: bool) -> Coverage:
    """What lies outside on images that ``table`` has not seen, or on those it was made from."""
    shares = {
        name: tensor.held_out_outside if unseen else tensor.clipped
        for name, tensor in table.tensors.items()
    }
    worst = max(shares, key=lambda name: shares[name])
    clipping = sum(share > 0 for share in shares.values())
    return Coverage(len(shares), clipping, worst, shares[worst])


def describe(table: Table, found: Coverage, drawn: int) -> str:
    """The drawing in words."""
    shown = min(drawn, found.tensors)
    which = "each tensor" if shown == found.tensors else f"the {shown} tensors that clip most"
    clips = (
        f"{found.worst} clips most, {found.share:.3%} of its values"
        if found.share
        else "none clips"
    )
    return (
        f"For {which} the range that was observed on {table.images} calibration images and the "
        f"part of it that INT8 represents, beside the share of values outside: {clips}"
    )


def _lead(choice: Choice, table: Table, found: Coverage) -> str:
    images = (
        f"{len(choice.chosen)} of {choice.candidates} training images of the field set the INT8 "
        f"ranges of {len(table.tensors)} tensors"
    )
    if not table.held_out:
        return f"{images}; no image was left over to test them on."
    return (
        f"{images}; on {table.held_out} others at most {found.share:.3%} of the values of any "
        "tensor lie outside."
    )


def _chosen(choice: Choice, spec: InputSpec) -> list[Picture]:
    return [
        Picture(
            thumbnail(
                image.path, image.sha256, spec,
                f"calibration image {number}, {image.label or UNLABELLED}",
            ),
            image.reason,
        )
        for number, image in enumerate(choice.chosen, 1)
    ]  # fmt: skip


def _refused(choice: Choice, spec: InputSpec) -> list[Picture]:
    pictures = []
    for image in choice.refused:
        name = Path(image.path).name
        source = data_url(Path(image.path), spec)
        shown = Markup('<span class="gone">no picture</span>')
        if source:
            shown = Markup('<img loading="lazy" alt="refused: {}" src="{}">').format(name, source)
        pictures.append(Picture(shown, f"{name}: {image.reason}"))
    return pictures
