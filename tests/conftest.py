"""What many tests share: small labelled pictures, and two recipes that are trained once for all."""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
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


LONGEST = (
    "pipeline", "ladder", "calibration_families", "distributed", "bad_input", "evidence_loop",
    "sources_cameras", "finetune", "wrong_clock", "page_server", "streaming", "watch", "docs",
    "tensorrt_engine", "live", "line_mqtt", "slot_verbs", "update_crashes", "stages",
)  # fmt: skip
"""Files that begin first, so that no worker is left with one at the end. The first of them makes
what others use, too, while the next ones have no need of it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in an order that suits ``--dist loadfile --no-loadscope-reorder``."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True)
def keep_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that yields to all others would, called in here, slow every test after it."""
    monkeypatch.setattr(os, "nice", lambda by: 0)


@pytest.fixture(autouse=True)
def keep_log_levels() -> Iterator[None]:
    """A program that silences a logger does so to its own end: here other tests go on."""
    loggers = [logging.getLogger(name) for name in ("runtime.choose", "urllib3")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Training writes no pictures and export no report: they take as long as what is tested."""
    from export.report import contents
    from train import plots

    patch.setattr(contents, "write_report", lambda *_: None)
    for name in ("write_ladder", "write_robustness", "write_curves"):
        patch.setattr(plots, name, lambda *_, **__: None)


def draw(class_index: int, number: int, size: int = 32) -> Image.Image:
    """A gray picture of stripes, finer for each further class, with phase and noise of its own."""
    random = np.random.default_rng([class_index, number])
    phase = np.arange(size) * (class_index + 1) * 4 * np.pi / size + random.uniform(0, 2 * np.pi)
    levels = 128 + 60 * np.sin(phase) + random.normal(0, 12, (size, size))
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


WriteDomain = Callable[..., Path]


def write_pictures(
    folder: Path, counts: Mapping[str, int], *, first: int = 0, size: int = 32
) -> Path:
    """Write a folder of class folders, pictures numbered from ``first``.

    Equal class position and number give equal bytes.
    """
    for class_index, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(first, first + count):
            draw(class_index, number, size).save(folder / name / f"{number:04}.png")
    return folder


@pytest.fixture
def pictures() -> WriteDomain:
    """``pictures(folder, {"good": 9, "bad": 3}, first=0)``: see ``write_pictures``."""
    return write_pictures


ROOT = Path(__file__).resolve().parent.parent
QUICK = ROOT / "train" / "recipes" / "quick.toml"


SMALL = """
name = "small"
[data]
source = "{folder}/source"
target = "{folder}/target"
[input]
size = [32, 32]
channels = 1
[model]
architecture = "test_resnet"
weights = "random"
[source]
epochs = 1
[train]
strategy = "auto"
[train.fine_tuning]
epochs = 1
batch = 16
[train.similarity]
images = 8
[calibration]
images = 16
[export]
forms = ["fp16"]
golden = 4
[gate]
min_agreement = 0.7
min_sqnr_db = 3.0
max_accuracy_drop = 0.5
max_worst_recall_drop = 0.5
"""


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the quick recipe was trained and exported, once for all tests.

    Tests only read it; one that changes something works on ``bundle`` or a copy of its own.
    """
    return _made_once(tmp_path_factory, "quick", _train_and_export)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which ``small.toml`` was trained: seconds, for what needs no real network.

    Fifteen convolutions of no use, on easy pictures. The recipe names those by their whole path:
    a copy, with changes, can lie anywhere. Tests only read it.
    """
    return _made_once(tmp_path_factory, "small", _train_small)


def _made_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]
) -> Path:
    run = tmp_path_factory.getbasetemp()
    if _worker is not None:
        run = run.parent  # each worker has a folder of its own in that of the run
    folder = run / name
    with contextlib.closing(Lock.acquire(run / f"{name}.lock", lambda _: None)):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                make(folder)
            (folder / "made").touch()
    return folder


def _train_and_export(_: Path) -> None:
    from export import pipeline
    from export.__main__ import main as export
    from train.__main__ import main as train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "TIMED_SECONDS", 0.5)  # no test looks at the times
        assert train([str(QUICK)]) == 0
        assert export([str(QUICK)]) == 0


def _train_small(folder: Path) -> None:
    from train.__main__ import main as train

    write_pictures(folder / "source", {"coarse": 60, "fine": 60})
    write_pictures(folder / "target", {"coarse": 60, "fine": 60}, first=500)
    (folder / "small.toml").write_text(SMALL.format(folder=folder))
    assert train(["small.toml"]) == 0


@pytest.fixture
def bundle(quick: Path, tmp_path: Path) -> Path:
    """A copy of the quick bundle that a test may spoil."""
    return Path(shutil.copytree(quick / "build" / "quick" / "bundle", tmp_path / "bundle"))
