"""What the frozen first stages of a network make of every image, kept on disk.

Where the first stages learn nothing and augmentation can make only a few pictures of each image,
every epoch would compute the same activations again. Where the network can be cut is train/cut's
to say; this only decides whether keeping activations pays, and keeps them.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from runtime.recipe import Augmentation, TrainSettings
from train import distributed
from train.batches import Shared, move, variants
from train.cut import Cut, activations, find_cut
from train.device import Device
from train.features import to_device
from train.model import ImageClassifier, weights_sha256
from train.pixels import open_rows, write_rows

UInt8 = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Track = Callable[[Iterable[int], int], Iterable[int]]

BATCH = 64

SAMPLES = 4
"""Images that a cut is checked on."""

WORTH = 2
"""Times that each kept picture must be drawn to pay for its one computation and the disk."""

DISK_SHARE = 0.5
"""Of what is free: the rest is for others."""


class Stages:
    """The store of train/batches for kept activations ``[rows * variants, H, W, C]``, float16."""

    moved = True

    def __init__(
        self, cut: Cut, rows: Ints, maps: npt.NDArray[Any], numbers: dict[bytes, int]
    ) -> None:
        self.cut, self.rows, self.maps, self.numbers = cut, rows, Shared(maps), numbers
        self.variants = len(maps) // len(rows)

    def read(self, rows: Ints, moves: Ints) -> npt.NDArray[Any]:
        chosen = np.array([self.numbers[row.tobytes()] for row in moves], dtype=np.int64)
        return self.maps[np.searchsorted(self.rows, rows) * self.variants + chosen]


class Plan(NamedTuple):
    """A decision with its reason."""

    stages: Stages | None
    reason: str


def plan_stages(
    model: ImageClassifier,
    pixels: UInt8,
    rows: Ints,
    *,
    train: TrainSettings,
    draws: int,
    images_sha256: str,
    cache: Path,
    device: Device,
    track: Track | None = None,
) -> Plan:
    """Keep the frozen stages' activations for ``rows`` of ``pixels`` if that pays and is exact.

    ``draws`` images will be drawn from them in all. The model is on the device, in eval mode; what
    requires no gradient is frozen. Activations are computed batch by batch and written as they
    come, once for each content of images, frozen weights and augmentations.
    """
    if not train.cache_frozen:
        return _computed_again("cache_frozen is off")
    if train.degrade:
        return _computed_again("degrade makes a new picture each time")
    rows = np.unique(rows)
    sample = to_device(pixels[rows[:SAMPLES]], device)
    cut, why = find_cut(model, sample, device)
    if cut is None:
        return _computed_again(why)
    moves, numbers = variants(train.augment, square=pixels.shape[1] == pixels.shape[2])
    shape = (len(rows) * len(moves), *activations(model, sample, cut, device).shape[1:])
    frozen = _frozen_digest(model, cut)
    content = (images_sha256, frozen, rows.tobytes(), train.augment, shape, pixels.shape)
    digest = hashlib.sha256(repr((*content, device.kind, device.precision)).encode()).hexdigest()
    path = cache / f"stages-{digest[:32]}.npy"
    maps = open_rows(path)
    if maps is None:
        if against := distributed.broadcast(_against(shape, draws, cache)):
            return _computed_again(against)
        parts = _activations(model, pixels, rows, train.augment, moves, cut, device, track)
        try:
            maps = write_rows(path, shape, np.dtype(np.float16), parts, "kept activations")
        except OverflowError:
            return _computed_again("activations are beyond float16's range")
    size = f"{maps.nbytes / 2**20:.0f} MiB"
    return Plan(
        Stages(cut, rows, maps, numbers),
        f"frozen stages up to {cut.boundary} are computed once, {size} on disk: {why}",
    )


def _computed_again(why: str) -> Plan:
    return Plan(None, f"frozen stages are computed in every step: {why}")


def _against(shape: tuple[int, ...], draws: int, cache: Path) -> str:
    """What speaks against keeping activations of ``shape``; nothing if it pays."""
    if draws < WORTH * shape[0]:
        return f"{draws:,} draws of {shape[0]:,} pictures are too few to pay for keeping them"
    cache.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(cache).free
    if needed > DISK_SHARE * free:
        return f"they take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return ""


def _frozen_digest(model: ImageClassifier, cut: Cut) -> str:
    digest = hashlib.sha256(f"{model.scale.item()} {model.shift.item()}".encode())
    for name in cut.skipped:
        weights = weights_sha256(model.backbone.get_submodule(name))
        digest.update(f"{name} {weights}".encode())
    return digest.hexdigest()


def _activations(
    model: ImageClassifier,
    pixels: UInt8,
    rows: Ints,
    kinds: tuple[Augmentation, ...],
    moves: Ints,
    cut: Cut,
    device: Device,
    track: Track | None,
) -> Iterator[npt.NDArray[Any]]:
    """Of every picture of every row, in order; each process computes a part."""
    count = max(1, BATCH // len(moves))
    together = count * distributed.size()
    starts: Iterable[int] = range(0, len(rows), together)
    if track is not None:
        starts = track(starts, len(range(0, len(rows), together)))
    for start in starts:
        own = start + count * distributed.rank()
        images = to_device(pixels[rows[own : own + count]], device)
        repeated = images.repeat_interleave(len(moves), dim=0)
        times = torch.from_numpy(np.tile(moves, (len(images), 1))).to(device.torch)
        maps = activations(model, move(repeated, kinds, times), cut, device)
        yield distributed.gather_rows(maps.float().cpu().numpy())
