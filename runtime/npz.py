"""Read arrays from ``.npz`` bytes that may be hostile: nothing is run, nothing costs extra memory.

NumPy's own reader takes memory for the shape that a file declares before it looks whether the
bytes are there, and unpacks compressed members of any size. Here members are stored plain, and an
array has exactly the bytes that it declares (NEP 1, version 1.0: what ``numpy.savez`` writes).
"""

import io
import math
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_ARRAYS = 64


def read_npz(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays in ``data`` by name, C-ordered, each a copy of its own.

    Raises ValueError for everything that ``numpy.savez`` would not have written.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if len(infos) > MAX_ARRAYS:
                raise ValueError(f"expected at most {MAX_ARRAYS} arrays, got {len(infos)}")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise ValueError("expected arrays stored plain, got compressed ones")
            if sum(info.file_size for info in infos) > len(data):
                raise ValueError("expected no more bytes in arrays than in the file")
            return {
                info.filename.removesuffix(".npy"): _array(archive.read(info)) for info in infos
            }
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"damaged: {error}") from error


def _array(data: bytes) -> npt.NDArray[Any]:
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("expected arrays of format 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    left = data[file.tell() :]
    if fortran or dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError("expected plain arrays of numbers in C order")
    if math.prod(shape) * dtype.itemsize != len(left):
        raise ValueError(f"expected {dtype} {list(shape)}, got {len(left):,} bytes")
    return np.frombuffer(left, dtype).reshape(shape).copy()
