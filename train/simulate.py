"""The target ``simulated``: half of the source's images as field photos, and a twin of the rest.

It does not know what a field photo looks like (train/degradations), nor how images were split.
An image has one field photo, whatever the seed of the run: made at the image's own resolution,
kept as PNG in the cache, and found there by the next run.
"""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image

from runtime import atomic
from runtime.dataset import Example
from runtime.errors import DataError
from runtime.preprocess import decode
from train.degradations import FIELD_PHOTO_VERSION, content_seed, field_photo
from train.domains import Track

THREADS = 2
"""One decodes or encodes while another computes; pictures of 20 megapixels want memory for each."""


def simulate(
    examples: Sequence[Example],
    *,
    seed: int,
    folder: Path,
    window: tuple[int, int] = (0, 65535),
    track: Track | None = None,
) -> list[Example]:
    """``examples`` of the source, split already, and a target of field photos made of them.

    Of every label and stratum half of the training images stay source, the others are target only,
    by a hash of ``seed`` and content. Validation and test images stay, and get a twin in the target
    with their label, stratum and split. A twin and its original share a group: the original's, or
    else its digest. Photos are in ``folder``; those that are there already are used again, damaged
    ones are replaced. ``window`` gives 16-bit levels, as in runtime.preprocess; ``track`` wraps
    the images to degrade in a progress bar.

    Returns examples in the order of domain and digest. Raises DataError if an image cannot be
    read any more.
    """
    moved = _half(examples, seed)
    stay = [e for e in examples if e.split == "train" and e.sha256 not in moved]
    tied = [
        msgspec.structs.replace(e, group=e.group or e.sha256)
        for e in examples
        if e.split != "train" or e.sha256 in moved
    ]
    pool = ThreadPoolExecutor(THREADS)
    try:
        waiting = [pool.submit(_twin, e, folder.absolute(), window) for e in tied]
        twins = [done.result() for done in (track(waiting) if track and waiting else waiting)]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the rest
    clean = [e for e in tied if e.split != "train"]
    return sorted([*stay, *clean, *twins], key=lambda e: (e.domain, e.sha256, e.split))


def _half(examples: Sequence[Example], seed: int) -> set[str]:
    """Digests of the training images that become target: every second one of a stratum."""

    def order(e: Example) -> tuple[str, str, str]:
        drawn = hashlib.sha256(f"simulate {seed} {e.sha256}".encode()).hexdigest()
        return e.label or "", e.stratum or "", drawn

    training = sorted((e for e in examples if e.split == "train"), key=order)
    return {e.sha256 for e in training[1::2]}


def _twin(example: Example, folder: Path, window: tuple[int, int]) -> Example:
    name = f"{example.sha256[:32]}-{window[0]}-{window[1]}-v{FIELD_PHOTO_VERSION}.png"
    data = _stored(folder / name)
    if data is None:
        data = _photo(example, window)
        atomic.write_bytes(folder / name, data)
    return msgspec.structs.replace(
        example,
        path=str(folder / name),
        sha256=hashlib.sha256(data).hexdigest(),
        domain="target",
    )


def _stored(path: Path) -> bytes | None:
    """The photo's bytes if it is there and whole."""
    try:
        data = path.read_bytes()
        decode(data)
    except (FileNotFoundError, DataError):
        return None
    return data


def _photo(example: Example, window: tuple[int, int]) -> bytes:
    pixels = np.array(decode(example.path, window=window))
    images = torch.from_numpy(pixels).view(1, *pixels.shape[:2], -1)
    photo = field_photo(images, [content_seed(example.sha256)])[0].numpy()
    encoded = io.BytesIO()
    Image.fromarray(photo.reshape(pixels.shape)).save(encoded, format="PNG")
    return encoded.getvalue()
