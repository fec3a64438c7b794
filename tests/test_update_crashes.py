"""An update after a crash, and on a full disk, at every call that changes files."""

import json
from pathlib import Path

import pytest

from tests.crashes import run_with_crashes


@pytest.mark.parametrize("mode", ["killed", "full"])
@pytest.mark.parametrize("what", ["update", "provision"])
def test_an_update_interrupted_at_every_call(tmp_path: Path, mode: str, what: str) -> None:
    told = run_with_crashes("tests.update_stories", tmp_path, mode, str(tmp_path), what)
    calls = json.loads(told)
    # metadata, floor in two copies, download, slot, state; metadata twice, floor, trust, settings
    assert calls >= {"update": 60, "provision": 40}[what]
