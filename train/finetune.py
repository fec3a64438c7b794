"""The training of a network's weights, the same for the source model and every rung above.

It moves whatever an objective (train/objective) holds to lower what that objective says, on the
batches that groups of images make (train/batches). Neither is known to it.

BatchNorm and dropout stay as in use (the whole network is in eval mode), the rate warms up and
decays by a cosine, and the epoch with the best validation score is kept, be it the start. Batches
and dropout are functions of seed and step, so that an interrupted training goes on as if it had
not been (train/resume). Order and reasons: Kumar et al., "Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution", ICLR 2022 (a fitted head first, then a low rate).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from runtime.errors import RecipeError
from runtime.recipe import Schedule, TrainSettings
from train import distributed
from train.batches import Group, Pictures, Steps, to_batch
from train.device import Device
from train.features import to_device
from train.history import Epoch, History, Watcher
from train.loop import Course, Training
from train.model import ImageClassifier
from train.objective import Objective
from train.optimize import Optimization, choose_trained
from train.stages import SAMPLES, plan_stages

__all__ = ["Epoch", "Group", "History", "Watcher", "fine_tune"]

UInt8 = npt.NDArray[np.uint8]

SAVE_EVERY_S = 60.0
"""Longest work, in seconds, that a kill -9 can cost."""


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
    start_handicap: float = 0.0,
    save_every_s: float = SAVE_EVERY_S,
) -> History:
    """Train what ``objective`` holds, in place, and leave its model at the best epoch, on the CPU.

    ``pixels`` uint8 ``[M, H, W, C]`` may be larger than memory; ``images_sha256`` stands for their
    content where ``cache`` keeps what is computed from them. One epoch is one pass over the
    largest labelled group, or longer where ``min_steps`` would be more than all epochs.

    Of ``train``, ``freeze``, ``augment``, ``degrade``, ``cache_frozen`` and ``compile`` count.
    ``tune`` names the backbone's modules to train besides the head; () trains all. The objective's
    own parameters learn at ``extra_rate`` at most, by default at the head's rate.

    ``validate`` scores the model, higher is better; the start is a candidate, and its score counts
    ``start_handicap`` less than it is. With None nothing can tell a good epoch and the last one is
    kept. ``state_path`` holds the resumable state; it is
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
    course = plan_course(groups, schedule.epochs, min_steps)
    plan = plan_stages(
        objective.model, pixels, np.concatenate([group.rows for group in groups]), train=train,
        draws=course.steps * sum(group.share for group in groups), images_sha256=images_sha256,
        cache=cache, device=device, track=watch.track,
    )  # fmt: skip
    steps = Steps(
        groups, plan.stages or Pictures(pixels), augment=train.augment, degrade=train.degrade,
        square=pixels.shape[1] == pixels.shape[2], classes=objective.model.head.out_features,
        seed=seed,
    )  # fmt: skip
    cut = plan.stages.cut if plan.stages else None
    optimization = Optimization(objective, schedule, extra_rate, device, cut)
    notes = [plan.reason]
    if train.compile:
        notes.append(optimization.compile(to_batch(steps[0], steps, device)))
    if not optimization.compiled:  # a compiler fuses BatchNorm itself
        notes.append(optimization.fold(to_device(pixels[groups[0].rows[:SAMPLES]], device)))
    for note in notes:
        watch.note(note)
    training = Training(
        model=objective.model, optimization=optimization, course=course, schedule=schedule,
        validate=validate, start_handicap=start_handicap, watch=watch,
    )  # fmt: skip
    training.restore(state_path, key)
    training.run(steps, device, lambda: training.save(state_path), save_every_s=save_every_s)
    training.keep_best()
    objective.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    history = training.history(tuple(notes))
    watch.note(history.reason)
    return history


def plan_course(groups: Sequence[Group], epochs: int, min_steps: int) -> Course:
    """How many steps to make: those of all epochs, ``min_steps`` at least.

    Too few of them make longer epochs, not more, so that patience keeps its meaning.
    """
    labelled = [group for group in groups if (group.labels >= 0).any()]
    largest = max(labelled or groups, key=lambda group: len(group.rows))
    steps = max(min_steps, epochs * math.ceil(len(largest.rows) / largest.share))
    return Course(steps, math.ceil(steps / epochs))
