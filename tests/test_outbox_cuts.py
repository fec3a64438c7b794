"""What the outbox's power-cut benchmark takes for a loss; the cuts need root and take minutes."""

import contextlib
import sqlite3
from pathlib import Path

import pytest

from benchmarks.outbox_cuts import DEVICE, FINDING, VIOLATIONS, Cut, Word, look
from runtime.line.outbox import Outbox

DAMAGED, LOST, NUMBERS = VIOLATIONS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of an outbox with records 1 to 3."""
    path = tmp_path / "outbox.db"
    with Outbox(path, DEVICE) as outbox:
        for _ in range(3):
            outbox.append(FINDING)
    return path


def words(kept: list[int], marking: list[int]) -> list[Word]:
    """Said one second before the cut."""
    return [Word("kept", seq, 1.0) for seq in kept] + [Word("marking", seq, 1.0) for seq in marking]


CUT_AT = 2.0


def test_what_was_acknowledged_and_is_not_there_is_lost(path: Path) -> None:
    given = {1}
    assert look(path, words([2, 3], []), given, CUT_AT) == Cut((), 2, 0, 0)
    assert given == {1, 2, 3}
    assert look(path, words([3, 4], []), set(), CUT_AT).violations == (LOST, NUMBERS)
    assert look(path, words([], []), {7}, CUT_AT).lost == 1


def test_one_that_was_acknowledged_to_nobody_may_be_there(path: Path) -> None:
    assert look(path, words([1, 2], []), set(), CUT_AT).violations == ()


def test_one_that_was_being_marked_may_be_there_or_not(path: Path) -> None:
    assert look(path, words([1, 2, 3], [1]), set(), CUT_AT).violations == ()
    with Outbox(path, DEVICE) as outbox:
        outbox.sent(1)
    assert look(path, words([1, 2, 3], [1]), set(), CUT_AT).violations == ()


def test_a_number_that_is_left_out_is_seen(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM record WHERE seq = 2")
    assert look(path, words([], []), set(), CUT_AT).violations == (NUMBERS,)


def test_a_record_or_a_file_that_is_not_whole_is_damage(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE record SET payload = x'00' WHERE seq = 2")
    assert DAMAGED in look(path, words([], []), set(), CUT_AT).violations
    path.write_bytes(b"noise")
    assert DAMAGED in look(path, words([], []), set(), CUT_AT).violations


def test_what_is_said_after_the_cut_is_no_loss_and_counted_apart(path: Path) -> None:
    late = [Word("kept", 3, 1.0), Word("kept", 4, 2.5)]
    assert look(path, late, set(), CUT_AT) == Cut((), 1, 0, 1)
