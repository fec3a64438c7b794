"""What the soak counts as an error, and how it measures memory that grows."""

import pytest

from benchmarks.soak import DAMAGED_EVERY, Outcome, Sample, errors, report, slope_mb_per_hour

SENT = 2 * DAMAGED_EVERY
SOUND = {
    f"{number:08}.png": "NOT INSPECTED" if number % DAMAGED_EVERY == DAMAGED_EVERY - 1 else "OK"
    for number in range(SENT)
}
STEADY = [Sample(float(second), 100.0) for second in range(60)]
OUTCOME = Outcome(SENT, SOUND, [1.0] * 99 + [2.0], [5.0] * 100, STEADY, 0, "")


def test_a_sound_run_has_no_errors_and_a_flat_memory() -> None:
    assert errors(OUTCOME) == []
    assert slope_mb_per_hour(STEADY) == pytest.approx(0.0, abs=1e-6)
    rows = report(OUTCOME, 1.0).tables[0].rows
    assert ("wrong or missing verdicts", "0") in rows
    assert ("inspection p99 / p50", "1.01") in rows


def test_missing_wrong_and_unfounded_verdicts_and_a_bad_end_are_errors() -> None:
    verdicts = {**SOUND, "00000003.png": "NOT INSPECTED", f"{DAMAGED_EVERY - 1:08}.png": "OK"}
    del verdicts["00000007.png"]
    found = errors(OUTCOME._replace(verdicts=verdicts, exit_code=1, said="it fell over"))
    assert found == [
        "00000003.png: NOT INSPECTED", "00000007.png: no verdict",
        f"{DAMAGED_EVERY - 1:08}.png: OK", "it ended with 1: it fell over",
    ]  # fmt: skip


def test_memory_that_grows_after_the_warm_up_is_seen_and_that_before_is_not() -> None:
    filling = [Sample(float(s), min(100.0, 10.0 * s)) for s in range(100)]
    assert slope_mb_per_hour(filling) == pytest.approx(0.0, abs=1e-6)
    leaking = [Sample(float(s), 100.0 + s / 3600) for s in range(100)]
    assert slope_mb_per_hour(leaking) == pytest.approx(1.0)
