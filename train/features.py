"""Features of the frozen backbone: computed once, cached, reused by every head that is fitted.

The backbone runs in eval mode. In train mode its BatchNorm statistics would drift with every
batch, although no weight of it is being trained. Under torchrun every process computes a part and
gets the whole, so that all of them have to ask.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from runtime.errors import DataError
from train import distributed
from train.device import Device
from train.model import ImageClassifier, weights_sha256
from train.pixels import open_rows, write_rows

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Features = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Track = Callable[[Iterable[int], int], Iterable[int]]

BATCH = 64


def cached_features(
    model: ImageClassifier,
    pixels: UInt8,
    images_sha256: str,
    cache: Path,
    device: Device,
    track: Track | None = None,
) -> Features:
    """Features ``[N, D]`` of ``pixels`` uint8 ``[N, H, W, C]``: a read-only memory map in float16.

    In float32 if any is out of float16's range. Computed and written batch by batch, so that
    neither images nor features need fit into memory. The key is the backbone's weights and
    ``images_sha256``, which stands for the pixels.

    Raises DataError if the disk has no room or features are not finite.
    """
    digest = hashlib.sha256(images_sha256.encode())
    digest.update(weights_sha256(model.backbone).encode())
    digest.update(f"{model.scale.item()} {model.shift.item()} {pixels.shape}".encode())
    digest.update(f"{device.kind} {device.precision}".encode())  # a GPU's differ a little
    path = cache / f"features-{digest.hexdigest()[:32]}.npy"
    known: Features | None = open_rows(path)
    if known is not None:
        return known
    shape = len(pixels), model.head.in_features
    for dtype in (np.float16, np.float32):
        batches = (features for _, features in _forward(model, pixels, device, track))
        try:
            return write_rows(path, shape, np.dtype(dtype), batches, "features of images")
        except OverflowError:
            continue
    raise DataError(
        "the network's features are not finite numbers: its weights are damaged or its training "
        "diverged; start from other [model] weights"
    )


def compute_features(
    model: ImageClassifier,
    pixels: UInt8,
    device: Device,
    track: Track | None = None,
    *,
    rows: Ints | None = None,
) -> Float32:
    """Features ``[N, D]`` of ``pixels``, or of these ``rows`` of them, in memory.

    Like ``predict``, it moves the model to the device and leaves it there, in eval mode.
    """
    parts = [features for _, features in _forward(model, pixels, device, track, rows)]
    return np.concatenate(parts)


def predict(
    model: ImageClassifier,
    pixels: UInt8,
    device: Device,
    track: Track | None = None,
    *,
    rows: Ints | None = None,
) -> Float32:
    """Logits ``[N, K]`` of ``pixels``, or of these ``rows`` of them, read batch by batch."""
    return np.concatenate([logits for logits, _ in _forward(model, pixels, device, track, rows)])


def _forward(
    model: ImageClassifier,
    pixels: UInt8,
    device: Device,
    track: Track | None,
    rows: Ints | None = None,
) -> Iterator[tuple[Float32, Float32]]:
    """Logits and features of the rows, in their order; each process computes a part of each."""
    model.to(device.torch).eval()
    order = np.arange(len(pixels)) if rows is None else rows
    together = BATCH * distributed.size()
    starts: Iterable[int] = range(0, len(order), together)
    if track is not None:
        starts = track(starts, len(range(0, len(order), together)))
    for start in starts:
        own = start + BATCH * distributed.rank()
        batch = to_device(pixels[order[own : min(own + BATCH, start + together)]], device)
        with torch.inference_mode():
            with device.autocast():
                features = model.extract(batch)
            features = features.float()
            # The head stays in float32: in bfloat16 many logits would be equal, and tie.
            logits = model.head(features)
        yield (
            distributed.gather_rows(logits.float().cpu().numpy()),
            distributed.gather_rows(features.cpu().numpy()),
        )


def to_device(batch: UInt8, device: Device) -> Tensor:
    """``batch`` as a tensor on the device; the copy overlaps with work where that is possible."""
    tensor = torch.from_numpy(np.array(batch))  # a copy: the memory map is read-only
    if device.kind == "cuda":
        return tensor.pin_memory().to(device.torch, non_blocking=True)
    return tensor
