"""Activation whole: bad models that never come to answer, and a change between two frames.

The models are real graphs, the proofs real processes, and what kills is SIGKILL. The clock of the
stability window is the tests' own.
"""

import ctypes
import errno
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from onnx import helper

from runtime.candidates import Request
from runtime.delivery.activation import Limits, keep_limits
from runtime.delivery.live import LiveAnswer, LiveClassifier, Stability
from runtime.delivery.slots import Slot, Slots
from runtime.errors import DataError, UpdateError
from tests.model_zips import (
    BAD,
    CRASHES,
    SIZE,
    crash_that_reads_a_model,
    frames,
    looping,
    model_zip,
    with_constants,
)
from tests.test_engines import CHANNELS, tiny_model

PATIENCE_S = 60.0
"""What the issue grants; these models take about a second."""

ANSWERS = 40
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET, <sched.h>
DARK = np.zeros((*SIZE, CHANNELS), np.uint8)


class Clock:
    """Monotonic time that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_zip(tmp_path_factory.mktemp("good"), "1")


@pytest.fixture(scope="session")
def better(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_zip(tmp_path_factory.mktemp("better"), "2", model=looping(2))


@pytest.fixture
def device(tmp_path: Path, good: Path) -> Slots:
    """A device on which version 1 was committed."""
    slots = Slots(tmp_path / "state")
    slots.activate(slots.stage(good).sha256)
    slots.begin_try()
    slots.commit()
    return slots


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(device: Slots, clock: Clock) -> Iterator[LiveClassifier]:
    with opened(device, clock) as classifier:
        yield classifier


def opened(device: Slots, clock: Clock, deadline_s: float = PATIENCE_S) -> LiveClassifier:
    return LiveClassifier(
        device.folder, request=Request(threads=1), stability=Stability(60.0, ANSWERS),
        deadline_s=deadline_s, clock=clock,
    )  # fmt: skip


def activated(device: Slots, archive: Path, **limits: Any) -> Slot:
    """On trial; what a call takes is no matter of these tests unless they say so."""
    with device.lock():
        slot = device.activate(device.stage(archive).sha256)
        keep_limits(slot, Limits(**{"latency_ms": 10_000.0, **limits}))
    return slot


def answers_until(live: LiveClassifier, done: Any) -> list[LiveAnswer]:
    """The answers to frames that go on until ``done()`` is true."""
    answers: list[LiveAnswer] = []
    picture = frames(1)[0] + 100
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end, "the line waited for more than a minute"
        answers.append(live(picture))
        time.sleep(0.002)  # as a camera does: the proof needs a core, too
    return answers


Answers = TypeVar("Answers")


def without_network(act: Callable[[], Answers]) -> Answers:
    """What ``act`` returns in a thread that, with all it starts, is in a network where nothing is.

    Where the kernel does not let this user leave the network, it runs where it is.
    """

    def alone() -> Answers:
        if ctypes.CDLL(None).unshare(_NEW_NETWORK) == 0:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", 9)) == errno.ENETUNREACH
        return act()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(alone).result()


def failing_in_the_dark(folder: Path) -> Path:
    """Right on the golden samples and on bright frames; NaN on a black one, by a logarithm."""
    model = tiny_model(size=SIZE)
    last = model.graph.node[-1]
    out = str(last.output[0])
    last.output[0] = "sound"
    with_constants(model, half=np.array(0.5, np.float32), axis=np.array([1], np.int64))
    make = helper.make_node
    model.graph.node.extend([
        make("ReduceMean", ["features", "axis"], ["level"], keepdims=1),
        make("Add", ["level", "half"], ["above"]),
        make("Log", ["above"], ["log"]),
        make("Sub", ["log", "log"], ["nought"]),
        make("Add", ["sound", "nought"], [out]),
    ])  # fmt: skip
    return model_zip(folder, "2", model=model)


# --- bad models


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_model_never_answers_and_its_reason_is_kept(
    tmp_path: Path, device: Slots, clock: Clock, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bad = BAD[kind]
    if kind == CRASHES:
        monkeypatch.setenv("PYTHONPATH", str(crash_that_reads_a_model(tmp_path)))
    deadline = 3.0 if bad.fault == "no answer in time" else PATIENCE_S
    # A crash and a hang need no limit to be found; too slow is what no limit is set against.
    limits = {"latency_ms": None} if bad.fault == "too slow" else {}
    slot = activated(device, bad.zip(tmp_path), **limits)

    def line() -> list[LiveAnswer]:
        with opened(device, clock, deadline) as live:
            answers = answers_until(live, lambda: device.pending() is None)
            return [*answers, live(frames(1)[0])]

    assert {answer.version for answer in without_network(line)} == {"1"}
    failure = device.status().state.failure(slot.sha256)
    assert failure is not None
    assert failure.reason.startswith(f"{bad.fault}: ")
    assert bad.says in failure.reason
    assert device.status().state.floor == "1"


def test_both_orders_of_the_labels_are_shown_and_another_order_can_be_allowed(
    tmp_path: Path, device: Slots, live: LiveClassifier
) -> None:
    archive = model_zip(tmp_path, "2", labels=("b", "a", "c", "d"))
    slot = activated(device, archive)
    answers_until(live, lambda: device.pending() is None)
    failure = device.status().state.failure(slot.sha256)
    assert failure is not None
    assert "b, a, c, d" in failure.reason
    assert "a, b, c, d" in failure.reason
    with device.lock():
        keep_limits(device.activate(slot.sha256, again=True), Limits(allow_new_labels=True))
    assert answers_until(live, lambda: live.on_trial)[-1].version == "2"


# --- a change between two frames


def test_every_frame_is_answered_once_and_the_change_is_between_two(
    device: Slots, live: LiveClassifier, clock: Clock, better: Path
) -> None:
    pictures = frames(250)
    expected = [live.classifier(picture).label for picture in pictures]
    asked = 0
    answers: list[LiveAnswer] = []

    def answer_next() -> None:
        nonlocal asked
        answers.append(live(pictures[asked % len(pictures)]))
        asked += 1

    for _ in range(50):
        answer_next()
    slot = activated(device, better)
    end = time.monotonic() + PATIENCE_S
    while not live.on_trial and time.monotonic() < end:
        answer_next()
    for _ in range(ANSWERS):
        answer_next()
    assert device.current() != slot  # a minute is not over
    clock.now += 61.0
    while live.on_trial and time.monotonic() < end:
        answer_next()
    for _ in range(50):
        answer_next()

    versions = [answer.version for answer in answers]
    first = versions.index("2")
    assert first > 50
    assert set(versions[:first]) == {"1"}
    assert set(versions[first:]) == {"2"}
    assert len(answers) == asked
    labels = [answer.label for answer in answers]
    assert labels == [expected[number % len(pictures)] for number in range(asked)]
    assert device.current() == slot
    assert answers[-1].slot == slot.sha256
    assert device.status().state.floor == "2"


def test_a_minute_without_enough_answers_proves_nothing(
    device: Slots, live: LiveClassifier, clock: Clock, better: Path
) -> None:
    slot = activated(device, better)
    answers_until(live, lambda: live.on_trial)
    clock.now += 3600.0
    for picture in frames(ANSWERS - 2):  # the one that began the trial is answered already
        assert live(picture).version == "2"
    for _ in range(50):  # time enough for a commit that must not be
        live.poll()
        time.sleep(0.002)
    assert live.on_trial
    assert device.current() != slot
    live(frames(1)[0])
    answers_until(live, lambda: not live.on_trial)
    assert live.slot.version == "2"


def test_a_failure_on_trial_is_answered_by_the_one_before_on_the_same_frame(
    tmp_path: Path, device: Slots, live: LiveClassifier
) -> None:
    slot = activated(device, failing_in_the_dark(tmp_path))
    answers_until(live, lambda: live.on_trial)
    assert live(np.full_like(DARK, 200)).version == "2"
    dark = live(DARK)
    assert (dark.version, np.isfinite(dark.score)) == ("1", True)
    answers_until(live, lambda: device.pending() is None)
    failure = device.status().state.failure(slot.sha256)
    assert failure is not None
    assert "not finite" in failure.reason


def test_a_frame_that_cannot_be_read_is_not_the_models_fault(
    device: Slots, live: LiveClassifier, better: Path
) -> None:
    activated(device, better)
    answers_until(live, lambda: live.on_trial)
    with pytest.raises(DataError):
        live(b"no picture")
    assert live.on_trial


def test_an_operators_rollback_on_trial_and_after_it_is_followed(
    device: Slots, live: LiveClassifier, clock: Clock, better: Path
) -> None:
    slot = activated(device, better)
    answers_until(live, lambda: live.on_trial)
    device.rollback("no good", slot.sha256)
    assert live(DARK).version == "1"
    device.activate(slot.sha256, again=True)
    answers_until(live, lambda: live.on_trial)
    device.commit(slot.sha256)
    assert live(DARK).version == "2"
    assert not live.on_trial
    device.rollback("no good after all")
    answers_until(live, lambda: live.slot.version == "1")


def test_of_two_on_one_folder_one_tries_and_the_other_follows(
    device: Slots, live: LiveClassifier, clock: Clock, better: Path
) -> None:
    with opened(device, clock) as second:
        activated(device, better)
        answers_until(live, lambda: live.on_trial)
        assert second(DARK).version == "1"
        pending = device.status().state.pending
        assert pending is not None
        assert pending.tries == 2
        device.commit()
        answers_until(second, lambda: second.slot.version == "2")


def test_a_disk_that_is_full_only_puts_a_change_off(
    device: Slots, live: LiveClassifier, clock: Clock, better: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = True
    step = Slots._step

    def refusing(self: Slots, *arguments: Any) -> Any:
        if full and self is not device:
            raise OSError(errno.ENOSPC, "No space left on device", "state.json")
        return step(self, *arguments)

    monkeypatch.setattr(Slots, "_step", refusing)
    slot = activated(device, better)
    for picture in frames(50):
        assert live(picture).version == "1"
        time.sleep(0.002)
    pending = device.status().state.pending
    assert pending is not None
    assert pending.tries == 3
    full = False
    clock.now += 61.0
    answers_until(live, lambda: live.on_trial)
    full = True
    clock.now += 61.0
    for picture in frames(ANSWERS + 20):
        assert live(picture).version == "2"
        time.sleep(0.002)
    full = False
    clock.now += 61.0
    answers_until(live, lambda: not live.on_trial)
    assert device.current() == slot


def test_where_nothing_was_committed_the_slot_on_trial_answers_first(
    tmp_path: Path, good: Path, clock: Clock
) -> None:
    device = Slots(tmp_path / "state")
    with pytest.raises(UpdateError, match="fieldfit stage"):
        opened(device, clock)
    activated(device, good)
    with opened(device, clock) as live:
        assert live.on_trial
        assert live(DARK).version == "1"
    activated(device, BAD["answers another shape"].zip(tmp_path))
    with pytest.raises(UpdateError, match="no slot can answer: wrong shape"):
        opened(device, clock)


def test_a_current_slot_that_is_damaged_gives_way_to_the_one_before_it(
    device: Slots, clock: Clock, better: Path
) -> None:
    slot = activated(device, better)
    device.begin_try()
    device.commit()
    with (slot.bundle / "fp32.onnx").open("ab") as file:
        file.write(b"0")
    with opened(device, clock) as live:
        assert live(DARK).version == "1"
    current = device.current()
    assert current is not None
    assert current.version == "1"


# --- the process is killed

SERVICE = """
import os, signal, sys
import numpy as np
from runtime.delivery import live as module
from runtime.candidates import Request

folder, point = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

prove = module.prove
if point == "before the proof":
    module.prove = die
if point == "after the proof":
    module.prove = lambda *a, **k: (prove(*a, **k), die())
if point == "at the commit":
    module.Slots.commit = die
live = module.LiveClassifier(
    folder, request=Request(threads=1), stability=module.Stability(0.0, 5)
)
picture = np.full((24, 16, 3), 100, np.uint8)
print(live(picture).version, flush=True)
while not live._worker.idle or live.on_trial:
    live(picture)
"""


def service(device: Slots, point: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", SERVICE, str(device.folder), point],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip


def test_killed_three_times_the_old_one_answers_and_the_new_one_is_dropped(
    device: Slots, better: Path
) -> None:
    slot = activated(device, better)
    for left, point in ((2, "before the proof"), (1, "after the proof"), (0, "at the commit")):
        killed = service(device, point)
        assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "1\n"), killed.stderr
        pending = device.status().state.pending
        assert pending is not None
        assert (pending.release.sha256, pending.tries) == (slot.sha256, left)
        assert device.current() != slot
    ended = service(device, "never")
    assert (ended.returncode, ended.stdout) == (0, "1\n"), ended.stderr
    failure = device.status().state.failure(slot.sha256)
    assert failure is not None
    assert "3 tries" in failure.reason
    assert device.pending() is None


def test_killed_once_the_next_start_commits_it(device: Slots, better: Path) -> None:
    slot = activated(device, better)
    assert service(device, "before the proof").returncode == -signal.SIGKILL
    ended = service(device, "never")
    assert ended.returncode == 0, ended.stderr
    assert device.current() == slot
