"""The loop: step after step, epoch after epoch, until the steps or the patience are used up.

It moves the optimizer, scores the model, keeps the best, saves the state, and can be stopped. It
does not know what makes a batch or a loss.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from runtime.errors import RecipeError
from runtime.recipe import Schedule
from train import distributed
from train.batches import Steps, load, to_batch
from train.device import Device
from train.history import Epoch, History, Watcher
from train.model import ImageClassifier
from train.objective import Batch
from train.optimize import Optimization, rate_at
from train.resume import restore_state, save_state

_DROPOUT = 4  # a stream of random numbers of its own


class Course(NamedTuple):
    """How long a training is."""

    steps: int
    per_epoch: int
    """The last epoch may be shorter."""


class Training:
    """A training under way: what moves, where it is, and the best of it so far."""

    def __init__(
        self,
        *,
        model: ImageClassifier,
        optimization: Optimization,
        course: Course,
        schedule: Schedule,
        validate: Callable[[ImageClassifier], float] | None,
        start_handicap: float,
        watch: Watcher,
    ) -> None:
        self.model, self.optimization, self.course = model, optimization, course
        self.start_handicap = start_handicap
        self.schedule, self.validate, self.watch = schedule, validate, watch
        self.weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.best = {n: p.detach().clone() for n, p in self.weights.items()}

    def restore(self, path: Path, key: str) -> None:
        """Go on from the state in ``path``, or begin by scoring the weights as they are."""
        self.state = restore_state(path, key, self.optimization, self.best)
        if self.state.step:
            self.watch.resumed(self.state.step, self.course.steps)
        else:
            self.state.start_score = score = self._score()
            self.state.best_score = None if score is None else score - self.start_handicap

    def run(
        self,
        steps: Steps,
        device: Device,
        save: Callable[[], None],
        *,
        save_every_s: float,
    ) -> None:
        """Make the steps that are left, or as many as patience allows."""
        state, course = self.state, self.course
        started, saved = time.monotonic() - state.seconds, time.monotonic()
        alone, stop = distributed.size() == 1, False
        with _interruptible() as interrupted:
            for drawn in load(steps, state.step, course.steps, device):
                if stop or self._out_of_patience():
                    break
                torch.manual_seed(_dropout_seed(steps.seed, state.step))
                batch = to_batch(drawn, steps, device)
                stop = self._step(batch, interrupted()) or (alone and interrupted())
                state.seconds = time.monotonic() - started
                if state.step % course.per_epoch == 0 or state.step == course.steps:
                    self._end_epoch()
                if time.monotonic() - saved > save_every_s:
                    save()
                    saved = time.monotonic()
            if stop or interrupted():
                save()
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

    def history(self, notes: tuple[str, ...]) -> History:
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
            notes=notes,
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
