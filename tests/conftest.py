"""What many tests share: small labelled pictures, and one trained and exported quick recipe."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

from runtime.private_files import Lock

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a job that a shell started with &: programs that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if (_worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    # A core for each worker, and for what it starts: threads of two that share theirs would spend
    # their time waiting for each other.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

hypothesis.settings.register_profile("same every time", derandomize=True, database=None)
hypothesis.settings.load_profile("same every time")
"""``--hypothesis-profile=default`` searches on with other examples each time."""

_cache = tempfile.TemporaryDirectory(prefix="fieldfit-cache-")
os.environ["FIELDFIT_CACHE"] = _cache.name
"""For every test and every process that one starts; the user's own is no business of theirs."""


@pytest.fixture(autouse=True)
def keep_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that yields to all others would, called in here, slow every test after it."""
    monkeypatch.setattr(os, "nice", lambda by: 0)


def draw(class_index: int, number: int, size: int = 32) -> Image.Image:
    """A gray picture of stripes, finer for each further class, with phase and noise of its own."""
    random = np.random.default_rng([class_index, number])
    phase = np.arange(size) * (class_index + 1) * 4 * np.pi / size + random.uniform(0, 2 * np.pi)
    levels = 128 + 60 * np.sin(phase) + random.normal(0, 12, (size, size))
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


WriteDomain = Callable[..., Path]


@pytest.fixture
def pictures() -> WriteDomain:
    """Write a folder of class folders: ``pictures(folder, {"good": 9, "bad": 3}, first=0)``.

    Pictures are numbered from ``first``; equal class position and number give equal bytes.
    """

    def write(folder: Path, counts: Mapping[str, int], *, first: int = 0, size: int = 32) -> Path:
        for class_index, (name, count) in enumerate(counts.items()):
            (folder / name).mkdir(parents=True)
            for number in range(first, first + count):
                draw(class_index, number, size).save(folder / name / f"{number:04}.png")
        return folder

    return write


ROOT = Path(__file__).resolve().parent.parent
QUICK = ROOT / "train" / "recipes" / "quick.toml"


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the quick recipe was trained and exported, once for all tests.

    Tests only read it; one that changes something works on ``bundle`` or a copy of its own.
    """
    run = tmp_path_factory.getbasetemp()
    if _worker is not None:
        run = run.parent  # each worker has a folder of its own in that of the run
    folder = run / "quick"
    with contextlib.closing(Lock.acquire(run / "quick.lock", lambda _: None)):
        if not (folder / "made").exists():
            _train_and_export(folder)
            (folder / "made").touch()
    return folder


def _train_and_export(folder: Path) -> None:
    from export import pipeline
    from export.__main__ import main as export
    from train.__main__ import main as train

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(pipeline, "TIMED_SECONDS", 0.5)  # no test looks at the times
        assert train([str(QUICK)]) == 0
        assert export([str(QUICK)]) == 0


@pytest.fixture
def bundle(quick: Path, tmp_path: Path) -> Path:
    """A copy of the quick bundle that a test may spoil."""
    return Path(shutil.copytree(quick / "build" / "quick" / "bundle", tmp_path / "bundle"))
