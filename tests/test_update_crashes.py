"""An update after a crash, and on a full disk, at every call that changes files."""

import json
from pathlib import Path

import pytest

from tests.crashes import run_with_crashes


@pytest.mark.parametrize("mode", ["killed", "full"])
def test_an_update_interrupted_at_every_call(tmp_path: Path, mode: str) -> None:
    calls = json.loads(run_with_crashes("tests.update_stories", tmp_path, mode, str(tmp_path)))
    assert calls >= 60  # metadata, floor in two copies, download, slot, state
