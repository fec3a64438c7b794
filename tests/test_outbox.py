"""The outbox: numbers without gaps, nothing lost but what is counted, and no disk that crashes it.

Crashes at every call are in test_outbox_crashes.py, power cuts in benchmarks/outbox_cuts.py.
"""

import contextlib
import fcntl
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from runtime.line import outbox as module
from runtime.line.json_lines import JsonLines
from runtime.line.outbox import MAX_BYTES, MAX_RECORD_BYTES, MAX_ROWS, Outbox, Row, Unkept, is_whole
from runtime.line.verdict import Verdict
from tests.mounts import mounting
from tests.outbox_stories import DEVICE, FINDING

PAGE = Path(__file__).parent.parent / "docs" / "results.md"


class Box(Outbox):
    """Remembers what it said."""

    def __init__(self, path: Path, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> None:
        self.said: list[str] = []
        super().__init__(
            path, DEVICE, max_rows=max_rows, max_bytes=max_bytes, tell=self.said.append
        )

    def kept(self) -> Verdict:
        verdict = self.append(FINDING)
        assert not isinstance(verdict, Unkept), verdict
        return verdict

    def seqs(self) -> list[int]:
        return [row.seq for row in self.unsent(1_000_000)]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path / "outbox.db")
    yield box
    box.close()


def test_a_record_is_the_verdict_as_json(box: Box) -> None:
    verdict = box.kept()
    assert (verdict.device, verdict.seq, verdict.verdict) == (DEVICE, 1, "OK")
    (row,) = box.unsent(10)
    assert msgspec.json.decode(row.payload, type=Verdict) == verdict
    assert is_whole(row, DEVICE)


def test_numbers_have_no_gaps_when_records_were_sent_and_when_it_starts_again(box: Box) -> None:
    assert [box.kept().seq for _ in range(3)] == [1, 2, 3]
    assert box.sent(1, 2, 3) is None
    assert box.rows == 0
    box.close()
    assert Box(box.path).kept().seq == 4
    assert box.kept().seq == 5


def test_a_record_is_counted_as_sent_once(box: Box) -> None:
    box.kept()
    box.sent(1)
    box.sent(1, 2)
    assert (box.counts().sent, box.counts().rows, box.counts().bytes) == (1, 0, 0)


def test_the_oldest_go_first_when_it_is_full_and_are_counted_for_good(tmp_path: Path) -> None:
    box = Box(tmp_path / "outbox.db", max_rows=3)
    for _ in range(5):
        box.kept()
    assert box.seqs() == [3, 4, 5]
    assert box.dropped == 2
    box.close()
    assert Box(tmp_path / "outbox.db").dropped == 2


def test_it_is_full_by_bytes_as_well(tmp_path: Path) -> None:
    size = len(msgspec.json.encode(Box(tmp_path / "other.db").kept()))
    box = Box(tmp_path / "outbox.db", max_bytes=3 * size)
    for _ in range(5):
        box.kept()
    assert box.seqs() == [3, 4, 5]
    assert box.counts().bytes == 3 * size


def test_a_finding_that_is_too_long_is_not_kept_and_has_no_number(box: Box) -> None:
    long = msgspec.structs.replace(FINDING, reason="x" * MAX_RECORD_BYTES)
    refused = box.append(long)
    assert isinstance(refused, Unkept)
    assert "expected at most 65,536 bytes" in refused.reason
    assert box.kept().seq == 1
    assert box.counts().unkept == 1
    box.close()
    assert Box(box.path).counts().unkept == 1


def test_the_newest_status_document_alone_is_carried(box: Box) -> None:
    assert box.unsent_status() is None
    box.put_status(b"old")
    box.put_status(b"new")
    box.status_sent(b"old")  # the answer came when there was a newer one
    assert box.unsent_status() == b"new"
    box.status_sent(b"new")
    assert box.unsent_status() is None


def test_what_threads_and_processes_append_at_once_is_all_there(box: Box) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.test_outbox import Box\n"
        "box = Box(Path(sys.argv[1]))\n"
        "for _ in range(50): box.kept()"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(box.path)]) for _ in range(2)]
    threads = [threading.Thread(target=lambda: [box.kept() for _ in range(50)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait() for other in others] == [0, 0]
    assert box.seqs() == list(range(1, 201))


def test_the_page_s_python_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(PAGE.parent.parent), "PATH": ""}, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("1 1\n", "")


# --- what a disk does


@pytest.mark.parametrize("kind", ["nothing", "noise", "a hole", "half", "another database"])
def test_a_damaged_file_is_set_aside_and_said_and_numbers_go_on_above(box: Box, kind: str) -> None:
    last = [box.kept() for _ in range(200)][-1].seq
    box.close()
    data = bytearray(box.path.read_bytes())
    if kind == "nothing":
        data = bytearray()
    elif kind == "noise":
        data[:] = os.urandom(len(data))
    elif kind == "a hole":
        data[3 * 4096 : 5 * 4096] = bytes(2 * 4096)
    elif kind == "half":
        del data[len(data) // 2 :]
    else:
        box.path.unlink()
        with contextlib.closing(sqlite3.connect(box.path)) as other:
            other.execute("CREATE TABLE theirs (x)")
        data = bytearray(box.path.read_bytes())
    box.path.write_bytes(data)
    box = Box(box.path)
    assert box.kept().seq > last
    if kind != "nothing":  # an empty file is no damage: nothing is in it to be set aside
        assert f"set aside as {box.path.name}.damaged" in box.said[0]
        assert box.path.with_name("outbox.db.damaged").read_bytes() == bytes(data)
        assert box.counts().damaged == 1
    before = len(box.said)
    box.close()
    assert Box(box.path).kept().seq > last
    assert len(box.said) == before


def test_what_is_whole_around_the_damage_is_taken_over_with_its_counts(box: Box) -> None:
    for _ in range(200):
        box.kept()
    box.sent(1, 2, 3)
    box.close()
    data = bytearray(box.path.read_bytes())
    (page,) = [  # one that holds a record in the middle
        start for start in range(0, len(data), 4096) if b'"seq":100}' in data[start : start + 4096]
    ]
    data[page : page + 4096] = b"\xff" * 4096
    box.path.write_bytes(data)
    box = Box(box.path)
    box.kept()
    seqs = box.seqs()
    assert seqs[0] == 4
    assert {4, 5, 199, 200} <= {*seqs}
    assert 100 not in seqs
    assert len(seqs) > 150
    assert box.counts().sent == 3
    assert f"{len(seqs) - 1} unsent records taken over" in box.said[1]


def test_a_file_that_is_gone_costs_its_records_and_no_number(box: Box) -> None:
    last = box.kept().seq
    for file in box.path.parent.glob("outbox.db*"):
        if file.suffix != ".ceiling":
            file.unlink()
    assert box.kept().seq > last


def test_who_reads_finds_the_new_file_when_another_has_set_the_old_aside(box: Box) -> None:
    reader = Box(box.path)
    box.kept()
    assert reader.seqs() == [1]
    box.close()
    reader.close()
    box.path.write_bytes(b"no database at all")
    assert reader.seqs() == []
    assert reader.said
    new = box.kept().seq
    assert reader.seqs() == [new]
    assert not box.said  # the reader has said it


def test_a_flipped_bit_that_sqlite_does_not_see_is_seen(box: Box) -> None:
    box.kept()
    (row,) = box.unsent(1)
    assert not is_whole(Row(2, row.payload), DEVICE)
    assert not is_whole(row, "another device")
    assert not is_whole(Row(1, row.payload.replace(b'"seq":1', b'"seq":3')), DEVICE)
    assert not is_whole(Row(1, b""), DEVICE)
    assert not is_whole(Row(1, b"[" * 100_000), DEVICE)
    assert box.refuse(1, "it is damaged") is None
    assert (box.rows, box.counts().refused) == (0, 1)
    assert box.said == ["outbox.db: record 1 will not be sent: it is damaged"]


def test_a_path_that_cannot_be_is_no_exception(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    box = Box(tmp_path / "file" / "outbox.db")
    assert isinstance(box.append(FINDING), Unkept)
    assert isinstance(box.put_status(b"{}"), Unkept)
    assert isinstance(box.sent(1), Unkept)
    assert (box.unsent(10), box.unsent_status(), box.rows) == ([], None, 0)
    assert box.counts().unkept == 1
    (tmp_path / "file").unlink()  # and now it can
    assert box.kept().seq == 1
    assert box.counts().unkept == 1


def test_a_disk_that_is_read_only_or_full_refuses_in_words(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.test_outbox import Box\n"
        "from tests.outbox_stories import FINDING\n"
        "box = Box(Path(sys.argv[1], 'outbox.db'))\n"
        "for _ in range(int(sys.argv[2])): said = box.append(FINDING)\n"
        "print(type(said).__name__, said.reason, box.counts().rows)"
    )
    disk = str(tmp_path / "disk")
    Path(disk).mkdir()
    Box(Path(disk, "outbox.db")).kept()
    command = [sys.executable, "-c", code, disk]
    ways = {
        f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}": ("1", "Read-only"),
        f"mount -t tmpfs -o size=256k none {disk}": ("2000", "full"),
    }
    for how, (times, word) in ways.items():
        done = subprocess.run(
            [*mounting(how), *command, times], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Unkept"), done.stdout
        assert word in done.stdout


def test_who_holds_it_for_too_long_does_not_hold_the_loop_up(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_S", 0.05)
    box.kept()
    box.close()
    with contextlib.closing(sqlite3.connect(box.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        refused = box.append(FINDING)
        assert isinstance(refused, Unkept)
        assert "database is locked" in refused.reason
    assert box.kept().seq == 2
    with box.path.with_name("outbox.db.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert isinstance(box.append(FINDING), Unkept)
    assert box.kept().seq == 3
    assert box.counts().unkept == 2


# --- lines on stdout


def test_lines_are_out_one_by_one_and_a_reader_that_leaves_ends_them(box: Box) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from runtime.line.json_lines import JsonLines\n"
        "from tests.test_outbox import Box\n"
        "lines, box = JsonLines(sys.stdout), Box(Path(sys.argv[1]))\n"
        "while lines.write(box.kept()): sys.stdin.readline()\n"
        "print('more, to nobody')"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code, str(box.path)], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        for seq in (1, 2):
            assert json.loads(process.stdout.readline())["seq"] == seq  # before the next is made
            process.stdin.write("\n")
            process.stdin.flush()
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_closed_stream_takes_no_more(box: Box) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        lines = JsonLines(stream)
        assert lines.write(box.kept())
        assert os.read(reading, 1000).endswith(b'"seq":1}\n')
        os.close(reading)
        assert not lines.write(box.kept())
        assert not lines.write(box.kept())
