"""An update interrupted at every call that changes files; runs under ``tests/crash_at.c``."""

import json
import shutil
import sys
from pathlib import Path
from typing import get_args

from runtime.bundle import Bundle
from runtime.delivery.floor import second_copy
from runtime.delivery.slots import Slots
from runtime.delivery.update import AS_PROVISIONED, Request, update
from runtime.errors import UpdateError
from tests.crashes import Mode, rounds
from tests.update_repository import Forge, copy_device

DEVICE = "0" * 32


def tell(mode: Mode, folder: Path, *, provision: bool) -> int:
    """A device that runs 1.0 is offered 1.1; returns the number of calls.

    With ``provision`` it is told to trust others from now on, who offer it nothing yet.
    """
    forge = Forge(folder / "repository")
    template, state = folder / "template", folder / "state"
    forge.publish("1.0")
    source = forge.folder.as_uri()
    update(template, Request(source, "line", forge.trust), device=DEVICE)
    Slots(template).begin_try()
    Slots(template).commit()
    before = Slots(template).status().state
    asked, right = AS_PROVISIONED, None
    if provision:
        others = Forge(folder / "others")
        others.publish("1.1", percentage=0)
        asked = Request(others.folder.as_uri(), "line", others.trust)
    else:
        right = forge.publish("1.1").sha256
    done = "pending" if right else "not in cohort"

    def prepare() -> None:
        shutil.rmtree(state, ignore_errors=True)
        shutil.rmtree(second_copy(state).parent, ignore_errors=True)
        copy_device(template, state)

    def look(where: str) -> str | None:
        """What is on trial, after what runs was found untouched and whole."""
        found = Slots(state).status()
        assert found.state.current == before.current, where
        assert not found.problems, where
        for sha256 in found.state.in_use():
            Bundle.open(state / "slots" / sha256 / "bundle")
        return found.state.pending.release.sha256 if found.state.pending else None

    count = 0
    for ended in rounds(mode, prepare, lambda: update(state, asked, device=DEVICE)):
        count = ended.call
        where = f"{mode} call {ended.call}: {ended.message}"
        assert look(where) in (None, right), where
        if mode == "full":
            assert not ended.message or ended.message.startswith(UpdateError.__name__), where
            assert ended.message or look(where) == right, where
        assert update(state, asked, device=DEVICE).outcome in ("staged", done), where
        assert update(state, device=DEVICE).outcome == done, where
        assert look(where) == right, where
        assert not left_over(state), where
        assert not list((state / "downloads").glob("*")), where
    return count


def left_over(state: Path) -> list[Path]:
    """Half-written files; those of the slots are swept with their next change."""
    files = (path for path in state.rglob("*") if "slots" not in path.parts)
    return [path for path in files if path.name.startswith((".", "tmp", "tuf.new"))]


if __name__ == "__main__":
    modes: dict[str, Mode] = {mode: mode for mode in get_args(Mode)}
    print(
        json.dumps(
            tell(modes[sys.argv[1]], Path(sys.argv[2]), provision=sys.argv[3] == "provision")
        )
    )
