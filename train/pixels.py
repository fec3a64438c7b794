"""Preprocessed images as one array on disk: decoded once, read as often as training likes.

The file is memory-mapped, so that a data set larger than memory costs disk, not memory. It is
keyed by what the images are and how they are preprocessed; nothing else may change it. What is
computed from images and as large is kept in the same way (train/features, train/stages).
"""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import atomic
from runtime.dataset import Example
from runtime.errors import DataError
from runtime.preprocess import InputSpec, preprocess
from train import distributed

UInt8 = npt.NDArray[np.uint8]
Track = Callable[[Iterable[UInt8], int], Iterable[UInt8]]

THREADS = 4
"""Pillow decodes outside the interpreter lock; more threads than this wait for the disk."""

AHEAD = 64
"""Images decoded before they are written: all of them at once might not fit into memory."""


def load_pixels(
    examples: Sequence[Example], spec: InputSpec, cache: Path, track: Track | None = None
) -> UInt8:
    """The preprocessed ``examples`` as a read-only uint8 array ``[N, H, W, C]``.

    ``track`` wraps the decoding for a progress bar and gets the number of images.

    Raises DataError if an image cannot be read any more, or if the disk has no room.
    """
    path = cache / f"pixels-{_key(examples, spec)[:32]}.npy"
    known: UInt8 | None = open_rows(path)
    if known is not None:
        return known
    shape = len(examples), *spec.shape
    decoded: Iterable[UInt8] = _decoded(examples, spec) if distributed.main() else ()
    if track is not None:
        decoded = track(decoded, len(examples))
    return write_rows(path, shape, np.dtype(np.uint8), (i[None] for i in decoded), "images")


def _key(examples: Sequence[Example], spec: InputSpec) -> str:
    digest = hashlib.sha256(msgspec.json.encode(spec))
    for example in examples:
        digest.update(bytes.fromhex(example.sha256))
    return digest.hexdigest()


def _decoded(examples: Sequence[Example], spec: InputSpec) -> Iterator[UInt8]:
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future[UInt8]] = deque()
        try:
            for example in examples:
                waiting.append(pool.submit(preprocess, example.path, spec))
                if len(waiting) == AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the rest
            raise


def open_rows(path: Path) -> npt.NDArray[Any] | None:
    """The array that write_rows left in ``path`` as a read-only memory map.

    None if there is none or it is damaged, in whichever process: that costs time, never a wrong
    answer.
    """
    try:
        rows: npt.NDArray[Any] | None = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        rows = None
    return rows if distributed.agree(rows is not None) else None


def write_rows(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    parts: Iterable[npt.NDArray[Any]],
    what: str,
) -> npt.NDArray[Any]:
    """Write an array of ``shape`` to ``path`` as its rows come, and open it.

    Written in order, not through a memory map: on a full disk that would be a bus error. Of
    several processes the first one writes; the others only take part in making ``parts``.

    Raises DataError if the disk has no room, OverflowError if a value is out of ``dtype``'s range.
    """
    if distributed.main():
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = dtype.itemsize * int(np.prod(shape)), shutil.disk_usage(path.parent).free
        if needed > free:
            raise DataError(
                f"{path.parent}: {needed / 2**30:.1f} GiB are needed for {shape[0]:,} {what}, "
                f"{free / 2**30:.1f} GiB are free; make room or use a smaller [input] size"
            )
        with atomic.replacing_file(path) as temporary, temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": dtype.str, "fortran_order": False, "shape": shape}
            )
            for part in parts:
                file.write(_cast(part, dtype).tobytes())
    else:
        for part in parts:
            _cast(part, dtype)
    distributed.barrier()
    written: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return written


def _cast(part: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if dtype.kind == "f" and not np.abs(part).max(initial=0.0) <= np.finfo(dtype).max:
        raise OverflowError(f"a value is out of the range of {dtype}")
    return part.astype(dtype, copy=False)
