"""What is kept as evidence, at which rates, and what gives way; nothing of it reaches the loop."""

import functools
import io
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import atomic
from runtime.evidence_pack import REASONS, Reason, Record
from runtime.line.evidence import Evidence, Rates, Rules, reasons
from runtime.line.evidence_folder import (
    Caps,
    EvidenceFolder,
    Piece,
    first_to_go,
    mark_packed,
    read_image,
    read_records,
)
from runtime.line.inspection import Inspected
from runtime.sources.frame import Frame
from tests.evidence_frames import CLOSE, SURE, inspected, picture
from tests.evidence_pieces import add, fill
from tests.mounts import mounting

FREE = Caps(per_minute=10**6, per_hour=10**6, per_day=10**6, reserve=0)
RULES = Rules()
DAY = 86400.0


@contextmanager
def keeping(
    folder: Path, caps: Caps = FREE, rules: Rules = RULES, **more: object
) -> Iterator[Evidence]:
    """Evidence of one loop; at the end of the block all that was taken is on the disk."""
    evidence = Evidence(folder, caps, rules, **{"draw": lambda: 0.999, **more})  # type: ignore[arg-type]
    try:
        yield evidence
    finally:
        evidence.close()


def records(folder: Path) -> list[Record]:
    found, damaged = read_records(folder)
    assert not damaged
    return [record for record, _ in found]


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


# --- rules


@pytest.mark.parametrize(
    ("why", "what"),
    [
        ((), {}),
        (("flagged",), {"flags": ("blurred",)}),
        (("abstained",), {"verdict": "ABSTAIN"}),
        (("low-margin",), {"probabilities": CLOSE}),
        (("flagged", "abstained", "low-margin"),
         {"flags": ("dark",), "verdict": "ABSTAIN", "probabilities": CLOSE}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("drifts", "drawn"), [(False, False), (True, False), (True, True)])
def test_each_rule_has_its_word(
    why: tuple[Reason, ...], what: dict[str, object], drifts: bool, drawn: bool
) -> None:
    _, found = inspected(picture(1), **what)  # type: ignore[arg-type]
    assert found.seen is not None
    more = (*(["drifted"] if drifts else []), *(["sample"] if drawn else []))
    held = reasons(found.seen.answer, found.finding.flags, Rules(), drifts=drifts, drawn=drawn)
    assert held == why + more


def test_an_ordinary_frame_is_not_kept_nor_one_that_was_not_inspected(tmp_path: Path) -> None:
    with keeping(tmp_path / "e", drifts=lambda: True) as evidence:
        for frame, found in [inspected(picture(1))]:
            lost = found._replace(seen=None, fault="image")
            assert evidence.offer(frame, lost) == "no reason"
            assert evidence.offer(frame._replace(image=None), found) == "no reason"
    with keeping(tmp_path / "e") as evidence:
        assert evidence.offer(*inspected(picture(1))) == "no reason"
        assert not evidence.refused
    assert records(tmp_path / "e") == []


def test_one_in_so_many_is_drawn(tmp_path: Path) -> None:
    draws = iter([0.5, 0.0009, 0.0011])
    with keeping(tmp_path, draw=lambda: next(draws)) as evidence:
        outcomes = [evidence.offer(*inspected(picture(n))) for n in range(3)]
    assert outcomes == ["no reason", "taken", "no reason"]
    assert [record.why for record in records(tmp_path)] == ["sample"]
    with keeping(tmp_path, rules=Rules(sample_every=0), draw=lambda: 0.0) as evidence:
        assert evidence.offer(*inspected(picture(9))) == "no reason"


# --- what is kept


def test_the_record_says_what_was_known(tmp_path: Path) -> None:
    data = png(picture(7))
    with keeping(tmp_path) as evidence:
        what = inspected(
            data, verdict="ABSTAIN", probabilities=CLOSE, flags=("dark",), name="belt/é 7.png"
        )
        assert evidence.offer(*what) == "taken"
        assert what[1].seen is not None
        manifest = what[1].seen.by.bundle.manifest
    (record,) = records(tmp_path)
    assert record.reasons == ("flagged", "abstained", "low-margin")
    assert record.why == "flagged"
    assert (record.source, record.frame, record.verdict) == ("cam1", "belt/é 7.png", "ABSTAIN")
    assert (record.label, record.score) == ("a", 0.5)
    assert record.probabilities == {"a": 0.5, "b": 0.4, "c": 0.05, "d": 0.05}
    assert record.flags == ("dark",)
    assert (record.bundle, record.version) == ("tiny", "1.2.3")
    assert record.bundle_digest == manifest.digest
    assert read_image(tmp_path, record) == data
    assert record.size == len(data)


RANDOM = np.random.default_rng(5)


@pytest.mark.parametrize(
    "array",
    [
        RANDOM.integers(0, 256, (40, 30), dtype=np.uint8),
        RANDOM.integers(0, 256, (40, 30, 1), dtype=np.uint8),
        RANDOM.integers(0, 256, (40, 30, 3), dtype=np.uint8),
        RANDOM.integers(0, 256, (40, 30, 4), dtype=np.uint8),
        RANDOM.integers(0, 65536, (40, 30), dtype=np.uint16),
    ],
    ids=["gray", "gray [H, W, 1]", "RGB", "RGBA", "16 bit"],
)
def test_an_array_is_kept_without_loss_though_its_buffer_is_used_again(
    tmp_path: Path, array: np.ndarray
) -> None:
    buffer = array.copy()
    with keeping(tmp_path) as evidence:
        assert evidence.offer(*inspected(buffer, flags=("x",))) == "taken"
        buffer[:] = 0
    (record,) = records(tmp_path)
    with Image.open(tmp_path / record.image) as kept:
        assert kept.format == "PNG"
        np.testing.assert_array_equal(np.asarray(kept), array.reshape(np.asarray(kept).shape))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LAB"])
def test_a_pillow_image_of_any_mode_is_kept(tmp_path: Path, mode: str) -> None:
    with keeping(tmp_path) as evidence:
        image = Image.fromarray(picture(1)).convert("RGB")
        image = image if mode == "LAB" else image.convert(mode)
        assert evidence.offer(*inspected(image, flags=("x",))) == "taken"
    assert len(records(tmp_path)) == 1
    assert not evidence.refused


@pytest.mark.parametrize("format_", ["JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "MPO"])
def test_an_encoded_file_is_kept_byte_for_byte_though_its_source_moves_it(
    tmp_path: Path, format_: str
) -> None:
    path = tmp_path / "in.dat"
    image = Image.fromarray(picture(3))
    more = {"save_all": True, "append_images": [image]} if format_ == "MPO" else {}
    image.save(path, format_, **more)
    data = path.read_bytes()
    with keeping(tmp_path / "e") as evidence:
        assert evidence.offer(*inspected(path, flags=("x",))) == "taken"
        path.unlink()
    (record,) = records(tmp_path / "e")
    assert (tmp_path / "e" / record.image).read_bytes() == data


# --- the same again


def test_the_same_frame_again_is_kept_once_and_a_fault_of_a_block_is_another_frame(
    tmp_path: Path,
) -> None:
    random = np.random.default_rng(0)
    scene = picture(4, (240, 160)).clip(20, 230)
    noisy = scene + random.integers(-3, 4, scene.shape)
    spot = scene.copy()
    spot[100:115, 80:90] = 0
    with keeping(tmp_path) as evidence:
        outcomes = [
            evidence.offer(*inspected(image.astype(np.uint8), at=at, verdict="ABSTAIN"))
            for at, image in enumerate([scene, scene, noisy, spot, spot])
        ]
    assert outcomes == ["taken", "seen before", "seen before", "taken", "seen before"]
    assert evidence.refused == {"seen before": 3}
    assert len(records(tmp_path)) == 2


def test_what_lay_there_before_a_restart_is_not_kept_again(tmp_path: Path) -> None:
    for _ in range(2):
        with keeping(tmp_path) as evidence:
            assert evidence.offer(*inspected(picture(4), flags=("x",))) == "taken"
    assert evidence.refused == {"seen before": 1}
    assert len(records(tmp_path)) == 1


def test_frames_of_one_moment_and_source_are_one_burst(tmp_path: Path) -> None:
    with keeping(tmp_path) as evidence:
        for number, (source, at) in enumerate(
            [("a", 0.0), ("a", 1.5), ("b", 1.6), ("a", 3.0), ("a", 5.5)]
        ):
            evidence.offer(*inspected(picture(number), at=at, source=source, flags=("x",)))
    bursts = [(r.source, r.burst) for r in records(tmp_path)]
    assert bursts[0] == bursts[1] == bursts[3]
    assert len(set(bursts)) == 3


# --- rates


def test_no_reason_takes_more_than_its_rate_and_none_from_another(tmp_path: Path) -> None:
    """Everything abstains, for a day, and chance draws a frame now and then."""
    caps = Caps(per_minute=2, per_hour=5, per_day=9, reserve=0)
    now = 0.0
    drawn = False
    taken: list[tuple[float, Reason]] = []
    with keeping(tmp_path, caps, clock=lambda: now, draw=lambda: 0.0 if drawn else 0.9) as evidence:
        for minute in range(24 * 60):
            for second in (0, 20, 40):
                now = minute * 60.0 + second
                drawn = minute % 240 == 0 and second == 40
                before = Counter(evidence.taken)
                number = minute * 60 + second
                outcome = evidence.offer(*inspected(picture(number), at=now, verdict="ABSTAIN"))
                if outcome == "taken":
                    (reason,) = Counter(evidence.taken) - before
                    taken.append((now, reason))
                    evidence._tasks.join()  # the disk must not be the limit
    times = {r: [at for at, reason in taken if reason == r] for r in REASONS}
    assert len(times["abstained"]) == 9
    assert len(times["sample"]) == 6
    for span, cap in ((60, 2), (3600, 5), (DAY, 9)):
        for reason in REASONS:
            for start in times[reason]:
                assert sum(start <= at < start + span for at in times[reason]) <= cap
    assert evidence.refused == {"too many": 24 * 60 * 3 - 15}


def test_rates_hold_over_a_restart(tmp_path: Path) -> None:
    caps = Caps(per_minute=2, reserve=0)
    for first in (0, 10):
        with keeping(tmp_path, caps) as evidence:
            outcomes = [
                evidence.offer(*inspected(picture(first + n), flags=("x",))) for n in range(3)
            ]
        if first == 0:
            assert outcomes == ["taken", "taken", "too many"]
    assert outcomes == ["too many"] * 3


def test_a_place_is_free_again_when_its_span_is_over() -> None:
    rates = Rates(Caps(per_minute=1, per_hour=2, per_day=3))
    for at in (0.0, 60.0):
        assert rates.room("sample", at)
        rates.take("sample", at)
        assert not rates.room("sample", at + 59)
    assert not rates.room("sample", 3599.0)
    assert rates.room("sample", 3600.0)
    rates.take("sample", 3600.0)
    assert not rates.room("sample", DAY - 1)
    assert rates.room("sample", DAY)
    assert not Rates(Caps(per_day=0)).room("sample", 0.0)


# --- the folder


def frames(folder: Path) -> list[tuple[str, int]]:
    return [(record.why, int(record.frame)) for record in records(folder)]


def test_when_full_the_oldest_of_the_most_plentiful_reason_goes(tmp_path: Path) -> None:
    folder = EvidenceFolder(tmp_path, Caps(files=5, reserve=0))
    fill(folder, range(2), "sample")
    fill(folder, range(2, 10), "abstained")
    assert frames(tmp_path) == [
        ("sample", 0), ("sample", 1), ("abstained", 7), ("abstained", 8), ("abstained", 9),
    ]  # fmt: skip
    assert folder.evicted == {"abstained": 5}
    fill(folder, range(10, 12), "flagged")
    assert frames(tmp_path)[:3] == [("sample", 1), ("abstained", 8), ("abstained", 9)]


def test_what_was_collected_goes_first(tmp_path: Path) -> None:
    folder = EvidenceFolder(tmp_path, Caps(files=4, reserve=0))
    packed = fill(folder, range(1), "sample")
    fill(folder, range(1, 4), "abstained")
    mark_packed(tmp_path, packed)
    add(folder, 4, "abstained")
    assert frames(tmp_path) == [("abstained", n) for n in range(1, 5)]
    assert [packed for _, packed in read_records(tmp_path)[0]] == [False] * 4


def test_the_bytes_on_disk_stay_below_the_cap(tmp_path: Path) -> None:
    caps = Caps(bytes=10 * 8192, reserve=0)
    folder = EvidenceFolder(tmp_path, caps)
    fill(folder, range(30), "sample", 4000)
    assert len(records(tmp_path)) == 10
    used = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
    assert used <= caps.bytes
    assert EvidenceFolder(tmp_path, caps).size == folder.size


def test_names_alone_give_a_later_start_the_same_folder(tmp_path: Path) -> None:
    folder = EvidenceFolder(tmp_path, Caps(reserve=0))
    fill(folder, range(3), "sample")
    mark_packed(tmp_path, fill(folder, range(3, 5), "drifted"))
    again = EvidenceFolder(tmp_path, Caps(reserve=0))
    assert again.counts == folder.counts == {"sample": 3, "drifted": 2}
    record = add(again, 5, "sample")
    assert int(record.image[:8]) == 6


@pytest.mark.parametrize("seed", range(20))
def test_no_reason_is_ever_crowded_out(seed: int) -> None:
    """Whatever comes in whatever order: a reason keeps its fair share of the places."""
    random = np.random.default_rng(seed)
    weights = random.dirichlet([0.3] * len(REASONS))
    kept: list[Piece] = []
    offered: Counter[Reason] = Counter()
    for number in range(400):
        if len(kept) == 40:
            kept.remove(first_to_go(kept))
        why = REASONS[random.choice(len(REASONS), p=weights)]
        offered[why] += 1
        kept.append(Piece(f"{number:08}-{why}-{number:016x}.png", 1, packed=False))
    counts = Counter(piece.why for piece in kept)
    for why in REASONS:
        assert counts[why] >= min(offered[why], 40 // len(REASONS) - 1)


def test_leftovers_go_at_the_start_and_nothing_else_does(tmp_path: Path) -> None:
    folder = EvidenceFolder(tmp_path, Caps(reserve=0))
    kept, bare, lost = fill(folder, range(3), "sample")
    (tmp_path / f"{bare.image}.json").unlink()
    (tmp_path / lost.image).unlink()
    for name in (f".{kept.image}.a8s7", f".{kept.image}.json.a8s7"):
        (tmp_path / name).write_bytes(b"half")
    mine = ["notes.txt", ".hidden", "00000001-holiday.png"]
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    EvidenceFolder(tmp_path, Caps(reserve=0))
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {kept.image, f"{kept.image}.json", *mine}


def test_only_this_user_may_look(tmp_path: Path) -> None:
    EvidenceFolder(tmp_path / "e", Caps())
    assert (tmp_path / "e").stat().st_mode & 0o077 == 0


# --- trouble


def test_the_reserve_of_the_disk_is_left_free(tmp_path: Path) -> None:
    with keeping(tmp_path, Caps(reserve=2**62)) as evidence:
        assert evidence.offer(*inspected(picture(1), flags=("x",))) == "taken"
    assert evidence.refused == {"no room": 1}
    assert list(tmp_path.iterdir()) == []


SMALL_DISK = """
import shutil, sys, pathlib
from runtime.line.evidence_folder import *
from tests.evidence_pieces import add
disk = pathlib.Path(sys.argv[1])
caps = Caps(reserve=5 * 2**19)
folder = EvidenceFolder(disk / "evidence", caps)
for number in range(100):
    add(folder, number, "sample", 100_000)
    assert shutil.disk_usage(disk).free >= caps.reserve
assert 10 < folder.counts["sample"] < 30, folder.counts
(disk / "other").write_bytes(bytes(2**20))  # somebody else needs room: evidence gives way
before = folder.counts["sample"]
add(folder, 100, "sample", 100_000)
assert shutil.disk_usage(disk).free >= caps.reserve
assert 0 < folder.counts["sample"] < before
(disk / "more").write_bytes(bytes(shutil.disk_usage(disk).free))
held = folder.counts
try: add(folder, 101, "sample", 100_000)
except NoRoomError: pass
else: raise AssertionError("the disk is full")
assert folder.counts == held, "nothing is given up for what does not fit anyway"
print("held")
"""


def test_on_a_small_disk_others_have_room(tmp_path: Path) -> None:
    command = [*mounting(f"mount -t tmpfs -o size=5M tmpfs {tmp_path}"), sys.executable, "-c"]
    done = subprocess.run(
        [*command, SMALL_DISK, str(tmp_path)], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.stdout == "held\n", done.stderr


@pytest.mark.parametrize("mode", ["killed", "full"])
def test_interrupted_at_every_call_an_image_and_its_record_are_there_together_or_not_at_all(
    tmp_path: Path, mode: str
) -> None:
    from tests.crashes import run_with_crashes

    calls = run_with_crashes("tests.evidence_stories", tmp_path, mode, str(tmp_path))
    assert len(calls.split()) == 4
    assert min(map(int, calls.split())) >= 3


def test_a_folder_that_cannot_be_used_is_counted_and_used_once_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "e").write_bytes(b"a file where the folder should be")
    with keeping(tmp_path / "e") as evidence:
        offer = functools.partial(_offer_and_wait, evidence)
        assert offer(*inspected(picture(1), flags=("x",))) == "taken"
        assert offer(*inspected(picture(2), flags=("x",))) == "taken"
        assert evidence.refused == {"failed": 2}
        (tmp_path / "e").unlink()
        assert offer(*inspected(picture(3), flags=("x",))) == "taken"
    assert len(records(tmp_path / "e")) == 1
    assert sum("told once" in line for line in caplog.messages) == 1


def _offer_and_wait(evidence: Evidence, frame: Frame, found: Inspected) -> str:
    outcome = evidence.offer(frame, found)
    evidence._tasks.join()
    return outcome


def test_whatever_a_frame_is_the_loop_hears_a_word(tmp_path: Path) -> None:
    with keeping(tmp_path) as evidence:
        frame, found = inspected(picture(1), flags=("x",))
        assert evidence.offer(frame._replace(image=tmp_path / "gone.png"), found) == "failed"
        bad = frame._replace(image=np.zeros((4, 4, 7, 2), np.float64))
        assert evidence.offer(bad, found) == "taken"
    assert evidence.refused == {"failed": 2}
    assert records(tmp_path) == []


def test_a_slow_disk_costs_the_loop_nothing_but_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, write = threading.Event(), atomic.write_bytes

    def waiting(path: Path, data: bytes) -> None:
        assert slow.wait(30)
        write(path, data)

    monkeypatch.setattr(atomic, "write_bytes", waiting)
    with keeping(tmp_path) as evidence:
        outcomes = [evidence.offer(*inspected(picture(n), flags=("x",))) for n in range(20)]
        slow.set()
    taken = outcomes.count("taken")
    assert 8 <= taken <= 9
    assert evidence.refused == {"busy": 20 - taken}
    assert len(records(tmp_path)) == taken


def test_the_metrics_count_what_became_of_it(tmp_path: Path) -> None:
    with keeping(tmp_path, Caps(files=2, reserve=0)) as evidence:
        for number in range(3):
            _offer_and_wait(evidence, *inspected(picture(number), verdict="ABSTAIN"))
        _offer_and_wait(evidence, *inspected(picture(1), probabilities=SURE, flags=("x",)))
    text = evidence.metrics()
    for line in [
        'fieldfit_evidence_images{reason="abstained"} 2',
        'fieldfit_evidence_taken_total{reason="abstained"} 3',
        'fieldfit_evidence_evicted_total{reason="abstained"} 1',
        'fieldfit_evidence_refused_total{why="seen before"} 1',
        'fieldfit_evidence_refused_total{why="no room"} 0',
    ]:
        assert line in text.splitlines()
