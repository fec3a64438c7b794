"""The outbox after a crash, and on a full disk, at every call that changes files."""

import json
from pathlib import Path

import pytest

from tests.crashes import run_with_crashes
from tests.outbox_stories import STORIES


@pytest.mark.parametrize("mode", ["killed", "full"])
def test_every_step_of_the_outbox_interrupted_at_every_call(tmp_path: Path, mode: str) -> None:
    calls = json.loads(run_with_crashes("tests.outbox_stories", tmp_path, mode, str(tmp_path)))
    assert calls.keys() == STORIES.keys()
    assert min(calls.values()) >= 8  # the lock, frames of the journal, synced
