"""``fieldfit update``: provisioned once, then without options, and one line for what is wrong."""

import json
from pathlib import Path

import pytest

from runtime.__main__ import main as fieldfit
from runtime.delivery.slots import Slots
from runtime.delivery.update import read_settings
from tests.update_repository import Forge


@pytest.fixture
def forge(tmp_path: Path) -> Forge:
    forge = Forge(tmp_path / "repository")
    forge.publish("1.0")
    (tmp_path / "root.json").write_bytes(forge.trust)
    return forge


def provision(forge: Forge, state: Path) -> int:
    root = forge.folder.parent / "root.json"
    where = ["--from", forge.folder.as_uri(), "--channel", "line", "--root", str(root)]
    return fieldfit(["update", "--state", str(state), *where])


def test_a_device_is_provisioned_once(
    forge: Forge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    assert provision(forge, state) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "staged: tiny 1.0 is new"
    assert lines[1].startswith("next: fieldfit activate ")
    Slots(state).begin_try()
    Slots(state).commit()
    assert fieldfit(["update", "--state", str(state)]) == 0
    assert capsys.readouterr().out == "nothing new: tiny 1.0 is what this device runs\n"


def test_a_stick_of_today_is_not_the_source_of_tomorrow(forge: Forge, tmp_path: Path) -> None:
    state = tmp_path / "state"
    provision(forge, state)
    before = read_settings(state)
    stick = forge.copy(tmp_path / "stick")
    assert fieldfit(["update", "--state", str(state), "--from", stick.as_uri()]) == 0
    assert read_settings(state) == before


def test_programs_get_json(
    forge: Forge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    provision(forge, state)
    capsys.readouterr()
    assert fieldfit(["update", "--state", str(state), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["outcome"] == "pending"
    assert told["offer"]["version"] == "1.0"
    assert set(told["expires"]) == {"root", "timestamp", "snapshot", "targets"}


def test_what_is_missing_is_said(
    forge: Forge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(tmp_path / "state")
    assert fieldfit(["update", "--state", state]) == 1
    assert "does not know its channel yet; provision it" in capsys.readouterr().err
    where = ["--from", forge.folder.as_uri(), "--channel", "line"]
    assert fieldfit(["update", "--state", state, *where]) == 1
    assert "has no root to trust yet" in capsys.readouterr().err
    assert fieldfit(["update", "--state", state, *where, "--root", "no.json"]) == 1
    assert "no.json: cannot be read" in capsys.readouterr().err
    (tmp_path / "root.json").write_bytes(b"{}")
    assert (
        fieldfit(["update", "--state", state, *where, "--root", str(tmp_path / "root.json")]) == 1
    )
    assert "the root to be trusted is none" in capsys.readouterr().err
