"""What the power-cut benchmark takes for a loss; the cuts themselves need root and take minutes."""

from pathlib import Path

import pytest

from benchmarks import power_cuts
from benchmarks.power_cuts import Expected, Said, Step, Violation
from benchmarks.small_bundles import small_zip
from runtime.delivery.floor import Floors
from runtime.delivery.slot_state import State
from runtime.delivery.slots import Slots


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path / "state")


def told(slots: Slots, *words: Said) -> Expected:
    """What must be there after ``words``, said on an empty device."""
    releases = {release.sha256: release for release in slots.status().staged}
    expected = Expected(State(), set(), releases)
    for word in words:
        expected.hear(word)
    return expected


def found(slots: Slots, expected: Expected) -> list[Violation]:
    return list(power_cuts.look(slots, expected))


def test_the_interrupted_step_may_be_there_or_not(slots: Slots, tmp_path: Path) -> None:
    sha256 = slots.stage(small_zip(tmp_path)).sha256
    stage, activate = Step("stage", sha256), Step("activate", sha256)
    said = told(slots, Said("begins", stage), Said("done", stage), Said("begins", activate))
    assert found(slots, said) == []
    slots.activate(sha256)
    assert found(slots, said) == []


def test_an_acknowledged_step_that_is_not_there_is_lost(slots: Slots, tmp_path: Path) -> None:
    sha256 = slots.stage(small_zip(tmp_path)).sha256
    activate = Step("activate", sha256)
    said = told(slots, Said("begins", activate), Said("done", activate))
    assert found(slots, said) == ["acknowledged step lost"]
    slots.activate(sha256)
    assert found(slots, said) == []
    slots.begin_try()  # nobody said so
    assert found(slots, said) == ["acknowledged step lost"]


def test_a_committed_version_that_the_floor_forgot_is_lost(slots: Slots, tmp_path: Path) -> None:
    sha256 = slots.stage(small_zip(tmp_path)).sha256
    slots.activate(sha256)
    slots.begin_try()
    slots.commit()
    state = slots.status().state
    expected = Expected(state, {sha256}, {})
    assert found(slots, expected) == []
    for path in Floors(slots.folder).paths:
        path.unlink()
    assert found(slots, expected) == ["acknowledged step lost"]
    for path in Floors(slots.folder).paths:
        path.write_bytes(b"")
    assert found(slots, expected) == ["state unreadable"]


def test_a_slot_that_was_acknowledged_must_be_whole(slots: Slots, tmp_path: Path) -> None:
    slot = slots.stage(small_zip(tmp_path))
    stage = Step("stage", slot.sha256)
    underway, done = told(slots, Said("begins", stage)), told(slots, Said("done", stage))
    (slot.bundle / "fp32.onnx").write_bytes(b"")
    assert found(slots, done) == ["slot not whole"]
    assert found(slots, underway) == []


def test_a_state_that_had_to_be_mended_is_one_that_could_not_be_read(
    slots: Slots, tmp_path: Path
) -> None:
    slots.stage(small_zip(tmp_path))
    slots.state_file.write_bytes(b"{")
    assert found(slots, told(slots)) == ["state unreadable"]


def test_a_command_that_fails_before_the_cut_is_counted(slots: Slots) -> None:
    said = told(slots, Said("failed", Step("commit", "0" * 64), "no room"))
    assert said.violations == ["next command failed"]
