"""What a proof demands, decided without running one; and that none outlives who waits for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime.delivery.activation import Limits, judge, keep_limits, kept_limits
from runtime.delivery.live import Stability, Trial
from runtime.delivery.proof import Findings
from runtime.delivery.slots import Slots
from runtime.errors import UpdateError
from tests.model_zips import FOREVER, looping, model_zip

LABELS = ("good", "bad")


def findings(**changed: Any) -> Findings:
    """Of a bundle that takes 4 ms, beside one that takes 2 ms."""
    sound = Findings(
        labels=LABELS, width=2, engine="onnxruntime CPU, fp32", steps=(), p50_ms=4.0, p99_ms=5.0,
        beside_p50_ms=2.0, beside_labels=LABELS,
    )  # fmt: skip
    return msgspec.structs.replace(sound, **changed)


@pytest.mark.parametrize(
    ("changed", "limits", "fault"),
    [
        ({}, {}, None),
        ({"width": 3}, {}, "wrong shape"),
        ({"labels": LABELS[::-1]}, {}, "wrong labels"),
        ({"labels": ("good", "worn")}, {}, "wrong labels"),
        ({"labels": ("good", "worn")}, {"allow_new_labels": True}, None),
        ({"labels": LABELS[::-1], "beside_labels": None}, {}, None),
        ({"p50_ms": 6.0}, {}, None),
        ({"p50_ms": 6.1}, {}, "too slow"),
        ({"p50_ms": 6.1, "beside_p50_ms": None}, {}, None),
        ({"p50_ms": 6.1}, {"slower_than": 4.0}, None),
        ({"p50_ms": 0.9, "beside_p50_ms": 0.1}, {}, None),  # less than 1 ms more
        ({"p50_ms": 1.2, "beside_p50_ms": 0.1}, {}, "too slow"),
        ({"p50_ms": 99.0, "p99_ms": 99.0}, {"latency_ms": 100.0}, None),
        ({"p99_ms": 5.1}, {"latency_ms": 5.0}, "too slow"),
    ],
)
def test_what_a_slot_must_keep_to(
    changed: dict[str, Any], limits: dict[str, Any], fault: str | None
) -> None:
    refused = judge(findings(**changed), Limits(**limits))
    assert (refused.fault if refused else None) == fault


def test_other_labels_are_told_from_another_order() -> None:
    order = judge(findings(labels=LABELS[::-1]), Limits())
    others = judge(findings(labels=("good", "worn")), Limits())
    assert order is not None
    assert others is not None
    assert "in another order: bad, good; the slot that answers now has good, bad" in order.reason
    assert "others: good, worn" in others.reason


def test_a_few_slow_answers_are_not_the_models_fault() -> None:
    trial = Trial(Stability(60.0, 10), 5.0, started=0.0)
    assert [trial.answered(9.0) for _ in range(3)] == [None, None, None]
    assert trial.answered(5.0) is None
    assert trial.answered(9.0) == "too slow: 4 of 5 answers took more than 5.00 ms"
    patient = Trial(Stability(60.0, 10), 5.0, started=0.0)
    said = [patient.answered(9.0 if number % 100 == 0 else 1.0) for number in range(1, 1001)]
    assert set(said) == {None}  # 1 in 100
    assert Trial(Stability(), None, started=0.0).answered(1e9) is None


def test_a_trial_lasts_its_time_and_its_answers() -> None:
    trial = Trial(Stability(60.0, 2), None, started=100.0)
    trial.answered(1.0)
    assert not trial.stable(1000.0)
    trial.answered(1.0)
    assert not trial.stable(159.9)
    assert trial.stable(160.0)


def test_limits_travel_with_the_slot_and_damage_is_told(tmp_path: Path) -> None:
    slot = Slots(tmp_path / "state").stage(model_zip(tmp_path, "1"))
    assert kept_limits(slot) == Limits()
    keep_limits(slot, Limits(latency_ms=20.0, require="cuda"))
    assert kept_limits(slot) == Limits(latency_ms=20.0, require="cuda")
    (slot.folder / "limits.json").write_text('{"latency_ms": -1}')
    with pytest.raises(UpdateError, match="activate the slot again"):
        kept_limits(slot)


PROVE = """
import sys
from pathlib import Path
from runtime.delivery.activation import prove
from runtime.delivery.slots import Slots

slot = Slots(Path(sys.argv[1])).stage(Path(sys.argv[2]))
prove(slot, started=lambda process: print(process.pid, flush=True))
"""


def test_a_proof_that_hangs_ends_with_the_process_that_waits_for_it(tmp_path: Path) -> None:
    archive = model_zip(tmp_path, "2", model=looping(FOREVER))
    with subprocess.Popen(
        [sys.executable, "-c", PROVE, str(tmp_path / "state"), str(archive)],
        stdout=subprocess.PIPE, text=True,
    ) as waiting:  # fmt: skip
        assert waiting.stdout is not None
        proof = int(waiting.stdout.readline())
        time.sleep(0.5)  # well within its imports, or in its loop: either way it must end
        os.kill(proof, 0)
        waiting.send_signal(signal.SIGKILL)
    end = time.monotonic() + 30.0
    while _runs(proof):
        assert time.monotonic() < end, "the proof goes on without anybody who waits"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # it may lie there until somebody reaps it
