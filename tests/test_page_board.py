"""What the loop puts up for its page: counts, few pictures, an age that nothing can hide."""

import datetime
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from runtime.line.page import snapshot
from runtime.line.page.alarms import STALE_S, judge
from runtime.line.page.snapshot import (
    MAX_BYTES,
    PICTURES,
    SNAPSHOT,
    Absent,
    Board,
    Snapshot,
    age_s,
    board_folder,
    read,
)
from runtime.line.page.tally import MINUTES, STRIP, Tally
from runtime.line.page.thumbnails import SIDE, Thumbnails, jpeg
from runtime.line.verdict import Finding
from tests.boards import NOW, Clock, condition, image, published, rewrite, verdict


def shown(folder: Path) -> Snapshot:
    found = read(folder)
    assert isinstance(found, Snapshot), found
    return found


def test_what_is_published_is_read_again(tmp_path: Path) -> None:
    said = [verdict("OK", 1), verdict("DEFECT", 2, label="broken"), verdict("NOT INSPECTED", 3)]
    published(tmp_path, list(said))
    found = shown(board_folder(tmp_path))
    assert msgspec.structs.asdict(condition()).items() <= msgspec.structs.asdict(found).items()
    assert found.verdicts == {"OK": 1, "DEFECT": 1, "ABSTAIN": 0, "NOT INSPECTED": 1}
    assert found.labels == {"broken": 1}
    assert found.strip == ((1, "OK"), (2, "DEFECT"), (3, "NOT INSPECTED"))
    assert [frame.seq for frame in found.recent] == [3, 2]  # of OK ones only the newest is shown
    assert [bool(frame.picture) for frame in found.recent] == [False, True]
    age = age_s(found)
    assert age is not None
    assert 0 <= age < 60


def test_rates_are_of_the_last_ten_seconds_and_flags_of_the_last_minute() -> None:
    clock = Clock()
    tally = Tally(clock)
    for second in range(100):
        clock.now = 1000.0 + second
        for _ in range(3):
            tally.add(verdict(source="a"))
        if second < 20:
            tally.add(verdict("ABSTAIN", source="b", flags=("blurred",)))
    totals = tally.totals()
    assert totals["per_second"] == 3.0
    assert totals["rates"] == {"a": 3.0}
    assert totals["last_minute"] == 180
    (flag,) = totals["flags"]
    assert (flag.word, flag.count, flag.recent, flag.reason) == ("blurred", 20, 0, "because of 1")
    clock.now += 3600
    assert tally.totals()["per_second"] == 0.0
    assert tally.totals()["last_minute"] == 0


def test_the_hour_has_a_place_for_minutes_without_a_frame() -> None:
    clock = Clock()
    clock.now = 6000.0  # a whole minute
    tally = Tally(clock)
    tally.add(verdict("OK"))
    clock.now += 120
    tally.add(verdict("DEFECT"))
    minutes = tally.totals()["minutes"]
    assert len(minutes) == MINUTES
    assert [minute.verdicts for minute in minutes[-3:]] == [{"OK": 1}, {}, {"DEFECT": 1}]
    clock.now += 3600
    assert not any(minute.verdicts for minute in tally.totals()["minutes"])


def test_a_tally_does_not_grow_with_what_it_is_told() -> None:
    clock = Clock()
    tally = Tally(clock)
    for number in range(20_000):
        clock.now += 1
        tally.add(verdict("DEFECT", label=f"{number}", flags=(f"{number}",)))
    totals = tally.totals()
    assert len(totals["strip"]) == STRIP
    assert len(totals["labels"]) == len(totals["flags"]) == 32


def test_many_frames_make_few_pictures(tmp_path: Path) -> None:
    clock = Clock()
    board = Board(tmp_path, ring=12, per_second=2.0, clock=clock)
    for number in range(1000):  # a second of a fast camera
        clock.now += 0.001
        board.judged(verdict("OK", number), image())
    board.publish(condition())
    assert len(list((tmp_path / PICTURES).iterdir())) == 1
    for number in range(1000):
        clock.now += 0.001
        board.judged(verdict("DEFECT", number), image())
    board.publish(condition())
    assert len(list((tmp_path / PICTURES).iterdir())) == 1 + 2 + 1


def test_a_busy_line_does_not_push_out_what_was_not_ok(tmp_path: Path) -> None:
    clock = Clock()
    board = Board(tmp_path, ring=4, clock=clock)
    board.judged(verdict("DEFECT", 1), image())
    for number in range(2, 100):
        clock.now += 1
        board.judged(verdict("OK", number), image())
        board.publish(condition())
    found = shown(tmp_path)
    assert [frame.seq for frame in found.notable] == [1]
    assert [frame.seq for frame in found.recent] == [99, 98, 97, 96]
    kept = {file.name for file in (tmp_path / PICTURES).iterdir()}
    assert {frame.picture for frame in (*found.recent, *found.notable)} <= kept
    assert len(kept) < 20, "pictures that nobody shows are gone after a while"


def test_a_second_run_begins_with_no_pictures_and_gives_other_names(tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        published(tmp_path, [verdict("DEFECT")])
        (one,) = (board_folder(tmp_path) / PICTURES).iterdir()
        names.add(one.name)
    assert len(names) == 2


@pytest.mark.parametrize("shape", [(300, 200), (300, 200, 1), (300, 200, 3), (20, 30, 1)])
def test_a_picture_is_small_and_keeps_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = tmp_path / "one.jpg"
    file.write_bytes(jpeg(np.full(shape, 77, np.uint8)))
    with Image.open(file) as picture:
        assert max(picture.size) == min(SIDE, max(shape[:2]))
        assert picture.size[0] / picture.size[1] == pytest.approx(shape[1] / shape[0], rel=0.02)


def test_a_folder_that_cannot_be_written_is_the_systems_own_error(tmp_path: Path) -> None:
    thumbnails = Thumbnails(tmp_path / PICTURES, 4, 1.0)
    (tmp_path / PICTURES).rmdir()
    with pytest.raises(OSError, match="No such file"):
        thumbnails.offer(verdict("DEFECT"), image())


def test_long_texts_stay_below_what_is_read(tmp_path: Path) -> None:
    long = "x" * 60_000
    said: list[Finding] = [
        verdict("ABSTAIN", n, reason=long, frame=long, source=long, flags=("blurred",))
        for n in range(24)
    ]
    published(tmp_path, said)
    assert (board_folder(tmp_path) / SNAPSHOT).stat().st_size < MAX_BYTES / 4
    assert len(shown(board_folder(tmp_path)).recent[0].reason) == 300


def test_a_damaged_snapshot_is_absent_with_a_reason(tmp_path: Path) -> None:
    folder = board_folder(tmp_path)
    missing = read(folder)
    assert isinstance(missing, Absent)
    assert "No inspection has run" in missing.reason
    published(tmp_path, [verdict("DEFECT")])
    file = folder / SNAPSHOT
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert isinstance(read(folder), Absent)
    for wrong in (b"\xff" * 100, b"[" * 100_000, b"{}", b" " * (MAX_BYTES + 1)):
        file.write_bytes(wrong)
        assert isinstance(read(folder), Absent)
    file.unlink()
    file.mkdir()
    assert isinstance(read(folder), Absent)


def test_who_reads_while_the_loop_writes_sees_a_whole_one(tmp_path: Path) -> None:
    board = published(tmp_path, [verdict("DEFECT")])
    end = threading.Event()

    def write() -> None:
        while not end.is_set():
            board.publish(condition(), "fieldfit_x 1\n")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            shown(board_folder(tmp_path))
    finally:
        end.set()
        thread.join()


def test_a_board_is_due_once_a_second(tmp_path: Path) -> None:
    clock = Clock()
    board = Board(tmp_path, clock=clock)
    assert board.due
    board.publish(condition())
    clock.now += 0.9
    assert not board.due
    clock.now += 0.2
    assert board.due


def test_a_line_that_is_well_is_healthy_and_says_so(tmp_path: Path) -> None:
    published(tmp_path, [verdict("OK", n) for n in range(20)])
    standing = judge(shown(board_folder(tmp_path)), 0.5, NOW)
    assert (standing.level, standing.word, standing.alarms) == ("healthy", "Inspecting", ())
    assert standing.current


def test_a_dead_loop_never_looks_alive(tmp_path: Path) -> None:
    published(tmp_path, [verdict("OK")])
    found = shown(board_folder(tmp_path))
    for age in (STALE_S + 0.1, 3600.0, None):
        standing = judge(found, age, NOW)
        assert (standing.level, standing.word, standing.current) == ("unknown", "Stale", False)
        assert "Nothing below is current" in standing.sentence
    rewrite(tmp_path, monotonic=time.monotonic() - 90)
    age = age_s(shown(board_folder(tmp_path)))
    assert age is not None
    assert 90 <= age < 120
    rewrite(tmp_path, boot="another start of the machine")
    assert age_s(shown(board_folder(tmp_path))) is None


def test_a_wrong_clock_makes_nothing_old_or_young(tmp_path: Path) -> None:
    published(tmp_path, [verdict("OK")])
    rewrite(tmp_path, time=NOW - datetime.timedelta(days=20_000))
    age = age_s(shown(board_folder(tmp_path)))
    assert age is not None
    assert age < 60


def test_a_line_that_was_stopped_or_never_ran_is_unknown(tmp_path: Path) -> None:
    published(tmp_path, [verdict("OK")], phase="stopped", said="It was asked to.")
    standing = judge(shown(board_folder(tmp_path)), 0.1, NOW)
    assert (standing.level, standing.word, standing.current) == ("unknown", "Stopped", False)
    assert standing.sentence == "The line was stopped 0 s ago. It was asked to."
    assert judge(Absent("nobody"), None, NOW)[:3] == ("unknown", "No news", "nobody")


SOON = NOW + datetime.timedelta(days=2)
ALARMS: list[tuple[str, str, dict[str, Any]]] = [
    ("failing", "cam-1: camera lost", {
        "cameras": (snapshot.Camera(name="cam-1", fault="camera lost"),)}),
    ("attention", "40 frames were dropped", {
        "cameras": (snapshot.Camera(name="cam-1", age_s=0.1, dropped=40),)}),
    ("attention", "Drift of scores, feature 3: p = 1e-06", {"drift": (
        snapshot.Drift(of="scores", p_value=1e-5, alpha=0.001, drifted=True, window=500),
        snapshot.Drift(of="feature 3", p_value=1e-6, alpha=0.001, drifted=True, window=500))}),
    ("attention", "A slower engine runs: refused artifact", {
        "engine": snapshot.Engine(name="cpu", degraded="refused artifact")}),
    ("attention", "solar 0.2.0 answers on trial", {"model": snapshot.Model(
        name="solar", version="0.2.0", trial="solar 0.2.0 answers on trial", adaptation="as is",
        verified=True)}),
    ("attention", "Adaptation as is, UNVERIFIED", {"model": snapshot.Model(
        name="solar", version="0.2.0", adaptation="as is, UNVERIFIED", verified=False)}),
    ("attention", "Works 50% of the time: too hot", {
        "heat": snapshot.Heat(share=0.5, reason="too hot")}),
    ("attention", "Slowed down by heat: cpu", {"heat": snapshot.Heat(throttling=("cpu",))}),
    ("attention", "/data: only 600 MiB", {"disks": (
        snapshot.Disk(path="/data", free=600 * 2**20, total=2**40),)}),
    ("failing", "/data: only 60 MiB", {"disks": (
        snapshot.Disk(path="/data", free=60 * 2**20, total=2**40),)}),
    ("attention", "not sent to mqtt://b, 7 wait: refused", {
        "outbox": snapshot.Outbox(rows=7, to="mqtt://b", fault="refused")}),
    ("attention", "The root metadata expires in 2 days", {"update": snapshot.Update(
        expires={"root": SOON})}),
    ("attention", "The snapshot metadata expired", {"update": snapshot.Update(
        expires={"snapshot": NOW - datetime.timedelta(days=1)})}),
    ("attention", "The last update failed: no route", {"update": snapshot.Update(
        outcome="no route", failed=True)}),
]  # fmt: skip


@pytest.mark.parametrize(("level", "sentence", "changed"), ALARMS, ids=[a[1] for a in ALARMS])
def test_each_thing_that_is_wrong_is_said_alone(
    tmp_path: Path, level: str, sentence: str, changed: dict[str, Any]
) -> None:
    published(tmp_path, [verdict("OK", n) for n in range(20)], **changed)
    standing = judge(shown(board_folder(tmp_path)), 0.5, NOW)
    (alarm,) = standing.alarms
    assert (standing.level, alarm.level) == (level, level)
    assert sentence in alarm.sentence


@pytest.mark.parametrize(
    ("said", "level", "word", "sentence"),
    [
        ("NOT INSPECTED", "failing", "Not inspecting", "not inspected: because of 20"),
        ("ABSTAIN", "attention", "Inspecting", "The model abstains: 12 of 22"),
        ("blurred", "attention", "Inspecting", "12 of 22 frames of the last minute are blurred"),
    ],
)
def test_verdicts_raise_alarms_too(
    tmp_path: Path, said: Any, level: str, word: str, sentence: str
) -> None:
    flags = (said,) if said == "blurred" else ()
    bad: Any = "DEFECT" if flags else said
    frames: list[Finding] = [verdict("OK", n) for n in range(10)]
    frames += [verdict(bad, n, flags=flags) for n in range(9, 21)]
    published(tmp_path, frames)
    standing = judge(shown(board_folder(tmp_path)), 0.5, NOW)
    assert (standing.level, standing.word) == (level, word)
    assert sentence in standing.alarms[0].sentence


def test_one_missed_frame_among_many_is_not_forgotten_at_once(tmp_path: Path) -> None:
    published(tmp_path, [verdict("NOT INSPECTED", 1), *(verdict("OK", n) for n in range(9))])
    standing = judge(shown(board_folder(tmp_path)), 0.5, NOW)
    assert (standing.level, standing.word) == ("attention", "Inspecting")
    assert "1 of 10 frames of the last two minutes" in standing.alarms[0].sentence


def test_a_line_without_frames_waits_and_one_that_opens_starts(tmp_path: Path) -> None:
    published(tmp_path, [])
    assert judge(shown(board_folder(tmp_path)), 0.5, NOW).word == "Waiting"
    published(tmp_path, [], phase="starting", said="opens the engine")
    assert judge(shown(board_folder(tmp_path)), 0.5, NOW)[1:3] == ("Starting", "opens the engine")
