"""A task small enough to train in a second: noise that is dark or bright, on two domains."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.preprocess import InputSpec
from runtime.recipe import FineTuningSettings, ModelSettings, TrainSettings
from train.device import Device
from train.finetune import Epoch, Group, History, Watcher, fine_tune
from train.model import ImageClassifier, build_model
from train.objective import SOURCE, TARGET, Objective, TaskLoss

CPU = Device("cpu", torch.float32, "test")
SPEC = InputSpec(size=(32, 32), channels=1)
FREEZE = ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4")


def pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels: class 1 is bright; the last third, the field, is a little darker."""
    random = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int64) % 2
    pixels = random.integers(0, 100, (count, 32, 32, 1), dtype=np.uint8)
    pixels[labels == 1] += 100
    pixels[2 * count // 3 :] -= pixels[2 * count // 3 :] // 4
    return pixels, labels


def groups(count: int, shares: tuple[int, int] = (4, 3)) -> list[Group]:
    """Two thirds of ``pictures(count)`` as the source, the others as the labelled field."""
    _, labels = pictures(count)
    source, field = np.split(np.arange(count), [2 * count // 3])
    random = np.random.default_rng(1)
    return [
        Group(
            name=name, domain=domain, rows=rows, labels=labels[rows],
            weights=np.ones(len(rows), np.float32),
            teacher=random.normal(0, 1, (len(rows), 2)).astype(np.float32) if teacher else None,
            share=share,
        )
        for name, domain, rows, teacher, share in [
            ("source", SOURCE, source, True, shares[0]), ("field", TARGET, field, False, shares[1]),
        ]
    ]  # fmt: skip


@dataclasses.dataclass
class Seen:
    """Collects what a training reports; calls ``at_step`` with the number of each step."""

    at_step: Callable[[int], None] = lambda step: None
    steps: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    epochs: list[Epoch] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    resumed_at: int | None = None

    def watcher(self) -> Watcher:
        return Watcher(
            self._step,
            self.epochs.append,
            self._resumed,
            self.notes.append,
            lambda parts, count: parts,
        )

    def _step(
        self, step: int, steps: int, loss: float, rate: float, parts: dict[str, float]
    ) -> None:
        self.steps.append(step)
        self.losses.append(loss)
        self.at_step(step)

    def _resumed(self, step: int, steps: int) -> None:
        self.resumed_at = step


def network() -> ImageClassifier:
    """Embedded weights and a head that is not zero, the same at each call."""
    model = build_model(ModelSettings(), SPEC, 2)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight, std=0.01)
    return model


def train(
    folder: Path,
    seen: Seen | None = None,
    *,
    make: Callable[[ImageClassifier], Objective] = lambda m: TaskLoss(m, keep_answers=0.5),
    data: list[Group] | None = None,
    pixels: np.ndarray | None = None,
    schedule: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    validate: Callable[[ImageClassifier], float] | None = None,
    **changes: Any,
) -> tuple[Objective, History]:
    """Eight steps in two epochs unless changed; without ``validate`` the last weights are kept."""
    pixels = pictures(24)[0] if pixels is None else pixels
    objective = make(network())
    history = fine_tune(
        objective, data or groups(24), pixels=pixels, images_sha256="pictures",
        cache=folder / "cache",
        schedule=FineTuningSettings(**{"epochs": 2, "batch": 7, **(schedule or {})}),
        train=TrainSettings(**{"freeze": FREEZE, "cache_frozen": False, **(settings or {})}),
        validate=validate,
        watch=(seen or Seen()).watcher(),
        **{
            "min_steps": 1, "tune": (), "seed": 3, "key": "k", "device": CPU,
            "state_path": folder / "resume.safetensors", **changes,
        },
    )  # fmt: skip
    return objective, history
