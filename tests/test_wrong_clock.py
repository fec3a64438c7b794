"""``fieldfit update`` as a whole program under a clock that is wrong, or jumps while it runs.

The clock is libfaketime's, so that every library has it: ours, python-tuf's, TLS and the kernel's
file times. Over both transports.
"""

import datetime
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from runtime.delivery.floor import Floor, Floors, merge
from runtime.delivery.slots import Slots
from runtime.delivery.update import Request, update
from tests.model_zips import SIZE, model_zip
from tests.test_engines import CHANNELS
from tests.update_repository import DAY, NOW, Forge, Server, copy_device

ROOT = Path(__file__).parent.parent
DEVICE = "0" * 32

pytestmark = pytest.mark.skipif(
    shutil.which("faketime") is None, reason="libfaketime is not installed (Debian: faketime)"
)


@functools.cache
def library() -> str:
    told = subprocess.run(
        ["faketime", "now", "printenv", "LD_PRELOAD"], capture_output=True, text=True, check=True
    )
    return told.stdout.strip()


class Site(NamedTuple):
    """A device that runs version 1 and has seen version 2 on offer, and what it is offered."""

    state: Path
    forge: Forge
    old: Path
    """The repository before version 2."""
    source: str
    clock: Path
    """What time it is for the programs of the device, in libfaketime's words."""
    jumper: Path

    def fieldfit(self, *arguments: str, jump: str = "") -> "subprocess.CompletedProcess[str]":
        """Run it on the device's clock, which says ``jump`` once new metadata was believed."""
        return subprocess.run(
            [sys.executable, "-m", "runtime", *arguments, "--state", str(self.state)],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
            env=self.environment | ({"JUMP": jump, "PYTHONPATH": str(self.jumper)} if jump else {}),
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ, "LD_PRELOAD": library(), "FAKETIME_TIMESTAMP_FILE": str(self.clock),
            "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1", "TZ": "UTC", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip

    def refuses(self, *sentences: str, jump: str = "", provision: Sequence[str] = ()) -> None:
        """It says one of ``sentences`` in one line; slots are as they were, no floor is lower."""
        before, floor = Slots(self.state).status(), Floors(self.state).read()
        said = self.fieldfit("update", "--from", self.source, *provision, jump=jump)
        assert said.returncode == 1, said.stdout
        (line,) = said.stderr.splitlines()
        assert any(sentence in line for sentence in sentences), line
        assert line.endswith("(what runs goes on running)")
        assert Slots(self.state).status() == before
        after = Floors(self.state).read()
        assert merge(floor, after) == after
        assert after.time <= self.forge.timestamp.expires.timestamp()

    def offers(self, folder: Path) -> None:
        shutil.rmtree(self.forge.folder)
        shutil.copytree(folder, self.forge.folder)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Forge, Path]:
    """The device's state, the repository with version 2, and a copy of it before that."""
    folder = tmp_path_factory.mktemp("template")
    zips = {version: model_zip(folder, version).read_bytes() for version in ("1", "2")}
    forge, state = Forge(folder / "repository"), folder / "state"
    forge.publish("1", data=zips["1"])
    update(state, Request(forge.folder.as_uri(), "line", forge.trust), device=DEVICE)
    Slots(state).begin_try()
    Slots(state).commit()
    old = forge.copy(folder / "old")
    forge.publish("2", data=zips["2"], percentage=0)
    update(state, device=DEVICE)
    forge.publish("2", data=zips["2"])
    return state, forge, old


@pytest.fixture(params=["http", "file"])
def site(
    request: pytest.FixtureRequest, tmp_path: Path, template: tuple[Path, Forge, Path]
) -> Iterator[Site]:
    state, forge, old = template
    moved = forge.moved(tmp_path / "repository")
    jumper = tmp_path / "jumper"
    jumper.mkdir()
    (jumper / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def look(event, arguments):\n"
        "    if event == 'os.rename' and str(arguments[1]).endswith('timestamp.json'):\n"
        "        with open(os.environ['FAKETIME_TIMESTAMP_FILE'], 'w') as clock:\n"
        "            clock.write(os.environ['JUMP'])\n"
        "sys.addaudithook(look)\n"
    )
    with Server(moved.folder) as server:
        yield Site(
            copy_device(state, tmp_path / "state"), moved, old,
            server.url if request.param == "http" else moved.folder.as_uri(),
            tmp_path / "clock", jumper,
        )  # fmt: skip


@pytest.mark.parametrize("year", [1970, 2020, 2040])
def test_nothing_old_is_accepted_whatever_the_clock_says(site: Site, year: int) -> None:
    site.clock.write_text(f"@{year}-02-03 04:05:06")
    new = site.forge.copy(site.state.parent / "new")
    site.offers(site.old)
    site.refuses("set the clock", "older than what this device has seen", "out of date")
    site.offers(new)
    if year == 2040 or site.source.startswith("http"):
        site.refuses("set the clock")
    else:  # a stick with a higher version is how a device without a clock is updated
        assert site.fieldfit("update", "--from", site.source).returncode == 0
        pending = Slots(site.state).pending()
        assert pending is not None
        assert pending.version == "2"
    assert Floors(site.state).read().time > (NOW - DAY).timestamp()


def test_a_lost_state_and_a_lost_clock_together_make_nothing_old_new(site: Site) -> None:
    root = site.state.parent / "1.root.json"
    root.write_bytes(site.forge.trust)
    site.offers(site.old)
    shutil.rmtree(site.state)
    site.clock.write_text("@1970-02-03 04:05:06")
    site.refuses(
        "set the clock",
        "expected targets metadata",
        provision=("--channel", "line", "--root", str(root)),
    )
    assert not (site.state / "trust").exists()


def test_what_has_expired_is_not_new_again_in_1970(site: Site) -> None:
    site.forge.snapshot.expires = NOW - DAY / 24
    site.forge.publish("3", data=b"never fetched")
    Floors(site.state).lift(Floor(time=int(NOW.timestamp())))
    site.clock.write_text("@1970-02-03 04:05:06")
    site.refuses("set the clock", "out of date: snapshot expired")


@pytest.mark.parametrize("to", ["1970-02-03 04:05:06", "2040-02-03 04:05:06"])
def test_a_clock_that_jumps_in_mid_run_is_refused_and_the_line_answers(
    site: Site, tmp_path: Path, to: str
) -> None:
    """Ahead, nothing is taken; back, only a higher version from a stick. The line runs through."""
    site.clock.write_text(f"@{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M:%S}")
    picture = tmp_path / "cell.png"
    Image.fromarray(np.zeros((*SIZE, CHANNELS), np.uint8)).save(picture)
    with subprocess.Popen(
        [sys.executable, str(ROOT / "docs" / "examples" / "line.py")], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**site.environment, "FIELDFIT_STATE": str(site.state), "PYTHONPATH": str(ROOT)},
    ) as line:  # fmt: skip

        def answers() -> str:
            assert line.stdin
            assert line.stdout
            line.stdin.write(f"{picture}\n")
            line.stdin.flush()
            return str(json.loads(line.stdout.readline())["version"])

        assert answers() == "1"
        if to.startswith("2040") or site.source.startswith("http"):
            site.refuses("set the clock", jump=f"@{to}")
            assert site.clock.read_text() == f"@{to}"
            assert answers() == "1"
            site.refuses("set the clock")
        else:
            said = site.fieldfit("update", "--from", site.source, jump=f"@{to}")
            assert (said.returncode, said.stdout.splitlines()[0]) == (0, "staged: tiny 2 is new")
        assert site.clock.read_text() == f"@{to}"
        assert answers() == "1"
