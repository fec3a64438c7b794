"""Slots on a real disk: staged whole, mended, collected, told of, and worked on by two at once."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.small_bundles import small_zip
from runtime.__main__ import main as fieldfit
from runtime.bundle import Bundle
from runtime.delivery import slots as slots_module
from runtime.delivery.slots import Slot, Slots, default_folder
from runtime.errors import BundleError, FieldfitError, UpdateError
from tests.mounts import mounting

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, so nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots(tmp_path / "state", now=lambda: "2026-01-01T00:00:00+00:00")


def commit(slots: Slots, archive: Path) -> Slot:
    slot = slots.stage(archive)
    slots.activate(slot.sha256)
    slots.begin_try()
    return slots.commit(slot.sha256)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def versions(slots: Slots) -> dict[str, str | None]:
    state = slots.status().state
    pending = state.pending.release if state.pending else None
    parts = {"current": state.current, "previous": state.previous, "pending": pending}
    return {part: release.version if release else None for part, release in parts.items()}


# --- stage


def test_a_zip_and_its_folder_are_the_same_slot(slots: Slots, tmp_path: Path) -> None:
    archive = small_zip(tmp_path)
    slot = slots.stage(archive)
    before = listing(slots.folder)
    assert slot.sha256 == Bundle.open(archive).sha256()
    shutil.copytree(slot.bundle, tmp_path / "bundle")
    assert slots.stage(tmp_path / "bundle") == slots.stage(archive) == slot
    assert listing(slots.folder) == before
    assert {file.name: file.read_bytes() for file in slot.bundle.iterdir()} == {
        name: Bundle.open(archive).read(name) for name in Bundle.open(archive).names()
    }
    assert slot.engines.stat().st_mode & 0o777 == 0o700


def test_what_is_no_bundle_leaves_no_slot(slots: Slots, tmp_path: Path) -> None:
    archive = small_zip(tmp_path)
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    with pytest.raises(BundleError):
        slots.stage(archive)
    assert slots.status().staged == ()


def test_an_older_bundle_is_refused_unless_it_is_allowed(slots: Slots, tmp_path: Path) -> None:
    commit(slots, small_zip(tmp_path, "1.1.0"))
    older = small_zip(tmp_path, "1.0.0")
    with pytest.raises(UpdateError, match=r"1\.0\.0 .*older than 1\.1\.0"):
        slots.stage(older)
    slot = slots.stage(older, allow_lower=True)
    with pytest.raises(UpdateError, match=r"older than 1\.1\.0"):
        slots.activate(slot.sha256)
    slots.activate(slot.sha256, allow_lower=True)


def test_a_lost_state_makes_no_older_bundle_new(slots: Slots, tmp_path: Path) -> None:
    commit(slots, small_zip(tmp_path, "1.0.0"))
    commit(slots, small_zip(tmp_path, "1.1.0"))
    shutil.rmtree(slots.folder)
    with pytest.raises(UpdateError, match=r"older than 1\.1\.0"):
        slots.stage(small_zip(tmp_path, "1.0.0"))
    assert slots.status().state.floor == "1.1.0"
    commit(slots, small_zip(tmp_path, "1.1.0"))


def test_what_cannot_be_kept_as_floor_is_not_committed(
    slots: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(slots, small_zip(tmp_path, "1.0.0"))
    before = slots.status().state.current
    monkeypatch.setenv("FIELDFIT_FLOOR", "/sys/floor.json")
    other = Slots(slots.folder)
    with pytest.raises(UpdateError, match=r"/sys/floor\.json.*FIELDFIT_FLOOR"):
        commit(other, small_zip(tmp_path, "1.1.0"))
    assert slots.status().state.current == before


def test_a_damaged_slot_is_mended_by_staging_it_again(slots: Slots, tmp_path: Path) -> None:
    archive = small_zip(tmp_path)
    slot = commit(slots, archive)
    (slot.bundle / "fp32.onnx").write_bytes(b"")
    assert "expected 5,000 bytes, got 0" in slots.recover()[0]
    assert slots.stage(archive) == slot
    assert slots.recover() == ()
    assert slots.current() == slot
    slots.state_file.unlink()
    assert slots.current() == slot


def test_what_a_crash_left_behind_is_swept_away(slots: Slots, tmp_path: Path) -> None:
    slot = commit(slots, small_zip(tmp_path))
    before = listing(slots.folder)
    for left in (f".{slot.sha256}.x7", f".{slot.sha256}.old"):
        (slots.folder / "slots" / left / "bundle").mkdir(parents=True)
    (slots.folder / ".state.json.x7").touch()
    (slot.folder / ".state.json.x7").touch()
    with slots.lock():
        pass
    assert listing(slots.folder) == before


# --- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", ["bundle/fp32.onnx", "bundle/manifest.json", "release.json"])
@pytest.mark.parametrize("spoil", [flip, remove])
def test_a_damaged_current_slot_gives_way_to_the_one_before(
    slots: Slots, tmp_path: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    first = commit(slots, small_zip(tmp_path, "1.0.0"))
    second = commit(slots, small_zip(tmp_path, "1.1.0"))
    spoil(second.folder / name)
    done = slots.recover()
    assert done[0].endswith(f"{first.release} answers")
    assert versions(slots) == {"current": "1.0.0", "previous": None, "pending": None}
    assert slots.recover() == ()
    failure = slots.status().state.failure(second.sha256)
    assert failure
    assert failure.damaged


def test_nothing_is_rolled_back_to_a_damaged_slot(slots: Slots, tmp_path: Path) -> None:
    first = commit(slots, small_zip(tmp_path, "1.0.0"))
    commit(slots, small_zip(tmp_path, "1.1.0"))
    flip(first.bundle / "fp32.onnx")
    with pytest.raises(UpdateError, match=r"changed since export.*small 1\.1\.0 .* stays"):
        slots.rollback("bad")
    assert versions(slots) == {"current": "1.1.0", "previous": "1.0.0", "pending": None}


def test_a_damaged_slot_that_plays_no_part_is_removed(slots: Slots, tmp_path: Path) -> None:
    commit(slots, small_zip(tmp_path, "1.0.0"))
    staged = slots.stage(small_zip(tmp_path, "1.1.0"))
    flip(staged.folder / "release.json")
    assert len(slots.status().problems) == 1
    assert slots.recover()[0].endswith("it is removed")
    assert slots.status().problems == ()
    assert not staged.folder.exists()


def test_a_current_slot_that_is_gone_stays_named_until_its_bundle_is_staged_again(
    slots: Slots, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = small_zip(tmp_path)
    slot = commit(slots, archive)
    shutil.rmtree(slot.folder)
    assert fieldfit(["status", "--mend", "--state", str(slots.folder)]) == 1
    assert capsys.readouterr().out.endswith("is missing\nnext: fieldfit stage BUNDLE.zip\n")
    assert slots.stage(archive) == slot
    assert slots.status().problems == ()
    assert slots.current() == slot


def test_a_slot_that_holds_another_bundle_is_damaged(slots: Slots, tmp_path: Path) -> None:
    first = commit(slots, small_zip(tmp_path, "1.0.0"))
    second = slots.stage(small_zip(tmp_path, "1.1.0"))
    shutil.rmtree(second.bundle)
    shutil.copytree(first.bundle, second.bundle)
    with pytest.raises(UpdateError, match="holds another bundle"):
        slots.activate(second.sha256)


def test_a_slot_on_trial_that_is_damaged_is_given_up(slots: Slots, tmp_path: Path) -> None:
    commit(slots, small_zip(tmp_path, "1.0.0"))
    slot = slots.stage(small_zip(tmp_path, "1.1.0"))
    slots.activate(slot.sha256)
    flip(slot.bundle / "fp32.onnx")
    assert slots.begin_try() is None
    assert versions(slots) == {"current": "1.0.0", "previous": None, "pending": None}


@pytest.mark.parametrize("spoil", [flip, remove])
def test_a_lost_state_is_taken_from_its_copy_in_the_slots(
    slots: Slots, tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    commit(slots, small_zip(tmp_path, "1.0.0"))
    commit(slots, small_zip(tmp_path, "1.1.0"))
    slots.rollback("bad")
    commit(slots, small_zip(tmp_path, "1.2.0"))
    slots.activate(slots.stage(small_zip(tmp_path, "2.0.0")).sha256)
    state = slots.status().state
    spoil(slots.folder / "state.json")
    assert slots.status().state == state
    assert "taken from its copy in the slot of small 1.2.0" in slots.status().problems[0]
    assert slots.current() is not None
    assert slots.begin_try() is not None
    assert "taken from its copy" in caplog.text
    assert slots.status().problems == ()


def test_a_lost_state_of_which_there_is_no_copy_makes_nothing_current(
    slots: Slots, tmp_path: Path
) -> None:
    slot = slots.stage(small_zip(tmp_path))
    (slots.folder / "state.json").unlink()
    assert slots.recover() == (
        f"{slots.folder}/state.json: missing; no slot has a copy of it, so none is current",
    )
    assert slots.status().staged == (slot.release,)


MEDIUM, LIMIT = OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many")


def unreadable(monkeypatch: pytest.MonkeyPatch, spoiled: Path, error: OSError) -> None:
    real = Path.open

    def spoil(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == spoiled:
            raise error
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", spoil)


@pytest.mark.parametrize("name", ["bundle/fp32.onnx", "release.json"])
def test_a_medium_that_cannot_be_read_is_damage_and_a_limit_of_the_process_is_none(
    slots: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    commit(slots, small_zip(tmp_path, "1.0.0"))
    slot = commit(slots, small_zip(tmp_path, "1.1.0"))
    with monkeypatch.context() as patch:
        unreadable(patch, slot.folder / name, LIMIT)
        with pytest.raises((OSError, BundleError)):
            slots.recover()
    assert versions(slots)["current"] == "1.1.0"
    unreadable(monkeypatch, slot.folder / name, MEDIUM)
    assert slots.recover()
    assert versions(slots)["current"] == "1.0.0"


def test_a_state_on_a_medium_that_cannot_be_read_is_taken_from_its_copy(
    slots: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(slots, small_zip(tmp_path))
    unreadable(monkeypatch, slots.state_file, MEDIUM)
    assert versions(slots)["current"] == "1.0.0"
    assert "damaged (Input/output error)" in slots.status().problems[0]


# --- room


def test_unused_slots_are_collected_and_those_in_use_stay(slots: Slots, tmp_path: Path) -> None:
    commit(slots, small_zip(tmp_path, "1.0.0"))
    commit(slots, small_zip(tmp_path, "1.1.0"))
    unused = slots.stage(small_zip(tmp_path, "1.2.0"))
    slots.activate(slots.stage(small_zip(tmp_path, "1.3.0")).sha256)
    assert slots.collect() == (unused.sha256,)
    assert slots.collect() == ()
    assert slots.recover() == ()
    assert versions(slots) == {"current": "1.1.0", "previous": "1.0.0", "pending": "1.3.0"}


def test_staging_says_how_many_bytes_it_needs_and_collects_first(
    slots: Slots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = commit(slots, small_zip(tmp_path, "1.0.0"))
    unused = slots.stage(small_zip(tmp_path, "1.1.0"))
    big = small_zip(tmp_path, "1.2.0", size=100_000)
    monkeypatch.setattr(slots_module, "_free", lambda folder: 1_000_000)
    with pytest.raises(UpdateError, match=r"expected 1,159,168 bytes free, got 1,000,000"):
        slots.stage(big)
    assert not unused.folder.exists()
    assert slots.current() == slot


FULL = """
import sys
from pathlib import Path
from benchmarks.small_bundles import small_zip
from runtime.delivery import slots as slots_module
from runtime.bundle import Bundle
from runtime.errors import UpdateError
from runtime.delivery.slots import Slots

disk, zips = Path(sys.argv[1]), Path(sys.argv[2])
old, new = small_zip(zips, "1.0.0"), small_zip(zips, "1.1.0")
slots, rest = Slots(disk / "state"), disk / "rest"
sha = Bundle.open(new).sha256()


def fill(free):
    with rest.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, rest.stat().st_size - 4096 * free))


def meets_a_full_disk(act):
    free = refused = 0
    while True:
        fill(free)
        room = slots_module._free
        slots_module._free = lambda folder: 10**9  # it was there a moment ago
        try:
            act()
        except UpdateError as error:
            refused += "no room: expected" in str(error)
        else:
            return refused
        finally:
            slots_module._free = room
            rest.unlink()
        current = slots.current()
        if current:
            Bundle.open(current.bundle)
        assert not slots.status().problems
        free += 1


def commit(archive):
    slot = slots.stage(archive)
    slots.activate(slot.sha256)
    slots.begin_try()
    slots.commit()


commit(old)
print(meets_a_full_disk(lambda: slots.stage(new)))
print(meets_a_full_disk(lambda: slots.activate(sha)))
print(meets_a_full_disk(slots.begin_try))
print(meets_a_full_disk(lambda: slots.commit(sha)))
print(meets_a_full_disk(lambda: slots.rollback("bad", sha)))
print(slots.current().version, slots.recover())
"""


def test_a_full_disk_leaves_what_answers_and_is_recovered_from(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    before = mounting(f"mount -t tmpfs -o size=1536k none {disk}")
    done = subprocess.run(
        [*before, sys.executable, "-c", FULL, str(disk), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *refused, end = done.stdout.splitlines()
    assert end == "1.0.0 ()"
    assert min(map(int, refused)) >= 1
    assert int(refused[0]) >= 5


# --- two at once

WORKER = """
import os, sys
from pathlib import Path
from runtime.delivery.slots import Slots

os.fsync = lambda descriptor: None
slots, sha256 = Slots(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(15):
    with slots.lock():
        slots.activate(sha256, again=True)
        slots.begin_try()
        slots.rollback("another turn", sha256)
"""


def test_two_processes_lose_no_step_and_a_reader_always_finds_a_whole_state(
    slots: Slots, tmp_path: Path
) -> None:
    commit(slots, small_zip(tmp_path, "1.0.0"))
    sha256 = slots.stage(small_zip(tmp_path, "1.1.0")).sha256
    before = slots.status().state.generation
    command = [sys.executable, "-c", WORKER, str(slots.folder), sha256]
    workers = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout
        worker.stdout.readline()
    for worker in workers:
        assert worker.stdin
        worker.stdin.write(b"go\n")
        worker.stdin.flush()
    while any(worker.poll() is None for worker in workers):
        status = slots.status()
        assert status.problems == ()
        assert status.state.current
    assert [worker.wait() for worker in workers] == [0, 0]
    for worker in workers:
        worker.communicate()
    assert slots.status().state.generation == before + 2 * 15 * 3


def test_a_command_says_for_whom_it_waits_and_reading_does_not_wait(
    slots: Slots, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "runtime", "stage", str(small_zip(tmp_path))]
    with slots.lock():
        waiting = subprocess.Popen(
            [*command, "--state", str(slots.folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stderr
        said = waiting.stderr.readline()
        assert said == f"fieldfit: waiting for process {os.getpid()}, which works on the slots\n"
        assert fieldfit(["status", "--state", str(slots.folder)]) == 0
        assert slots.status().staged == ()
    out, _ = waiting.communicate()
    assert out.startswith("staged small 1.0.0")
    assert waiting.returncode == 0


def test_a_step_that_fails_lets_the_lock_go(slots: Slots) -> None:
    with pytest.raises(UpdateError, match="nothing to commit"):
        slots.commit()
    with slots.lock(), slots.lock():
        pass
    assert not list(slots.folder.glob("*.lock"))


# --- commands


def test_status_and_stage_lead_from_one_step_to_the_next(
    slots: Slots, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str, code: int = 0) -> list[str]:
        assert fieldfit([*arguments, "--state", str(slots.folder)]) == code
        return capsys.readouterr().out.splitlines()

    assert said("status") == [
        "current   none: nothing was committed here yet",
        "next: fieldfit stage BUNDLE.zip",
    ]
    archive = small_zip(tmp_path)
    sha256 = Bundle.open(archive).sha256()
    assert said("stage", str(archive)) == [
        f"staged small 1.0.0 ({sha256[:12]}): every byte is as the manifest says",
        f"next: fieldfit activate {sha256[:12]}",
    ]
    assert said("status")[1:] == [
        f"staged    small 1.0.0 ({sha256[:12]})",
        f"next: fieldfit activate {sha256[:12]}",
    ]
    slots.activate(sha256)
    slots.begin_try()
    assert said("status")[1:] == [
        f"on trial  small 1.0.0 ({sha256[:12]}), 2 of 3 tries left",
        "next: fieldfit commit, if it answers well; else fieldfit rollback",
    ]
    slot = slots.commit()
    (slots.folder / "state.json").unlink()
    assert any(line.startswith("problem   ") for line in said("status", code=1))
    facts = json.loads(said("status", "--json", code=1)[0])
    assert facts["current"]["sha256"] == slot.sha256
    assert facts["floor"] == "1.0.0"
    assert len(facts["problems"]) == 1
    *_, last = said("status", code=1)
    assert last == "next: fieldfit status --mend"
    mended = said("status", "--mend")
    assert "taken from its copy" in mended[0]
    assert mended[-1] == "next: fieldfit stage BUNDLE.zip"
    assert json.loads(said("status", "--mend", "--json")[0])["mended"] == []


def test_stage_prints_its_slot_for_programs(
    slots: Slots, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = small_zip(tmp_path)
    assert fieldfit(["stage", str(archive), "--json", "--state", str(slots.folder)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sha256"] == Bundle.open(archive).sha256()
    assert Path(facts["folder"]) == slots.folder / "slots" / facts["sha256"]


def test_an_older_bundle_is_one_line_and_exit_code_1(
    slots: Slots, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(slots, small_zip(tmp_path, "2.0.0"))
    older = str(small_zip(tmp_path, "1.0.0"))
    assert fieldfit(["stage", older, "--state", str(slots.folder)]) == 1
    assert "older than 2.0.0" in capsys.readouterr().err
    assert fieldfit(["stage", older, "--allow-lower", "--state", str(slots.folder)]) == 0


def test_a_slot_is_found_by_the_beginning_of_its_name(slots: Slots, tmp_path: Path) -> None:
    found = {slots.stage(small_zip(tmp_path, v)).sha256 for v in ("1.0.0", "1.1.0")}
    for sha256 in found:
        assert slots.find(sha256[:12]) == slots.find(sha256) == sha256
    for start in ("", "z"):
        with pytest.raises(FieldfitError, match=sorted(found)[0][:12]):
            slots.find(start)


def test_the_folder_is_the_users_wish_then_the_systems_then_the_homes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("FIELDFIT_STATE", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_folder() == tmp_path / ".local" / "state" / "fieldfit"
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert default_folder() == Path("/xdg/fieldfit")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_folder() == Path("/var/lib/fieldfit")
    monkeypatch.setenv("FIELDFIT_STATE", "/data/fieldfit")
    assert default_folder() == Path("/data/fieldfit")
