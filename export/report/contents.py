"""What a report holds, in the order in which it is read."""

from collections.abc import Callable, Iterable
from pathlib import Path

from export.report import (
    answers,
    calibration,
    flipped,
    ladder,
    precision,
    reproduce,
    retention,
    robustness,
    samples,
    selective,
    verdict,
)
from export.report.facts import Facts
from export.report.page import Make, write_page


def sections() -> tuple[Make, ...]:
    """All there are, in reading order."""
    return (
        verdict.make, ladder.make, samples.make, answers.make, flipped.make, retention.make,
        robustness.make, calibration.make, precision.make, selective.make, reproduce.make,
    )  # fmt: skip


def write_report(
    path: Path, facts: Facts, track: Callable[[Iterable[Make]], Iterable[Make]]
) -> None:
    """Write the report on ``facts``; ``track`` is passed the sections, and passes them on."""
    write_page(path, facts, track(sections()))
