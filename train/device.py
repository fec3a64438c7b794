"""Where training runs, in what precision, and why."""

import contextlib
import os
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """A decision with its reason; ``fieldfit`` prints it."""

    kind: str
    """``cuda`` or ``cpu``."""
    precision: torch.dtype
    """Of autocast regions: bfloat16 or float16 on a GPU, float32 (none) on a CPU."""
    reason: str

    @property
    def torch(self) -> torch.device:
        """torch's own object for it; of several GPUs the one that this process has set."""
        return torch.device(self.kind)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision where it is faster; nothing on a CPU, where it is slower."""
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.kind, dtype=self.precision)


def choose_device() -> Device:
    """The GPU if torch can use one, else the CPU with one thread for each core."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        # bfloat16 needs no loss scaling; before Ampere it is emulated.
        precision = torch.bfloat16 if major >= 8 else torch.float16
        word = str(precision).removeprefix("torch.")
        return Device("cuda", precision, f"{name} (compute capability {major}.{minor}), {word}")
    return reference_device("no CUDA GPU")


def reference_device(reason: str) -> Device:
    """The CPU in float32: what a checkpoint's answers are defined by, the same everywhere.

    A GPU's mixed precision, and TensorFloat-32 without it, differ by more than export's parity
    check allows between a checkpoint and its graph.
    """
    torch.set_num_threads(cores())
    return Device("cpu", torch.float32, f"CPU, {torch.get_num_threads()} threads ({reason})")


def cores() -> int:
    """This process's share of the cores it may use; a torchrun's processes here divide them."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
