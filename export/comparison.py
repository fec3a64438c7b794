"""Two releases side by side: each figure of both, which is better, and whether that is sure.

Pure: two records in, lines and sentences out. It knows neither files nor how they are shown.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from export.parity import CONFIDENCE
from export.release import FormReport, Release
from export.selective import Tested
from runtime import metrics
from runtime.manifest import Manifest, Quality

Interval = tuple[float, float]
Unit = Literal["share", "decibels", "megabytes", "times", "score", "count"]
Better = Literal["A", "B", ""]

MODEL, BUNDLE = "model", "bundle"
"""What a figure is of, where it is not of a form."""

DIGEST = 12
"""Characters of a digest that are shown."""

LARGEST_DB = 200.0
"""Quality.sqnr_db ends there: no difference at all."""

EXACT: tuple[Unit, ...] = ("megabytes",)
"""Counted, not estimated from images."""


class Side(NamedTuple):
    """One of the two bundles: what it says, and the release that it carries."""

    path: str
    manifest: Manifest
    release: Release

    @property
    def name(self) -> str:
        """Name and version."""
        return f"{self.release.name} {self.release.version}"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.manifest.files)


class Value(NamedTuple):
    """A figure; None where it was not measured."""

    value: float | None = None
    interval: Interval | None = None


class Measure(NamedTuple):
    """What a figure is, and which way is better: 1 more, -1 less, 0 neither."""

    what: str
    unit: Unit
    direction: int


class Line(NamedTuple):
    """One figure of both."""

    of: str
    """A form, MODEL or BUNDLE."""
    what: str
    one: str
    """A's, in words, without its interval."""
    other: str
    change: str
    """B's less A's."""
    better: Better
    proven: bool
    """Whether more than two points says so: intervals that are apart, or an exact count."""
    reason: str
    intervals: tuple[Interval, Interval] | None = None

    @property
    def verdict(self) -> str:
        """The decision in a word or three."""
        if self.better:
            return self.better if self.proven else f"{self.better}, unproven"
        return self.reason


class Comparison(NamedTuple):
    """What two releases differ in."""

    headline: str
    doubts: tuple[str, ...]
    """Why figures of the two may not be held against each other."""
    lines: tuple[Line, ...]
    records: tuple[str, ...]
    """A unified diff of everything else that the two say; empty if it is the same."""


ACCURACY = Measure("accuracy", "share", 1)
BALANCED = Measure("balanced accuracy", "share", 1)
WORST_RECALL = Measure("worst recall", "share", 1)
AUC = Measure("AUC", "score", 1)
AGREEMENT = Measure("agrees with its checkpoint", "share", 1)
SIGNAL = Measure("SQNR", "decibels", 1)
SIZE = Measure("size", "megabytes", -1)
SPEED = Measure("speed against its fp32", "times", 1)
ANSWERED = Measure("answered", "share", 1)
WRONG = Measure("wrong among the answers", "share", -1)
THRESHOLD = Measure("abstains below", "score", 0)
STATISTICS = Measure("images in reference statistics", "count", 0)
FLAGGED = Measure("false notices of image quality", "share", -1)
ALARMED = Measure("false alarms of image quality", "share", -1)


def compare(one: Side, other: Side) -> Comparison:
    """Hold ``one``, called A, against ``other``, called B."""
    lines = tuple(_lines(one, other))
    return Comparison(
        headline=headline(lines),
        doubts=tuple(doubts(one, other)),
        lines=lines,
        records=records(one, other),
    )


def doubts(one: Side, other: Side) -> Iterator[str]:
    """Why the figures of the two may not be held against each other, a sentence each."""
    a, b = one.release, other.release
    if one.manifest.digest == other.manifest.digest:
        yield "A and B are the same bundle"
        return
    if one.manifest.labels != other.manifest.labels:
        yield (
            f"different labels, so the two answer different questions: A knows "
            f"{', '.join(one.manifest.labels)}; B knows {', '.join(other.manifest.labels)}"
        )
    if not a.judged_sha256 or not b.judged_sha256:
        yield "it is not recorded which images they were judged on: figures are not paired"
    elif a.judged_sha256 != b.judged_sha256:
        yield (
            f"judged on different images (A on {a.reference.samples}, B on {b.reference.samples}): "
            "figures are not paired, and a difference may be of the images; judge both on the same "
            "with python -m export gate BUNDLE --data IMAGES"
        )
    if a.gate != b.gate:
        yield "they passed different budgets: see gate among what differs in their making"
    if a.machine != b.machine:
        yield f"speed was measured on different machines: A on {a.machine}, B on {b.machine}"


def headline(lines: Sequence[Line]) -> str:
    """Which is proven better on what, in a sentence."""
    parts = []
    for side in ("A", "B"):
        won = [line for line in lines if line.better == side and line.proven]
        if alone := [line.of for line in won if line.what == SHIPS]:
            parts.append(f"only {side} ships {_listed(alone)}")
        if kinds := list(dict.fromkeys(line.what for line in won if line.what != SHIPS)):
            parts.append(f"{side} is better on {_listed(kinds)}")
    if parts:
        sentence = "; ".join(parts)
        return sentence[0].upper() + sentence[1:]
    if all(line.reason == EQUAL for line in lines if line.reason):
        return "No figure differs"
    return "Nothing is proven better: intervals overlap, or none was recorded"


def spoken(lines: Sequence[Line], better: Better, *, proven: bool) -> tuple[str, ...]:
    """What ``better`` is better on, a sentence for each kind of figure."""
    won = [line for line in lines if line.better == better and line.proven == proven]
    sentences = [f"it ships {line.of}; {line.reason}" for line in won if line.what == SHIPS]
    for what in dict.fromkeys(line.what for line in won if line.what != SHIPS):
        pairs = ", ".join(_pair(line, better) for line in won if line.what == what)
        sentences.append(f"{what}: {pairs}")
    return tuple(sentences)


def records(one: Side, other: Side) -> tuple[str, ...]:
    """A unified diff of what the two say of their making; empty if they say the same."""
    names = (f"A {one.name}", f"B {other.name}")
    return tuple(difflib.unified_diff(_told(one), _told(other), *names, n=1, lineterm=""))


EQUAL = "equal"
OVERLAP = "not told apart"
MISSING = "not measured for both"
SHIPS = "ships"


def hold(of: str, measure: Measure, one: Value, other: Value) -> Line:
    """One figure of A against that of B.

    Overlapping intervals are no proof that two are equal, and none that they differ: nobody is
    called better. Without intervals the larger figure is, and it is said that nothing proves it.
    """
    line = Line(
        of=of,
        what=measure.what,
        one=words(one.value, measure.unit),
        other=words(other.value, measure.unit),
        change="",
        better="",
        proven=False,
        reason="",
    )
    if one.value is None or other.value is None:
        return line._replace(reason=MISSING)
    line = line._replace(change=_change(other.value - one.value, measure.unit))
    if one.interval is not None and other.interval is not None:
        line = line._replace(intervals=(one.interval, other.interval))
    if line.one == line.other:
        return line._replace(change="", reason=EQUAL)
    if measure.direction == 0:
        return line
    ahead: Better = "B" if (other.value - one.value) * measure.direction > 0 else "A"
    if line.intervals is not None:
        (low, high), (lower, higher) = line.intervals
        if low <= higher and lower <= high:
            return line._replace(reason=OVERLAP)
        return line._replace(better=ahead, proven=True, reason="the intervals are apart")
    if measure.unit in EXACT:
        return line._replace(better=ahead, proven=True, reason="counted")
    return line._replace(better=ahead, reason="no interval was recorded")


def words(value: float | None, unit: Unit) -> str:
    """``value`` as it is shown; a dash where it was not measured."""
    if value is None:
        return "-"
    if unit == "decibels":
        return "exact" if value >= LARGEST_DB else f"{value:.1f} dB"
    shown = {
        "share": f"{value:.1%}",
        "megabytes": f"{value / 1e6:.2f} MB",
        "times": f"{value:.2f}x",
        "score": f"{value:.3f}",
        "count": f"{value:,.0f}",
    }
    return shown[unit]


def _change(value: float, unit: Unit) -> str:
    shown = {
        "share": f"{100 * value:+.1f} points",
        "decibels": f"{value:+.1f} dB",
        "megabytes": f"{value / 1e6:+.2f} MB",
        "times": f"{value:+.2f}x",
        "score": f"{value:+.3f}",
        "count": f"{value:+,.0f}",
    }
    return shown[unit]


def _lines(one: Side, other: Side) -> Iterator[Line]:
    a, b = one.release, other.release
    yield from _quality(MODEL, a.reference, b.reference)
    for form in dict.fromkeys(report.form for report in (*a.forms, *b.forms)):
        yield from _form(form, a, b)
    yield hold(BUNDLE, SIZE, Value(one.size), Value(other.size))
    yield hold(
        BUNDLE, THRESHOLD, Value(one.manifest.abstain_below), Value(other.manifest.abstain_below)
    )
    for ours, theirs in zip(_statistics(a), _statistics(b), strict=True):
        yield hold(BUNDLE, ours[0], ours[1], theirs[1])


def _quality(of: str, one: Quality, other: Quality) -> Iterator[Line]:
    yield hold(of, ACCURACY, accuracy(one), accuracy(other))
    yield hold(of, BALANCED, Value(one.balanced_accuracy), Value(other.balanced_accuracy))
    yield hold(of, WORST_RECALL, Value(one.worst_recall), Value(other.worst_recall))
    yield hold(of, AUC, Value(one.auc), Value(other.auc))


def accuracy(quality: Quality) -> Value:
    """With Wilson's interval, at the gate's confidence."""
    if quality.accuracy is None:
        return Value()
    hits = round(quality.accuracy * quality.labelled)
    interval = metrics.wilson_interval(hits, quality.labelled, confidence=CONFIDENCE)
    return Value(quality.accuracy, interval)


def _form(form: str, one: Release, other: Release) -> Iterator[Line]:
    a, b = _report(one, form), _report(other, form)
    if not (a and b and a.released and b.released):
        yield _shipping(form, a, b)
        return
    if form != "fp32":  # which is the model
        before, after = a.attempts[-1].quality, b.attempts[-1].quality
        yield from _quality(form, before, after)
        yield hold(
            form, AGREEMENT, Value(before.agreement, before.agreement_interval),
            Value(after.agreement, after.agreement_interval),
        )  # fmt: skip
        yield hold(form, SIGNAL, Value(before.sqnr_db), Value(after.sqnr_db))
    yield hold(form, SIZE, Value(a.bytes), Value(b.bytes))
    if form != "fp32" and (a.relative_speed or b.relative_speed):
        yield hold(form, SPEED, Value(a.relative_speed), Value(b.relative_speed))
    yield from _abstaining(form, one, other)


def _shipping(form: str, one: FormReport | None, other: FormReport | None) -> Line:
    ships = [report is not None and report.released for report in (one, other)]
    missing = other if ships[0] else one
    why = "was not asked for" if missing is None else f"was refused: {missing.reason}"
    better: Better = "A" if ships[0] else "B" if ships[1] else ""
    return Line(
        of=form, what=SHIPS, one=_fate(one), other=_fate(other), change="", better=better,
        proven=bool(better), reason=f"in the other it {why}" if better else "in neither bundle",
    )  # fmt: skip


def _fate(report: FormReport | None) -> str:
    return "not asked for" if report is None else "ships" if report.released else "refused"


def _abstaining(form: str, one: Release, other: Release) -> Iterator[Line]:
    """What becomes of the test images; of more answers only where as many may be wrong."""
    ours, theirs = _tested(one, form), _tested(other, form)
    if ours is None or theirs is None:
        return
    same = _allowed(one) == _allowed(other)
    measure = ANSWERED if same else ANSWERED._replace(direction=0)
    yield hold(form, measure, Value(ours.coverage), Value(theirs.coverage))
    yield hold(
        form, WRONG, Value(ours.error, ours.error_interval),
        Value(theirs.error, theirs.error_interval),
    )  # fmt: skip


def _allowed(release: Release) -> float | None:
    return None if release.abstention is None else release.abstention.max_error


def _report(release: Release, form: str) -> FormReport | None:
    return next((report for report in release.forms if report.form == form), None)


def _tested(release: Release, form: str) -> Tested | None:
    tested = release.abstention.tested if release.abstention else ()
    return next((point for point in tested if point.form == form), None)


def _statistics(release: Release) -> tuple[tuple[Measure, Value], ...]:
    found = release.statistics
    if found is None:
        return ((STATISTICS, Value()), (FLAGGED, Value()), (ALARMED, Value()))
    shares = ((FLAGGED, found.flagged), (ALARMED, found.alarmed))
    return (
        (STATISTICS, Value(found.images)),
        *((measure, _of_tests(share, release)) for measure, share in shares),
    )


def _of_tests(share: float, release: Release) -> Value:
    images = release.reference.samples
    interval = metrics.wilson_interval(round(share * images), images, confidence=CONFIDENCE)
    return Value(share, interval)


def _pair(line: Line, better: Better) -> str:
    mine, theirs = (line.one, line.other) if better == "A" else (line.other, line.one)
    return f"{line.of} {mine} against {theirs}"


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _told(side: Side) -> list[str]:
    """What a bundle says of its making, a fact a line."""
    manifest, release = side.manifest, side.release
    facts: dict[str, object] = {
        "labels": manifest.labels,
        "ok labels": manifest.ok_labels,
        "required provider": manifest.required_provider,
        "input": msgspec.to_builtins(manifest.input),
        "adaptation": msgspec.to_builtins(release.adaptation),
        "field": release.field,
        "test images": release.reference.samples,
        "of them labelled": release.reference.labelled,
        "seed": release.seed,
        "gate": msgspec.to_builtins(release.gate),
        "temperature": round(manifest.temperature, 4),
        "max_error_accepted": _allowed(release),
        "forms": {report.form: _made(report) for report in release.forms},
        "sha256": {
            "recipe": release.recipe_sha256[:DIGEST],
            "images": release.dataset_sha256[:DIGEST],
            "judged images": release.judged_sha256[:DIGEST],
            "checkpoint": release.checkpoint_sha256[:DIGEST],
        },
        "machine": release.machine,
        "versions": release.versions,
        "git": release.git,
    }
    return list(_flat("", facts))


def _made(report: FormReport) -> str:
    if not report.released:
        return f"refused: {report.reason}"
    last = report.attempts[-1]
    return f"{last.rung or 'ships'}, {len(last.kept_float)} layers kept float"


def _flat(prefix: str, facts: Mapping[str, object]) -> Iterator[str]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}: ", value)
        else:
            listed = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            yield f"{prefix}{name} = {'-' if listed in (None, '') else listed}"
