"""The slots after a crash, and on a full disk, at every call that changes files."""

import json
from pathlib import Path

import pytest

from tests.crashes import run_with_crashes
from tests.slot_stories import STORIES


@pytest.mark.parametrize("mode", ["killed", "full"])
def test_every_command_interrupted_at_every_call(tmp_path: Path, mode: str) -> None:
    calls = json.loads(run_with_crashes("tests.slot_stories", tmp_path, mode, str(tmp_path)))
    assert calls.keys() == STORIES.keys()
    assert min(calls.values()) >= 8  # a state alone: made, written, synced, renamed, synced
