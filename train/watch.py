"""How a training is watched: a progress bar, a line an epoch, a TensorBoard log.

It gets numbers and words only and does not know the model.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from train import console, distributed
from train.history import Epoch, Watcher


class Watched:
    """Progress bar and TensorBoard log of a training; silent in all processes but the first."""

    def __init__(self, label: str, metric: str, log: Path) -> None:
        self.label, self.metric = label, metric
        self.bar = console.progress()
        self.writer = None
        if distributed.main():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(log))
        self.score = ""

    def __enter__(self) -> Watcher:
        self.bar.start()
        self.task = self.bar.add_task(self.label, total=None, note="")
        return Watcher(self._step, self._epoch, self._resumed, self._note, self._track)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def _resumed(self, step: int, steps: int) -> None:
        console.say(f"{self.label}: going on from step {step} of {steps}")

    def _note(self, text: str) -> None:
        console.say(f"{self.label}: {text}")

    def _track(self, parts: Iterable[int], count: int) -> Iterator[int]:
        task = self.bar.add_task("activations of frozen stages", total=count, note="")
        for part in parts:
            yield part
            self.bar.advance(task)
        self.bar.remove_task(task)

    def _step(
        self, step: int, steps: int, loss: float, rate: float, parts: dict[str, float]
    ) -> None:
        seen = f"loss {loss:.3f}{self.score}{_words(parts)}"
        self.bar.update(self.task, total=steps, completed=step, note=seen)
        for name, value in {"loss": loss, "learning rate": rate, **parts}.items():
            self._log(name, value, step)

    def _epoch(self, epoch: Epoch) -> None:
        if epoch.score is not None:
            self.score = f"  {self.metric} {epoch.score:.3f}"
            self._log(self.metric, epoch.score, epoch.epoch)
        console.say(
            f"{self.label}: epoch {epoch.epoch}: loss {epoch.loss:.4f}{self.score}"
            f"{_words(epoch.parts)}"
        )

    def _log(self, name: str, value: float, at: int) -> None:
        if self.writer is not None:
            self.writer.add_scalar(name, value, at)


def _words(parts: dict[str, float]) -> str:
    """All but the task's part, which the loss nearly is."""
    return "".join(f"  {name} {value:.3f}" for name, value in parts.items() if name != "task")
