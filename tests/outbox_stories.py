"""The outbox, interrupted at every call that changes files, and what is found then.

``python -m tests.outbox_stories MODE FOLDER``, which ``test_outbox_crashes`` starts, prints how
many calls each step has, as JSON, or fails at the first thing that is not as it must be.
"""

import contextlib
import json
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

from runtime.line.outbox import Outbox, Unkept
from runtime.line.verdict import Finding
from tests.crashes import Mode, rounds

DEVICE = "d" * 32
FINDING = Finding(
    time="2026-01-01T00:00:00Z", boot="b", monotonic=1.0, source="s", frame="f", verdict="OK"
)
MAX_ROWS = 5


def opened(folder: Path) -> Outbox:
    return Outbox(folder / "outbox.db", DEVICE, max_rows=MAX_ROWS, tell=lambda sentence: None)


def filled(box: Outbox, rows: int = 3) -> None:
    for _ in range(rows):
        assert not isinstance(box.append(FINDING), Unkept)


def full(box: Outbox) -> None:
    filled(box, MAX_ROWS)


def emptied(box: Outbox) -> None:
    filled(box)
    box.sent(1, 2, 3)


def before_the_ceiling(box: Outbox) -> None:
    filled(box)
    box.close()
    box.path.with_name("outbox.db.ceiling").write_text("3\n")


def lost_ceiling(box: Outbox) -> None:
    filled(box)
    box.close()
    box.path.with_name("outbox.db.ceiling").write_bytes(b"\0\0")


def damaged(box: Outbox) -> None:
    """The journal is in the file, and the page that knows the tables is gone; the old one stays."""
    filled(box)
    box.close()
    data = bytearray(box.path.read_bytes())
    data[100:600] = b"\xff" * 500
    box.path.write_bytes(data)


def killed(
    box: Outbox, act: Callable[[sqlite3.Connection], object] = lambda database: None
) -> None:
    """Three records and what ``act`` did are in the journal, as a killed process leaves it."""
    filled(box)
    folder = box.path.parent
    with contextlib.closing(sqlite3.connect(box.path)) as database:
        act(database)
        shutil.copytree(folder, folder / "kept")
    box.close()
    for file in (folder / "kept").iterdir():
        file.replace(folder / file.name)
    (folder / "kept").rmdir()


def of_a_newer_fieldfit(box: Outbox) -> None:
    killed(box, lambda database: database.execute("PRAGMA user_version = 99"))


def journal_alone(box: Outbox) -> None:
    """As a crash in the middle of setting aside leaves it."""
    killed(box)
    box.path.replace(f"{box.path}.damaged")


class Story(NamedTuple):
    """A step, and what it is taken on."""

    prepare: Callable[[Outbox], object]
    act: Callable[[Outbox], object]
    damaged: bool = False
    """Whether numbers may be left out."""
    lost: bool = False
    """Whether records that were there before may be gone."""


STORIES = {
    "the first record": Story(lambda b: None, lambda b: b.append(FINDING)),
    "a record": Story(filled, lambda b: b.append(FINDING)),
    "a record when all were sent": Story(emptied, lambda b: b.append(FINDING)),
    "a record that pushes another out": Story(full, lambda b: b.append(FINDING)),
    "a record above the ceiling": Story(before_the_ceiling, lambda b: b.append(FINDING)),
    "a record when the ceiling is lost": Story(lost_ceiling, lambda b: b.append(FINDING)),
    "sent": Story(filled, lambda b: b.sent(1, 2)),
    "refused": Story(filled, lambda b: b.refuse(2, "damaged")),
    "a status document": Story(filled, lambda b: b.put_status(b"{}")),
    "a record in a damaged file": Story(
        damaged, lambda b: b.append(FINDING), damaged=True, lost=True
    ),
    "a record when a process was killed": Story(killed, lambda b: b.append(FINDING)),
    "a record after a newer fieldfit": Story(
        of_a_newer_fieldfit, lambda b: b.append(FINDING), damaged=True
    ),
    "a record with a journal alone": Story(
        journal_alone, lambda b: b.append(FINDING), damaged=True
    ),
}


class Found(NamedTuple):
    """What a step may leave behind."""

    seqs: tuple[int, ...]
    counts: tuple[int, ...]


def look(box: Outbox) -> Found:
    rows = box.unsent(100)
    counts = box.counts()
    status = box.unsent_status()
    for row in rows:
        assert json.loads(row.payload)["seq"] == row.seq
    assert counts.rows == len(rows)
    assert counts.bytes == sum(len(row.payload) for row in rows)
    return Found(
        tuple(row.seq for row in rows),
        (counts.last, counts.sent, counts.dropped, counts.refused, len(status or b"")),
    )


def tell(name: str, story: Story, mode: Mode, folder: Path) -> int:
    """Interrupt it everywhere, look each time, and return the number of calls."""
    template, work = folder / "template", folder / "work"
    template.mkdir(parents=True)
    with opened(template) as box:
        story.prepare(box)
    copy(template, work)
    with opened(work) as box:
        before = look(box) if not story.damaged else None
        story.act(box)
        after = look(box)
    held: list[Outbox] = []
    said: list[object] = []

    def prepare() -> None:
        copy(template, work)
        held[:], said[:] = [opened(work)], []

    count = 0
    for ended in rounds(mode, prepare, lambda: said.append(story.act(held[0]))):
        count = ended.call
        where = f"{name}: {mode} call {ended.call}: {ended.message}"
        assert not ended.message, where  # nothing that a disk does is an exception
        if mode == "full":
            there_is_room_again(held[0], said[0], where)
            held[0].close()
            continue
        with opened(work) as box:
            found = look(box)
            verdict = box.append(FINDING)
        if story.damaged:
            assert found.counts[0] >= 3, where
            assert story.lost or found.seqs[:3] == (1, 2, 3), where
        else:
            assert found in (before, after), f"{where}: {found}"
        assert not isinstance(verdict, Unkept), where
        assert verdict.seq > max(found.seqs, default=0), where
        assert verdict.seq == found.counts[0] + 1, where
    return count


def there_is_room_again(box: Outbox, said: object, where: str) -> None:
    """The same object goes on; what it acknowledged is there, and what it did not has no number."""
    last = box.counts().last
    assert isinstance(said, Unkept) or said is None or said.seq == last, where  # type: ignore[attr-defined]
    verdict = box.append(FINDING)
    assert not isinstance(verdict, Unkept), f"{where}: {verdict}"
    assert verdict.seq == last + 1, where
    assert [row.seq for row in box.unsent(1, last)] == [verdict.seq], where


def copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def main(mode: Mode, folder: Path) -> dict[str, int]:
    # A crash is the end of a process, not of a machine: see benchmarks/outbox_cuts.py for that.
    return {name: tell(name, story, mode, folder / name) for name, story in STORIES.items()}


if __name__ == "__main__":
    assert sys.argv[1] in get_args(Mode)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))  # type: ignore[arg-type]
