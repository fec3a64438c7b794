"""Health is a decision with its reasons: nothing is healthy that nobody has heard of."""

import datetime
from typing import Any

import msgspec
import pytest

from runtime.delivery.fleet_health import healthy_canaries, judge, span
from runtime.delivery.status_document import BundleStatus, Drift, PassedOver, SlotStatus, Status
from tests.signed_devices import NOW, SHA, ago, healthy, moment

DAY = datetime.timedelta(days=1)


def test_nothing_speaks_against_a_healthy_device() -> None:
    assert judge(healthy(), NOW) == ("healthy", ())


def changed(part: str, **changes: Any) -> Status:
    status = healthy()
    return msgspec.structs.replace(
        status, **{part: msgspec.structs.replace(getattr(status, part), **changes)}
    )


def passed_over(fault: str) -> Status:
    step = PassedOver(candidate="tensorrt, int8", fault=fault, reason="so")
    return changed("engine", passed_over=(step,), required=None)


def drift(p_value: float) -> Drift:
    sentence = "score of good moved from 0.9 to 0.5"
    return Drift(p_value=p_value, threshold=5e-4, window=200, sentence=sentence)


BROKEN = "solar 1.3.0 (cdcdcdcdcdcd): NaN"
CASES = [
    (
        changed("moment", seen=ago(hours=25)), "unknown",
        "not heard of for 25 h, expected every 24 h",
    ),
    (changed("moment", seen=ago(hours=-1)), "unknown", "its clock is 60 min ahead"),
    (
        changed("moment", seen=ago(days=20_000), synchronised=False),
        "unknown",
        "its clock is behind 2026-10-26",
    ),
    (changed("moment", synchronised=False), "attention", "nothing keeps its clock right"),
    (healthy(bundle=None, engine=None), "failing", "runs no bundle"),
    (healthy(engine=None), "attention", "no engine of its bundle is known"),
    (changed("engine", provider="cpu"), "failing", "runs on cpu, tensorrt is required"),
    (
        changed("engine", provider="cpu", required="cuda"), "failing",
        "runs on cpu, cuda is required",
    ),
    (
        passed_over("failed self-test"), "attention",
        "stepped down: tensorrt, int8: failed self-test: so",
    ),
    (
        changed("slots", pending="cd" * 32, tries_left=2), "attention",
        "cdcdcdcdcdcd is on trial, 2 tries left",
    ),
    (changed("slots", failure=BROKEN, failed=ago(hours=1)), "failing", f"gave up {BROKEN}"),
    (healthy(drift=drift(1e-5)), "attention", "drifts: score of good moved"),
    (
        changed("update", expires={"timestamp": ago(days=2)}), "failing",
        "its timestamp metadata expired 2 days ago: it takes no update",
    ),
    (
        changed("update", expires={"root": NOW + 29 * DAY}), "attention",
        "its root metadata expires in 29 days",
    ),
    (
        changed("update", outcome="no route", failed=True), "attention",
        "last update failed: no route",
    ),
    (changed("machine", throttling=("cpu-throttle-alert",)), "attention", "slowed down by heat"),
    (
        changed("machine", memory_available=2**28), "attention",
        "only 3.1% of its memory is available",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("status", "level", "reason"), CASES, ids=[case[2] for case in CASES])
def test_what_is_wrong_is_said(status: Status, level: str, reason: str) -> None:
    health = judge(status, NOW)
    assert health.level == level
    assert [said for said in health.reasons if reason in said], health.reasons


@pytest.mark.parametrize(
    "status",
    [
        passed_over("missing library"),
        passed_over("no device"),
        changed("slots", failure=BROKEN, failed=ago(days=3)),
        changed("update", expires={"root": NOW + 31 * DAY, "timestamp": NOW + 4 * DAY}),
        changed("moment", seen=ago(minutes=-3)),
        healthy(update=None, slots=None),
        healthy(drift=drift(0.3)),
    ],
    ids=[
        "no library",
        "no gpu",
        "failed before its commit",
        "expires later",
        "slack",
        "no facts",
        "no drift",
    ],
)
def test_what_is_as_it_should_be_is_no_reason(status: Status) -> None:
    assert judge(status, NOW).level == "healthy"


def test_the_gravest_reason_decides_and_comes_first() -> None:
    status = msgspec.structs.replace(
        changed("moment", synchronised=False, seen=ago(days=3)), bundle=None
    )
    health = judge(status, NOW)
    assert health.level == "failing"
    assert health.reasons[0] == "runs no bundle"
    assert len(health.reasons) == 2


def test_a_site_that_reports_once_a_week_says_so() -> None:
    status = changed("moment", seen=ago(days=3))
    assert judge(status, NOW).level == "unknown"
    assert judge(status, NOW, 7 * DAY).level == "healthy"


# --- canaries


def canary(number: int, **changes: Any) -> Status:
    return healthy(f"{number:032x}", f"canary {number}", **changes)


def bundle(**changes: Any) -> BundleStatus:
    kept = healthy().bundle
    assert kept
    return msgspec.structs.replace(kept, **changes)


def test_enough_canaries_for_long_enough() -> None:
    verdict = healthy_canaries([canary(1), canary(2), canary(3)], SHA, 3, DAY, NOW)
    assert verdict.ok
    assert verdict.reasons[0] == "3 of 3 devices have run it, healthy, for 24 h"


SHORT = [
    (canary(3, bundle=bundle(since=ago(hours=23))), "has run it for 22 h of 24 h"),
    (canary(3, bundle=bundle(since=None)), "nobody knows since when"),
    (canary(3, moment=moment(seen=ago(hours=30))), "unknown: not heard of for 30 h"),
    (canary(3, moment=moment(synchronised=False)), "attention: nothing keeps its clock right"),
]


@pytest.mark.parametrize(("third", "reason"), SHORT, ids=[case[1] for case in SHORT])
def test_one_that_is_not_known_to_be_well_does_not_count(third: Status, reason: str) -> None:
    documents = [canary(1), canary(2), third]
    verdict = healthy_canaries(documents, SHA, 3, DAY, NOW)
    assert not verdict.ok
    assert verdict.reasons[0] == "2 of 3 devices have run it, healthy, for 24 h"
    assert [said for said in verdict.reasons if reason in said], verdict.reasons
    assert healthy_canaries(documents, SHA, 2, DAY, NOW).ok


def test_a_device_with_another_bundle_counts_neither_way() -> None:
    other = canary(2, bundle=bundle(sha256="cd" * 32), engine=None)
    assert healthy_canaries([canary(1), other], SHA, 1, DAY, NOW).ok
    assert not healthy_canaries([canary(1), other], SHA, 2, DAY, NOW).ok


def test_one_that_gave_it_up_or_runs_it_badly_is_enough_to_say_no() -> None:
    back = SlotStatus(gave_up=SHA, failure="solar 1.2.0: NaN", failed=ago(hours=1))
    gave_up = canary(4, bundle=bundle(sha256="cd" * 32), slots=back)
    slow = canary(4, engine=changed("engine", provider="cpu").engine)
    for bad in (gave_up, slow):
        verdict = healthy_canaries([canary(1), canary(2), bad], SHA, 2, DAY, NOW)
        assert not verdict.ok
        assert "at least one device speaks against it" in verdict.reasons[0]


def test_the_time_it_has_run_ends_with_its_last_word() -> None:
    """What a device did since it was last heard of, nobody knows."""
    since, seen = ago(hours=30), ago(hours=10)
    status = canary(1, bundle=bundle(since=since), moment=moment(seen=seen))
    assert not healthy_canaries([status], SHA, 1, DAY, NOW).ok
    assert healthy_canaries([status], SHA, 1, datetime.timedelta(hours=20), NOW).ok


def test_no_device_is_no_canary() -> None:
    assert not healthy_canaries([], SHA, 1, DAY, NOW).ok


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (60, "60 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (3600, "60 min"),
     (86_400, "24 h"), (172_800, "2 days")],
)  # fmt: skip
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert span(datetime.timedelta(seconds=seconds)) == text
