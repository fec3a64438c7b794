"""Judge from what a line published how it stands: a word for all of it, and what to look at.

Pure: age and time are arguments. What is old or absent is unknown, and unknown is never healthy.
"""

import datetime
from collections.abc import Iterator
from typing import NamedTuple, get_args

from runtime.delivery.fleet_health import LEVELS, SOON, Level, span
from runtime.line.page.snapshot import Absent, Snapshot
from runtime.line.verdict import Word

STALE_S = 5.0
"""The loop publishes every second; a disk that is busy may hold it up a little."""

_FLAGGED, _FLAGGED_FRAMES = 0.1, 3
"""Share and number of the last minute's frames with a flag that are no accident any more."""

_ABSTAINED, _ABSTAINED_FRAMES = 0.5, 10
_DROPPED = 0.01
_LITTLE_DISK, _NO_DISK = 1024**3, 100 * 1024**2


class Alarm(NamedTuple):
    """One thing to look at."""

    level: Level
    sentence: str


class Standing(NamedTuple):
    """How the line stands."""

    level: Level
    """That of the gravest alarm."""
    word: str
    sentence: str
    alarms: tuple[Alarm, ...]
    """Gravest first."""
    current: bool
    """Whether anything that was published says how the line is now."""


def judge(published: Snapshot | Absent, age_s: float | None, now: datetime.datetime) -> Standing:
    """How the line stands that published this ``age_s`` seconds ago; None is before a restart."""
    if isinstance(published, Absent):
        return Standing("unknown", "No news", published.reason, (), current=False)
    if published.phase == "stopped":
        why = f"The line was stopped {_ago(age_s)}. {published.said}".strip()
        return Standing("unknown", "Stopped", why, (), current=False)
    if age_s is None or age_s > STALE_S:
        why = f"The line was last heard of {_ago(age_s)}. Nothing below is current."
        return Standing("unknown", "Stale", why, (), current=False)
    alarms = sorted(_alarms(published, now), key=lambda alarm: LEVELS.index(alarm.level))
    level = alarms[0].level if alarms else "healthy"
    return Standing(level, *_what_it_does(published), tuple(alarms), current=True)


def _what_it_does(snapshot: Snapshot) -> tuple[str, str]:
    if snapshot.phase == "starting":
        return "Starting", snapshot.said
    if not snapshot.last_minute:
        return "Waiting", "No frame came in the last minute."
    newest = snapshot.strip[-1][1]
    if newest == "NOT INSPECTED":
        return "Not inspecting", "The newest frame was not inspected."
    return "Inspecting", f"{snapshot.per_second:.1f} frames a second."


def _alarms(snapshot: Snapshot, now: datetime.datetime) -> Iterator[Alarm]:
    yield from _cameras(snapshot)
    yield from _verdicts(snapshot)
    yield from _flags(snapshot)
    yield from _drift(snapshot)
    yield from _model(snapshot)
    yield from _machine(snapshot)
    yield from _results(snapshot)
    yield from _update(snapshot, now)


def _cameras(snapshot: Snapshot) -> Iterator[Alarm]:
    for camera in snapshot.cameras:
        if camera.fault:
            yield Alarm("failing", f"{camera.name}: {camera.fault}")
    frames = sum(snapshot.verdicts.values())
    dropped = sum(camera.dropped for camera in snapshot.cameras)
    if dropped > _DROPPED * (frames + dropped):
        yield Alarm("attention", f"{dropped:,} frames were dropped, {frames:,} were judged.")


def _verdicts(snapshot: Snapshot) -> Iterator[Alarm]:
    lately = {
        word: sum(minute.verdicts.get(word, 0) for minute in snapshot.minutes[-2:])
        for word in get_args(Word)
    }
    frames, missed = sum(lately.values()), lately["NOT INSPECTED"]
    if snapshot.strip and snapshot.strip[-1][1] == "NOT INSPECTED":
        reason = next((f.reason for f in snapshot.notable if f.verdict == "NOT INSPECTED"), "")
        yield Alarm("failing", f"The newest frame was not inspected: {reason}")
    elif missed:
        yield Alarm(
            "attention", f"{missed:,} of {frames:,} frames of the last two minutes were not "
            "inspected.",
        )  # fmt: skip
    abstained = lately["ABSTAIN"]
    if abstained >= max(_ABSTAINED_FRAMES, _ABSTAINED * frames):
        yield Alarm(
            "attention", f"The model abstains: {abstained:,} of {frames:,} frames of the last two "
            "minutes.",
        )  # fmt: skip


def _flags(snapshot: Snapshot) -> Iterator[Alarm]:
    for flag in snapshot.flags:
        if flag.recent >= max(_FLAGGED_FRAMES, _FLAGGED * snapshot.last_minute):
            yield Alarm(
                "attention", f"{flag.recent:,} of {snapshot.last_minute:,} frames of the last "
                f"minute are {flag.word}.",
            )  # fmt: skip


def _drift(snapshot: Snapshot) -> Iterator[Alarm]:
    drifted = [drift for drift in snapshot.drift or () if drift.drifted]
    if drifted:
        what = ", ".join(drift.of for drift in drifted)
        least = min(drift.p_value for drift in drifted)
        why = drifted[0].sentence or f"p = {least:.2g}"
        yield Alarm("attention", f"Drift of {what}: {why}")


def _model(snapshot: Snapshot) -> Iterator[Alarm]:
    if snapshot.engine and snapshot.engine.degraded:
        yield Alarm("attention", f"A slower engine runs: {snapshot.engine.degraded}")
    if snapshot.model and snapshot.model.trial:
        yield Alarm("attention", snapshot.model.trial)
    if snapshot.model and not snapshot.model.verified:
        yield Alarm("attention", f"Adaptation {snapshot.model.adaptation}")


def _machine(snapshot: Snapshot) -> Iterator[Alarm]:
    heat = snapshot.heat
    if heat and heat.share < 1:
        yield Alarm("attention", f"Works {heat.share:.0%} of the time: {heat.reason}")
    elif heat and heat.throttling:
        yield Alarm("attention", f"Slowed down by heat: {', '.join(heat.throttling)}")
    for disk in snapshot.disks:
        if disk.free < _LITTLE_DISK:
            level: Level = "failing" if disk.free < _NO_DISK else "attention"
            yield Alarm(level, f"{disk.path}: only {disk.free / 1024**2:,.0f} MiB are free.")


def _results(snapshot: Snapshot) -> Iterator[Alarm]:
    outbox = snapshot.outbox
    if outbox and outbox.fault:
        where = f" to {outbox.to}" if outbox.to else ""
        yield Alarm(
            "attention", f"Results are not sent{where}, {outbox.rows:,} wait: {outbox.fault}"
        )


def _update(snapshot: Snapshot, now: datetime.datetime) -> Iterator[Alarm]:
    update = snapshot.update
    if update is None:
        return
    for role, expires in sorted(update.expires.items()):
        left = expires - now
        if left < datetime.timedelta():
            yield Alarm("attention", f"The {role} metadata expired: no update will be taken.")
        elif left < SOON.get(role, datetime.timedelta()):
            yield Alarm("attention", f"The {role} metadata expires in {span(left)}.")
    if update.failed:
        yield Alarm("attention", f"The last update failed: {update.outcome}")


def _ago(age_s: float | None) -> str:
    if age_s is None:
        return "before this machine was started again"
    return f"{span(datetime.timedelta(seconds=age_s))} ago"
