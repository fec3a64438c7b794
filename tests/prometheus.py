"""Prometheus' own tool as the judge of metrics."""

import shutil
import subprocess

import pytest


def check_metrics(text: str) -> None:
    """promtool finds nothing wrong with ``text``; skips where there is none."""
    if shutil.which("promtool") is None:
        pytest.skip("no promtool here: apt install prometheus")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
