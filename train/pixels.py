"""Preprocessed images as one array on disk: decoded once, read as often as training likes.

The file is memory-mapped, so that a data set larger than memory costs disk, not memory. It is
keyed by what the images are and how they are preprocessed; nothing else may change it.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import atomic
from runtime.dataset import Example
from runtime.errors import DataError
from runtime.preprocess import InputSpec, preprocess

UInt8 = npt.NDArray[np.uint8]
THREADS = 4
"""Pillow decodes outside the interpreter lock; more threads than this wait for the disk."""


def load_pixels(
    examples: Sequence[Example],
    spec: InputSpec,
    cache: Path,
    track: Callable[[Iterable[UInt8], int], Iterable[UInt8]] | None = None,
) -> UInt8:
    """The preprocessed ``examples`` as a read-only uint8 array ``[N, H, W, C]``.

    ``track`` wraps the decoding for a progress bar and gets the number of images.

    Raises DataError if an image cannot be read any more, or if the disk has no room.
    """
    path = cache / f"pixels-{_key(examples, spec)[:32]}.npy"
    if not path.exists():
        _write(path, examples, spec, track)
    try:
        pixels: UInt8 = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        # A damaged cache costs time, never a wrong answer.
        _write(path, examples, spec, track)
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    return pixels


def _key(examples: Sequence[Example], spec: InputSpec) -> str:
    digest = hashlib.sha256(msgspec.json.encode(spec))
    for example in examples:
        digest.update(bytes.fromhex(example.sha256))
    return digest.hexdigest()


def _write(
    path: Path,
    examples: Sequence[Example],
    spec: InputSpec,
    track: Callable[[Iterable[UInt8], int], Iterable[UInt8]] | None,
) -> None:
    shape = (len(examples), *spec.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"{path.parent}: {needed / 2**30:.1f} GiB are needed for {len(examples):,} decoded "
            f"images, {free / 2**30:.1f} GiB are free; make room or use a smaller [input] size"
        )
    # Written in order, not through a memory map: on a full disk that would be a bus error.
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        atomic.replacing_file(path) as temporary,
        temporary.open("wb") as file,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        decoded: Iterable[UInt8] = pool.map(lambda e: preprocess(e.path, spec), examples)
        if track is not None:
            decoded = track(decoded, len(examples))
        try:
            for picture in decoded:
                file.write(picture.tobytes())
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the rest
            raise
