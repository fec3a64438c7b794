"""Features of the frozen backbone: computed once, cached, reused by every head that is fitted.

The backbone runs in eval mode. In train mode its BatchNorm statistics would drift with every
batch, although no weight of it is being trained.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from runtime import atomic
from train.device import Device
from train.model import ImageClassifier, weights_sha256

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Track = Callable[[Iterable[int], int], Iterable[int]]

BATCH = 64


def cached_features(
    model: ImageClassifier,
    pixels: UInt8,
    images_sha256: str,
    cache: Path,
    device: Device,
    track: Track | None = None,
) -> Float32:
    """Features ``[N, D]`` of ``pixels`` uint8 ``[N, H, W, C]``, kept in ``cache`` as float16.

    The key is the backbone's weights and ``images_sha256``, which stands for the pixels.
    """
    digest = hashlib.sha256(images_sha256.encode())
    digest.update(weights_sha256(model.backbone).encode())
    digest.update(f"{model.scale.item()} {model.shift.item()} {pixels.shape}".encode())
    digest.update(f"{device.kind} {device.precision}".encode())  # a GPU's differ a little
    path = cache / f"features-{digest.hexdigest()[:32]}.npy"
    try:
        known: Float32 = np.load(path, allow_pickle=False).astype(np.float32)
        return known
    except (OSError, ValueError, EOFError):
        features = compute_features(model, pixels, device, track)
    if np.abs(features).max(initial=0.0) < np.finfo(np.float16).max:
        features = features.astype(np.float16)
    with atomic.replacing_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, features, allow_pickle=False)
    return features.astype(np.float32)


def compute_features(
    model: ImageClassifier, pixels: UInt8, device: Device, track: Track | None = None
) -> Float32:
    """Features ``[N, D]`` of ``pixels`` by running the backbone in eval mode.

    Like ``predict``, it moves the model to the device and leaves it there.
    """
    return np.concatenate([f for _, f in _forward(model, pixels, device, track)])


def predict(
    model: ImageClassifier,
    pixels: UInt8,
    device: Device,
    track: Track | None = None,
    *,
    rows: npt.NDArray[np.int64] | None = None,
) -> Float32:
    """Logits ``[N, K]`` of ``pixels``, or of these ``rows`` of them, read batch by batch."""
    return np.concatenate([logits for logits, _ in _forward(model, pixels, device, track, rows)])


def _forward(
    model: ImageClassifier,
    pixels: UInt8,
    device: Device,
    track: Track | None,
    rows: npt.NDArray[np.int64] | None = None,
) -> Iterator[tuple[Float32, Float32]]:
    model.to(device.torch).eval()
    order = np.arange(len(pixels)) if rows is None else rows
    starts: Iterable[int] = range(0, len(order), BATCH)
    if track is not None:
        starts = track(starts, len(range(0, len(order), BATCH)))
    for start in starts:
        batch = to_device(pixels[order[start : start + BATCH]], device)
        with torch.inference_mode():
            with device.autocast():
                features = model.extract(batch)
            features = features.float()
            # The head stays in float32: in bfloat16 many logits would be equal, and tie.
            logits = model.head(features)
        yield logits.float().cpu().numpy(), features.float().cpu().numpy()


def to_device(batch: UInt8, device: Device) -> Tensor:
    """``batch`` as a tensor on the device; the copy overlaps with work where that is possible."""
    tensor = torch.from_numpy(np.array(batch))  # a copy: the memory map is read-only
    if device.kind == "cuda":
        return tensor.pin_memory().to(device.torch, non_blocking=True)
    return tensor
