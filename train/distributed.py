"""Several processes as one training: torchrun starts them, PyTorch's own engine joins them.

Every process runs the same program on its part of each batch and comes to the same decisions;
files and words are the first one's. Without torchrun everything here does nothing. It does not
know what is trained.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from runtime.errors import RecipeError

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for another: decoding a large data set is the first one's work alone.
One that dies does not make the others wait, torchrun ends them."""


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Join the processes of a torchrun for the block; NCCL between GPUs, Gloo between CPUs.

    Whichever process fails first says why; the others end without a word. Raises RecipeError if
    there are more processes than GPUs.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    local = int(os.environ["LOCAL_RANK"])
    if gpus := torch.cuda.device_count():
        if local >= gpus:
            raise RecipeError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here for {gpus} "
                "GPUs; lower --nproc-per-node"
            )
        torch.cuda.set_device(local)
    store, number, count = next(rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(
        "nccl" if gpus else "gloo", store=store, rank=number, world_size=count, timeout=PATIENCE
    )
    try:
        yield
    except BaseException as error:
        if store.add("failures", 1) > 1:
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
        raise
    dist.destroy_process_group()


def size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def main() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the first process through the block before the others, which find its caches there."""
    if not main():
        barrier()
    yield
    if main():
        barrier()


def agree(opinion: bool) -> bool:
    """Whether all processes say so."""
    if size() == 1:
        return opinion
    opinions = [opinion] * size()
    dist.all_gather_object(opinions, opinion)
    return all(opinions)


def gather_rows(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The parts ``[n, ...]`` of all processes one after another, in every process."""
    if size() == 1:
        return part
    parts: list[npt.NDArray[Any]] = [part] * size()
    dist.all_gather_object(parts, part)
    return np.concatenate(parts)


def broadcast(value: T) -> T:
    """What the first process has, in every process."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def mean(values: Tensor) -> Tensor:
    """Element by element, the mean over the processes of ``values``, which need no gradient.

    A loss divided by this mean of its weights instead of their local sum has, averaged over the
    processes, the gradient of the whole batch in one process, however its images were dealt out.
    """
    if size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / size()
