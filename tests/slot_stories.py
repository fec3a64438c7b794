"""Each command of the slots, interrupted at every call that changes files, and what is found then.

``python -m tests.slot_stories MODE FOLDER``, which ``test_slots_crashes`` starts, prints how many
calls each command has, as JSON, or fails at the first thing that is not as it must be.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import msgspec

from benchmarks.small_bundles import small_zip
from runtime.bundle import Bundle
from runtime.delivery.floor import Floors, second_copy
from runtime.delivery.slot_state import State, version_key
from runtime.delivery.slots import Slots
from tests.crashes import Mode, rounds


def slots(folder: Path) -> Slots:
    """On a clock that stands still, so that states can be compared."""
    return Slots(folder, now=lambda: "2026-01-01T00:00:00+00:00")


class Story(NamedTuple):
    """A command, and what it is run on."""

    prepare: Callable[[Slots, dict[str, Path]], object]
    act: Callable[[Slots, dict[str, Path]], object]
    repeats: bool = True
    """Whether saying it again changes nothing more."""
    damaged: bool = False
    """Whether something is damaged before, so that it may be so after an interruption."""


def commit(slots: Slots, archive: Path) -> None:
    sha256 = slots.stage(archive).sha256
    slots.activate(sha256)
    slots.begin_try()
    slots.commit(sha256)


def two_committed(slots: Slots, zips: dict[str, Path]) -> None:
    commit(slots, zips["1.0.0"])
    commit(slots, zips["1.1.0"])


def on_trial(slots: Slots, zips: dict[str, Path]) -> None:
    two_committed(slots, zips)
    slots.activate(slots.stage(zips["2.0.0"]).sha256)
    slots.begin_try()


def sha(path: Path) -> str:
    return Bundle.open(path).sha256()


def damage(slots: Slots) -> None:
    current = slots.current()
    assert current
    (current.bundle / "fp32.onnx").write_bytes(b"damaged")


def damaged_current(slots: Slots, zips: dict[str, Path]) -> None:
    two_committed(slots, zips)
    damage(slots)


def lost_state(slots: Slots, zips: dict[str, Path]) -> None:
    on_trial(slots, zips)
    (slots.folder / "state.json").write_bytes(b"")


def staged_too_much(slots: Slots, zips: dict[str, Path]) -> None:
    two_committed(slots, zips)
    slots.stage(zips["2.0.0"])


STORIES = {
    "stage": Story(two_committed, lambda s, z: s.stage(z["2.0.0"])),
    "stage on a new device": Story(lambda s, z: None, lambda s, z: s.stage(z["1.0.0"])),
    "stage over a damaged slot": Story(
        damaged_current, lambda s, z: s.stage(z["1.1.0"]), damaged=True
    ),
    "activate": Story(staged_too_much, lambda s, z: s.activate(sha(z["2.0.0"]))),
    "begin a try": Story(on_trial, lambda s, z: s.begin_try(), repeats=False),
    "commit": Story(on_trial, lambda s, z: s.commit(sha(z["2.0.0"]))),
    "roll back a trial": Story(on_trial, lambda s, z: s.rollback("bad", sha(z["2.0.0"]))),
    "roll back the current": Story(two_committed, lambda s, z: s.rollback("bad", sha(z["1.1.0"]))),
    "collect": Story(staged_too_much, lambda s, z: s.collect()),
    "recover from a damaged slot": Story(damaged_current, lambda s, z: s.recover(), damaged=True),
    "recover from a damaged state": Story(lost_state, lambda s, z: s.recover(), damaged=True),
}


def tell(name: str, story: Story, mode: Mode, folder: Path) -> int:
    """Interrupt it everywhere, look each time, and return the number of calls."""
    zips = {version: small_zip(folder, version) for version in ("1.0.0", "1.1.0", "2.0.0")}
    template, work = folder / "template", folder / "work"
    story.prepare(slots(template), zips)
    before = slots(template).status()
    copy(template, work)
    story.act(slots(work), zips)
    after = slots(work).status()
    count = 0
    for ended in rounds(mode, lambda: copy(template, work), lambda: story.act(slots(work), zips)):
        count = ended.call
        where = f"{name}: {mode} call {ended.call}: {ended.message}"
        found = slots(work).status()
        assert version_key(Floors(work).read().version) >= version_key(found.state.floor), where
        assert essence(found.state) in (essence(before.state), essence(after.state)), where
        if mode == "full":
            assert not ended.message or "no room: expected" in ended.message, where
            assert ended.message or essence(found.state) == essence(after.state), where
        if not story.damaged:
            assert not found.problems, where
            for sha256 in found.state.in_use():
                Bundle.open(work / "slots" / sha256 / "bundle")
        story.act(slots(work), zips)
        again = slots(work).status()
        if story.repeats:
            assert essence(again.state) == essence(after.state), where
        assert (again.staged, again.problems) == (after.staged, after.problems), where
        assert left_over(work) == [], where
    return count


def essence(state: State) -> State:
    """All but the count of steps."""
    return msgspec.structs.replace(state, generation=0)


def left_over(folder: Path) -> list[str]:
    folders = (folder, second_copy(folder).parent)
    files = [path for place in folders for path in place.rglob("*")]
    return [str(path) for path in files if path.name.startswith(".") or path.suffix == ".lock"]


def copy(template: Path, to: Path) -> None:
    for beside in (lambda state: state, lambda state: second_copy(state).parent):
        shutil.rmtree(beside(to), ignore_errors=True)
        if beside(template).exists():
            shutil.copytree(beside(template), beside(to))


if __name__ == "__main__":
    modes: dict[str, Mode] = {mode: mode for mode in get_args(Mode)}
    calls = {}
    for number, (name, story) in enumerate(STORIES.items()):
        place = Path(sys.argv[2], str(number))
        place.mkdir()
        calls[name] = tell(name, story, modes[sys.argv[1]], place)
    print(json.dumps(calls))
