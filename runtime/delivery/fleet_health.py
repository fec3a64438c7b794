"""Judge how devices are from what they signed: healthy or not, each with its reasons.

Pure: the time is an argument, and nothing is read. Whoever has not been heard of is unknown, and
unknown is never healthy.
"""

import datetime
from collections.abc import Sequence
from typing import Literal, NamedTuple

from runtime.delivery.status_document import Status

Level = Literal["healthy", "attention", "failing", "unknown"]
LEVELS: tuple[Level, ...] = ("failing", "unknown", "attention", "healthy")
"""From the one to look at first."""

EXPECTED = datetime.timedelta(hours=24)
"""A device that reports less often than this is not known to be well."""

CLOCK_SLACK = datetime.timedelta(minutes=5)
SOON = {
    "root": datetime.timedelta(days=30),
    "targets": datetime.timedelta(days=30),
    "snapshot": datetime.timedelta(days=3),
    "timestamp": datetime.timedelta(days=3),
}
"""People sign root and targets, and need notice; a machine renews the other two."""

_LEAST_MEMORY = 0.05
_PROVIDERS = ("cpu", "cuda", "tensorrt")
NOT_EQUIPPED = ("missing library", "no device", "too slow", "not wanted")
"""Faults of engines that a device was never meant to have; any other is a step down."""


class Health(NamedTuple):
    """A level, and every reason that it is not a better one; a healthy device has none."""

    level: Level
    reasons: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """Whether a condition holds, and why, in sentences."""

    ok: bool
    reasons: tuple[str, ...]


def judge(
    status: Status, now: datetime.datetime, expected: datetime.timedelta = EXPECTED
) -> Health:
    """How the device is that signed ``status``, when it should report at least every ``expected``.

    The level is that of the gravest reason.
    """
    found = [
        *_age(status, now, expected),
        *_bundle(status),
        *_engine(status),
        *_drift(status),
        *_update(status, now),
        *_machine(status),
    ]
    for level in LEVELS:
        if any(level == its for its, _ in found):
            return Health(level, tuple(reason for _, reason in sorted(found, key=_gravity)))
    return Health("healthy")


def healthy_canaries(
    documents: Sequence[Status],
    bundle_sha256: str,
    count: int,
    duration: datetime.timedelta,
    now: datetime.datetime,
    expected: datetime.timedelta = EXPECTED,
) -> Verdict:
    """Whether ``count`` devices have run this bundle, healthy, for ``duration``.

    ``documents`` were verified, one a device. How long a device has run the bundle is reckoned
    from its first report with it to its last one: what came after that, nobody knows. Devices
    that run another bundle count neither way; one that gave this bundle up, or runs it badly,
    speaks against it.
    """
    good, reasons = [], []
    against = False
    for status in documents:
        who = f"{status.name} ({status.device[:8]})"
        if status.bundle is None or status.bundle.sha256 != bundle_sha256:
            if status.slots and status.slots.gave_up == bundle_sha256:
                against = True
                reasons.append(f"{who}: gave it up: {status.slots.failure}")
            continue
        health = judge(status, now, expected)
        if health.level != "healthy":
            against = against or health.level == "failing"
            reasons.append(f"{who}: {health.level}: {'; '.join(health.reasons)}")
            continue
        since = status.bundle.since
        if since is None:
            reasons.append(f"{who}: nobody knows since when, its clock was wrong")
        elif (ran := status.moment.seen - since) < duration:
            reasons.append(f"{who}: has run it for {span(ran)} of {span(duration)}")
        else:
            good.append(f"{who}: healthy with it for {span(ran)}")
    total = f"{len(good)} of {count} devices have run it, healthy, for {span(duration)}"
    if against:
        total += "; at least one device speaks against it"
    return Verdict(len(good) >= count and not against, (total, *reasons, *good))


def span(time: datetime.timedelta) -> str:
    """A time for people, in the largest unit that it has two of: ``90 s``, ``24 h``, ``8 days``."""
    seconds = max(0, int(time.total_seconds()))
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


_Finding = tuple[Level, str]


def _gravity(finding: _Finding) -> int:
    return LEVELS.index(finding[0])


def _age(status: Status, now: datetime.datetime, expected: datetime.timedelta) -> list[_Finding]:
    moment = status.moment
    age = now - moment.seen
    if age < -CLOCK_SLACK:
        return [("unknown", f"its clock is {span(-age)} ahead, so its age cannot be told")]
    floor = status.update.time_floor if status.update else None
    if floor and moment.seen < floor:
        return [("unknown", f"its clock is behind {floor:%Y-%m-%d}, so its age cannot be told")]
    if age > expected:
        whose = "" if moment.synchronised else ", by a clock that nothing keeps right"
        return [
            ("unknown", f"not heard of for {span(age)}, expected every {span(expected)}{whose}")
        ]
    if not moment.synchronised:
        return [("attention", "nothing keeps its clock right")]
    return []


def _bundle(status: Status) -> list[_Finding]:
    found: list[_Finding] = []
    slots = status.slots
    if status.bundle is None:
        found.append(("failing", "runs no bundle"))
    if slots and slots.pending:
        found.append(
            ("attention", f"{slots.pending[:12]} is on trial, {slots.tries_left} tries left")
        )
    since = status.bundle.since if status.bundle else None
    if slots and slots.failure and not (since and slots.failed and since > slots.failed):
        found.append(("failing", f"gave up {slots.failure}"))
    return found


def _engine(status: Status) -> list[_Finding]:
    engine = status.engine
    if engine is None:
        return [("attention", "no engine of its bundle is known")] if status.bundle else []
    if engine.required and _PROVIDERS.index(engine.provider) < _PROVIDERS.index(engine.required):
        return [("failing", f"runs on {engine.provider}, {engine.required} is required")]
    return [
        ("attention", f"stepped down: {step.candidate}: {step.fault}: {step.reason}")
        for step in engine.passed_over
        if step.fault not in NOT_EQUIPPED
    ]


def _drift(status: Status) -> list[_Finding]:
    drift = status.drift
    return [("attention", f"drifts: {drift.sentence}")] if drift and drift.drifted else []


def _update(status: Status, now: datetime.datetime) -> list[_Finding]:
    update = status.update
    if update is None:
        return []
    found: list[_Finding] = []
    for role, expires in sorted(update.expires.items()):
        left = expires - now
        if left < datetime.timedelta():
            found.append(
                ("failing", f"its {role} metadata expired {span(-left)} ago: it takes no update")
            )
        elif left < SOON.get(role, CLOCK_SLACK):
            found.append(("attention", f"its {role} metadata expires in {span(left)}"))
    if update.failed:
        found.append(("attention", f"last update failed: {update.outcome}"))
    return found


def _machine(status: Status) -> list[_Finding]:
    machine = status.machine
    found: list[_Finding] = []
    if machine.throttling:
        found.append(("attention", f"slowed down by heat: {', '.join(machine.throttling)}"))
    total, available = machine.memory_total, machine.memory_available
    if total and available is not None and available < total * _LEAST_MEMORY:
        found.append(("attention", f"only {available / total:.1%} of its memory is available"))
    return found
