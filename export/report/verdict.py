"""The first section: what ships, what does not, whether it is proven, and what a device will do.

The figures and words are those of the table at the end of an export.
"""

import math
from collections.abc import Sequence

from export import table
from export.gate import without_int8
from export.release import FormReport, Release
from export.report.facts import Facts
from export.report.page import Section, Tile, render


def make(facts: Facts) -> Section:
    """The verdict on the release of ``facts``."""
    release = facts.release
    body = render(
        "verdict.html",
        release=release,
        written=facts.manifest is not None,
        why_not=without_int8(release.forms),
        tiles=tiles(facts),
        title=table.title(release),
        columns=table.COLUMNS,
        rows=table.rows(release),
        remarks=table.remarks(release),
        abstains=abstains(release),
    )
    return Section(
        "verdict", "Verdict", headline(release, written=facts.manifest is not None), body
    )


def headline(release: Release, *, written: bool) -> str:
    """What ships, in a sentence."""
    shipped = [report.form for report in release.forms if report.released]
    refused = [report.form for report in release.forms if not report.released]
    if not written:
        return f"Nothing ships. {_listed(refused)} did not pass, so no bundle was written."
    if refused:
        return f"{_listed(shipped)} ship; {_listed(refused)} did not pass."
    return f"{_listed(shipped)} ship: every form that was asked for passed."


def tiles(facts: Facts) -> list[Tile]:
    """The few figures that are looked for first; those that were not measured are left out."""
    release, rungs = facts.release, facts.training.rungs
    domain = f"{release.field}-test"
    kept = next(rung for rung in rungs if rung.kept)
    before, after = rungs[0].scores.get(domain), kept.scores.get(domain)
    found = []
    if after is not None and after.accuracy is not None:
        words = "accuracy in the field"
        value = table.share(after.accuracy)
        if before is not None and kept is not rungs[0]:
            value = f"{table.share(before.accuracy)} → {value}"
            words += ", source model → adapted"
        found.append(Tile(value, words))
    shipped = [report for report in release.forms if report.released and facts.manifest]
    if shipped:
        smallest = min(shipped, key=lambda report: report.bytes)
        found.append(Tile(f"{smallest.bytes / 1e6:.1f} MB", f"smallest form, {smallest.form}"))
        fastest = max(shipped, key=_speed)
        if _speed(fastest) > 1:
            words = f"fp32's speed on one core, {fastest.form}"
            found.append(Tile(f"{_speed(fastest):.2f}×", words))
    found.append(Tile(str(release.reference.samples), "held-out field images judged it"))
    return found


def abstains(release: Release) -> str | None:
    """What the chosen threshold does on test images, over all forms; None if it never abstains."""
    tested = release.abstention.tested if release.abstention else ()
    errors = [one.error for one in tested if one.error is not None]
    if not errors:
        return None
    silent = _range([1 - one.coverage for one in tested])
    return (
        f"On the test images, over all forms, it abstains on {silent}, and {_range(errors)} of "
        "the answers that it gives are wrong"
    )


def _speed(report: FormReport) -> float:
    return -math.inf if report.relative_speed is None else report.relative_speed


def _range(shares: Sequence[float]) -> str:
    low, high = table.share(min(shares)), table.share(max(shares))
    return low if low == high else f"{low} to {high}"


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
