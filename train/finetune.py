"""The training of a network's weights, the same for the source model and every rung above.

It moves whatever an objective (train/objective) holds to lower what that objective says, on the
batches that groups of images make (train/batches). Neither is known to it.

BatchNorm and dropout stay as in use (the whole network is in eval mode), the rate warms up and
decays by a cosine, and the epoch with the best validation score is kept, be it the start. Batches
and dropout are functions of seed and step, so that an interrupted training goes on as if it had
not been (train/resume). Order and reasons: Kumar et al., "Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution", ICLR 2022 (a fitted head first, then a low rate).
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from runtime.errors import RecipeError
from runtime.recipe import Augmentation, Schedule, TrainSettings
from train import distributed
from train.batches import Group, Pictures, Steps, load, to_batch
from train.device import Device
from train.model import ImageClassifier
from train.objective import Batch, Objective
from train.optimize import Optimization, choose_trained, rate_at
from train.resume import Epoch, restore_state, save_state

__all__ = ["Epoch", "Group", "History", "Watcher", "fine_tune"]

UInt8 = npt.NDArray[np.uint8]

SAVE_EVERY_S = 60.0
"""Longest work, in seconds, that a kill -9 can cost."""

_DROPOUT = 4  # a stream of random numbers of its own


class History(msgspec.Struct, frozen=True, kw_only=True):
    """How a training went."""

    epochs: tuple[Epoch, ...]
    kept_epoch: int
    """Whose weights were kept; 0 is the start."""
    start_score: float | None
    """Of the weights it started from."""
    steps: int
    """Steps that were made."""
    planned_steps: int
    reason: str
    """Why it ended, and why those weights were kept."""
    notes: tuple[str, ...] = ()
    """Decisions on the way that a person may want to know."""


class Watcher(NamedTuple):
    """How a training is watched; each is called with numbers and words only."""

    step: Callable[[int, int, float, float, dict[str, float]], None]
    """Step done, steps in all, loss, the body's rate, the loss's parts."""
    epoch: Callable[[Epoch], None]
    resumed: Callable[[int, int], None]
    """Step it goes on from, steps in all."""
    note: Callable[[str], None]
    """A decision with its reason."""


class Course(NamedTuple):
    """How long a training is."""

    steps: int
    per_epoch: int
    """The last epoch may be shorter."""


def fine_tune(
    objective: Objective,
    groups: Sequence[Group],
    *,
    pixels: UInt8,
    images_sha256: str,
    cache: Path,
    schedule: Schedule,
    train: TrainSettings,
    min_steps: int,
    tune: tuple[str, ...],
    seed: int,
    key: str,
    state_path: Path,
    device: Device,
    validate: Callable[[ImageClassifier], float] | None,
    watch: Watcher,
    extra_rate: float | None = None,
    save_every_s: float = SAVE_EVERY_S,
) -> History:
    """Train what ``objective`` holds, in place, and leave its model at the best epoch, on the CPU.

    ``pixels`` uint8 ``[M, H, W, C]`` may be larger than memory; ``images_sha256`` stands for their
    content where ``cache`` keeps what is computed from them. One epoch is one pass over the
    largest labelled group, or longer where ``min_steps`` would be more than all epochs.

    Of ``train``, ``freeze``, ``augment``, ``degrade``, ``cache_frozen`` and ``compile`` count.
    ``tune`` names the backbone's modules to train besides the head; () trains all. The objective's
    own parameters learn at ``extra_rate`` at most, by default at the head's rate.

    ``validate`` scores the model, higher is better; the start is a candidate. With None nothing
    can tell a good epoch and the last one is kept. ``state_path`` holds the resumable state; it is
    used only if ``key`` is the same, and removed by the caller when its result is safe.

    Under torchrun all processes call this with the same arguments and get the same result.
    KeyboardInterrupt saves the state first. Raises RecipeError for a module that the network does
    not have, for fewer images in a batch than processes, and if the loss stops being finite.
    """
    choose_trained(objective.model, train.freeze, tune)
    if schedule.batch < distributed.size():
        raise RecipeError(
            f"batch = {schedule.batch} cannot be divided over {distributed.size()} processes; "
            "raise it or start fewer"
        )
    objective.to(device.torch, memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective.eval()
    steps = Steps(
        groups, Pictures(pixels), augment=train.augment, degrade=train.degrade, seed=seed,
        square=pixels.shape[1] == pixels.shape[2], classes=objective.model.head.out_features,
    )  # fmt: skip
    training = _Training(
        objective=objective,
        optimization=Optimization(objective, schedule, extra_rate, device),
        course=plan_course(groups, schedule.epochs, min_steps),
        schedule=schedule,
        validate=validate,
        watch=watch,
    )
    training.restore(state_path, key)
    training.run(
        steps, device, train.augment, lambda: training.save(state_path), save_every_s=save_every_s
    )
    training.keep_best()
    objective.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return training.history()


def plan_course(groups: Sequence[Group], epochs: int, min_steps: int) -> Course:
    """How many steps to make: those of all epochs, ``min_steps`` at least.

    Too few of them make longer epochs, not more, so that patience keeps its meaning.
    """
    labelled = [group for group in groups if (group.labels >= 0).any()]
    largest = max(labelled or groups, key=lambda group: len(group.rows))
    steps = max(min_steps, epochs * math.ceil(len(largest.rows) / largest.share))
    return Course(steps, math.ceil(steps / epochs))


class _Training:
    """A training under way: what moves, where it is, and the best of it so far."""

    def __init__(
        self,
        *,
        objective: Objective,
        optimization: Optimization,
        course: Course,
        schedule: Schedule,
        validate: Callable[[ImageClassifier], float] | None,
        watch: Watcher,
    ) -> None:
        self.model, self.optimization, self.course = objective.model, optimization, course
        self.schedule, self.validate, self.watch = schedule, validate, watch
        self.weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.best = {n: p.detach().clone() for n, p in self.weights.items()}

    def restore(self, path: Path, key: str) -> None:
        """Go on from the state in ``path``, or begin by scoring the weights as they are."""
        self.state = restore_state(path, key, self.optimization, self.best)
        if self.state.step:
            self.watch.resumed(self.state.step, self.course.steps)
        else:
            self.state.start_score = self.state.best_score = self._score()

    def run(
        self,
        steps: Steps,
        device: Device,
        augment: tuple[Augmentation, ...],
        save: Callable[[], None],
        *,
        save_every_s: float,
    ) -> None:
        """Make the steps that are left, or as many as patience allows."""
        state, course = self.state, self.course
        started, saved = time.monotonic() - state.seconds, time.monotonic()
        with _interruptible() as interrupted:
            for drawn in load(steps, state.step, course.steps, device):
                if self._out_of_patience():
                    break
                torch.manual_seed(_dropout_seed(steps.seed, state.step))
                batch = to_batch(drawn, device, augment, moved=steps.store.moved)
                stop = self._step(batch, interrupted())
                state.seconds = time.monotonic() - started
                if state.step % course.per_epoch == 0 or state.step == course.steps:
                    self._end_epoch()
                if stop or time.monotonic() - saved > save_every_s:
                    save()
                    saved = time.monotonic()
                if stop:
                    raise KeyboardInterrupt

    def _step(self, batch: Batch, interrupted: bool) -> bool:
        """Make a step and count it; returns whether any process was interrupted."""
        state, steps = self.state, self.course.steps
        rate = rate_at(state.step, steps, self.schedule.warmup)
        loss, parts = self.optimization.step(batch, state.step / steps, rate)
        heard = loss.new_full((), float(interrupted))
        # One transfer for all numbers, and one exchange: all processes have to stop together.
        numbers = distributed.mean(torch.stack([loss, heard, *parts.values()]).float()).tolist()
        if not math.isfinite(numbers[0]):
            raise RecipeError(
                f"learning_rate: training diverged at step {state.step + 1} of {steps} "
                f"(the loss is {numbers[0]}); lower it"
            )
        shown = dict(zip(parts, numbers[2:], strict=True))
        state.step += 1
        state.loss += numbers[0]
        state.parts = {name: state.parts.get(name, 0.0) + v for name, v in shown.items()}
        self.watch.step(state.step, steps, numbers[0], rate * self.schedule.learning_rate, shown)
        return bool(numbers[1] > 0)

    def _end_epoch(self) -> None:
        state, made = self.state, self.state.step - self.course.per_epoch * len(self.state.history)
        done = Epoch(
            epoch=len(state.history) + 1,
            loss=state.loss / made,
            score=self._score(),
            parts={name: total / made for name, total in state.parts.items()},
            seconds=state.seconds,
        )
        state.loss, state.parts = 0.0, {}
        state.history.append(done)
        if done.score is not None and (state.best_score is None or done.score > state.best_score):
            state.best_score, state.best_epoch = done.score, done.epoch
            self.best = {n: p.detach().clone() for n, p in self.weights.items()}
        self.watch.epoch(done)

    def _score(self) -> float | None:
        score = math.nan if self.validate is None else self.validate(self.model)
        return None if math.isnan(score) else score

    def _out_of_patience(self) -> bool:
        waited = len(self.state.history) - self.state.best_epoch
        judged, patience = self.state.best_score is not None, self.schedule.patience
        return judged and 0 < patience <= waited

    def save(self, path: Path) -> None:
        """Write the state, by the first process."""
        if distributed.main():
            save_state(path, self.state, self.optimization, self.best)

    def keep_best(self) -> None:
        """Put the best weights back; where nothing could tell, the last ones are."""
        if self.state.best_score is not None:
            with torch.no_grad():
                for name, parameter in self.weights.items():
                    parameter.copy_(self.best[name])

    def history(self) -> History:
        """How it went, in numbers and words."""
        state, epochs = self.state, len(self.state.history)
        judged = state.best_score is not None
        if state.step < self.course.steps:
            ended = f"no better score in {self.schedule.patience} epochs"
        else:
            ended = f"all {state.step} steps are done"
        kept = state.best_epoch if judged else epochs
        if not judged:
            why = "the last epoch is kept, nothing can tell which is best"
        elif kept:
            why = f"epoch {kept} is kept, it scored best"
        else:
            why = "the start is kept, no epoch scored better"
        return History(
            epochs=tuple(state.history), kept_epoch=kept, start_score=state.start_score,
            steps=state.step, planned_steps=self.course.steps, reason=f"{ended}; {why}",
        )  # fmt: skip


def _dropout_seed(seed: int, step: int) -> int:
    """Of each step and process its own, so that dropout, too, is a function of them."""
    words = (seed, _DROPOUT, step, distributed.rank())
    return int(np.random.SeedSequence(words).generate_state(1)[0])


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until a step is whole; a second one does not wait.

    Between the optimizer's update and the count of steps, an interruption would save a state in
    which a step is done but not counted. Under torchrun a second one is the rule: it passes on
    what the terminal has sent to all already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    heard = False
    usual = signal.getsignal(signal.SIGINT)

    def hear(number: int, frame: object) -> None:
        nonlocal heard
        heard = True
        if distributed.size() == 1:
            signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, hear)
    try:
        yield lambda: heard
    finally:
        signal.signal(signal.SIGINT, usual)
