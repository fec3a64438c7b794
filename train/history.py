"""What a training tells while it runs and when it is done; numbers and words only."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the history."""

    epoch: int
    loss: float
    score: float | None
    """Of the weights after it on validation images; None where nothing can tell."""
    parts: dict[str, float]
    """The mean over its steps of what the objective showed, by name."""
    seconds: float
    """Since the start of the training, interruptions left out."""


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
    track: Callable[[Iterable[int], int], Iterable[int]]
    """Passes on the parts of what is computed beforehand, so many in all."""
