"""How a fine-tuning run is watched: a progress bar, a line an epoch, a TensorBoard log.

It gets numbers only and does not know the model.
"""

from pathlib import Path

from train import console
from train.finetune import Epoch, Watcher


class Watched:
    """Progress bar and TensorBoard log of a fine-tuning run."""

    def __init__(self, label: str, metric: str, log: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.label, self.metric = label, metric
        self.writer = SummaryWriter(str(log))
        self.bar = console.progress()
        self.task: int | None = None
        self.note = ""

    def __enter__(self) -> Watcher:
        self.bar.start()
        return Watcher(self._step, self._epoch, self._resumed)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        self.writer.close()

    def _resumed(self, step: int, steps: int) -> None:
        console.say(f"going on from step {step} of {steps}")

    def _step(self, step: int, steps: int, loss: float, rate: float) -> None:
        if self.task is None:
            self.task = self.bar.add_task(self.label, total=steps, note="")
        self.bar.update(
            self.task,  # type: ignore[arg-type]
            completed=step,
            note=f"loss {loss:.3f}{self.note}",
        )
        self.writer.add_scalar("loss", loss, step)
        self.writer.add_scalar("learning rate", rate, step)

    def _epoch(self, epoch: Epoch) -> None:
        self.note = f"  {self.metric} {epoch.score:.3f}"
        self.writer.add_scalar(self.metric, epoch.score, epoch.epoch)
        console.say(f"epoch {epoch.epoch}: loss {epoch.loss:.4f}, {self.metric} {epoch.score:.4f}")
