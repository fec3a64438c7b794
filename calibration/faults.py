"""Why an image must not calibrate: broken, black, saturated, constant, noise, foreign, seen before.

It judges one image after another and does not know which are wanted.
"""

import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtime.dataset import Example
from runtime.errors import DataError
from runtime.preprocess import FORMATS, InputSpec, UInt8, decode, preprocess

FLAT_LEVELS = 4
"""Images with less contrast than this, in 8-bit levels, show nothing."""

DARK_LEVEL = 8
"""Images with no level above this are black, and with none below 255 - DARK_LEVEL saturated."""

NOISE_CORRELATION = 0.15
NOISE_STRUCTURE = 2.5
"""An image below both is noise: see Texture."""

PATCHES = 16
"""Along each side of an image; their means are what one sees of it with narrowed eyes."""

PATCH_SIDE = 8
"""Pixels along a patch's side, below which its mean says little: small images get fewer, at least
FEW_PATCHES along each side."""
FEW_PATCHES = 4

SAME_LEVELS = 1.0
"""Images whose patches' means differ by no more than this, in 8-bit levels, show the same.

Measured at 160 px: a JPEG of quality 50 differs from its original by less than 0.94, the two most
alike of 2,624 solar cells by 2.9."""

FOREIGN_RATIO = 1.1
"""How much longer or squarer than nearly all others an image is that another camera took."""

NEARLY_ALL = 0.9
"""If fewer images than this share a shape, the field has many shapes and none is foreign."""


class Texture(NamedTuple):
    """What tells a picture from noise, whatever its mean and contrast.

    In noise, pixels know nothing of their neighbours, so that ``correlation`` is near 0; and the
    means of patches vary only as much as chance lets them, so that ``structure`` is near 1. A
    picture lacks at most one of the two: a fine weave averages to nothing, but its neighbours
    agree; under heavy sensor noise neighbours do not, but some patches are darker than others.

    Measured: 2,624 solar cells (ELPV, 300 px) have a correlation above 0.91 and a structure above
    94. In every field degradation at severity 5 (train/degradations, at 300 and 160 px) those
    that correlate by less than 0.25, by sensor noise, have a structure of 5.1 or more. Uniform,
    Gaussian, one-sided and salt-and-pepper noise of any mean and contrast, from 64 to 640 px,
    stays below 0.07 and 1.6. At 64 px patches are small, and a few of the noisiest cells fail.
    """

    correlation: float
    """Of pixels with their neighbours, down or across, whichever is farther from 0; -1 to 1."""
    structure: float
    """Variance of the patches' means over what independent pixels would leave; 0 to patch area."""

    @property
    def is_noise(self) -> bool:
        """Whether both say so."""
        return abs(self.correlation) < NOISE_CORRELATION and self.structure < NOISE_STRUCTURE


def texture(picture: UInt8) -> Texture:
    """Measure a gray ``picture`` ``[H, W]`` of more than one level, at the size it was taken.

    A resize makes neighbours agree: noise that was enlarged or blurred passes for a picture.
    """
    levels = picture - picture.mean(dtype=np.float64)
    variance = float(np.mean(levels**2))
    down = float(np.mean(levels[1:] * levels[:-1])) / variance
    across = float(np.mean(levels[:, 1:] * levels[:, :-1])) / variance
    number = min(picture.shape) // PATCH_SIDE
    means = _patch_means(levels, min(max(number, FEW_PATCHES), PATCHES))
    structure = float(np.mean(means**2)) / variance * levels.size / means.size
    return Texture(max(down, across, key=abs), structure)


def degenerate(picture: UInt8) -> str:
    """Why ``picture`` ``[H, W, C]`` says nothing about the field; empty if it does.

    One pixel in a thousand may be hot or dead without counting.
    """
    low, high = np.percentile(picture, [0.1, 99.9])
    if high <= DARK_LEVEL:
        return f"black: no level above {high:.0f}"
    if low >= 255 - DARK_LEVEL:
        return f"saturated: no level below {low:.0f}"
    if high - low < FLAT_LEVELS:
        return f"constant: levels {low:.0f} to {high:.0f}"
    return ""


class Judge:
    """Says why an image must not be taken, and remembers those that may.

    What is judged is the file as it is now, decoded and preprocessed by ``spec``; ``examples`` are
    all that the field offers, to know its cameras' shape.
    """

    def __init__(self, examples: Sequence[Example], spec: InputSpec) -> None:
        self.faulty = 0
        """How many images were unusable; one that shows what another shows is not."""
        self._spec = spec
        self._shape = _common_shape(examples)
        self._seen: list[tuple[str, float, npt.NDArray[np.float64]]] = []
        """Name, mean level, and patches' means ``[PATCHES, PATCHES, C]`` of each image."""

    def objection(self, example: Example) -> str:
        """Why ``example`` must not be taken; empty if it may, which is then remembered."""
        try:
            data = Path(example.path).read_bytes()
            upright = decode(data, window=self._spec.window)
            picture = preprocess(upright, self._spec)
        except DataError as error:
            fault = f"unreadable: {error}"
        except OSError as error:
            fault = f"unreadable: {error.strerror}"
        else:
            fault = self._fault(example, data, upright, picture)
            if not fault:
                return self._seen_before(Path(example.path).name, picture)
        self.faulty += 1
        return fault

    def _fault(self, example: Example, data: bytes, upright: Image.Image, picture: UInt8) -> str:
        if hashlib.sha256(data).hexdigest() != example.sha256:
            return "changed since the list of images was made"
        width, height = upright.size
        if min(width, height) < PATCHES:
            return f"too small: {width} x {height} pixels"
        if self._shape is not None:
            ratio = _longness(width, height) / self._shape
            if not 1 / FOREIGN_RATIO <= ratio <= FOREIGN_RATIO:
                return (
                    f"foreign: {width} x {height} pixels are {_longness(width, height):.2f} : 1, "
                    f"nearly all others {self._shape:.2f} : 1"
                )
        if reason := degenerate(picture):
            return reason
        gray = np.asarray(upright.convert("L"))
        if np.ptp(gray) and (found := texture(gray)).is_noise:
            return (
                f"noise: neighbouring pixels correlate by {found.correlation:.2f}, patches vary "
                f"{found.structure:.1f} times as much as in pure noise"
            )
        return ""

    def _seen_before(self, name: str, picture: UInt8) -> str:
        planes = [_patch_means(picture[..., c], PATCHES) for c in range(picture.shape[2])]
        means = np.stack(planes, axis=-1)
        level = float(means.mean())
        for other, other_level, other_means in self._seen:
            # No farther apart on average than where they differ most: spares most comparisons.
            if abs(level - other_level) > SAME_LEVELS:
                continue
            if np.abs(means - other_means).max() <= SAME_LEVELS:
                return f"shows the same as {other}"
        self._seen.append((name, level, means))
        return ""


def _patch_means(levels: npt.NDArray[np.generic], number: int) -> npt.NDArray[np.float64]:
    """Means ``[number, number]`` of the patches that tile ``levels`` ``[H, W]``."""
    rows, columns = (np.arange(number) * side // number for side in levels.shape)
    sums = np.add.reduceat(levels, rows, axis=0, dtype=np.float64)
    sums = np.add.reduceat(sums, columns, axis=1)
    heights = np.diff(rows, append=levels.shape[0])
    widths = np.diff(columns, append=levels.shape[1])
    means: npt.NDArray[np.float64] = sums / np.outer(heights, widths)
    return means


def _longness(width: int, height: int) -> float:
    """Longer side over shorter: a camera held upright is still the same camera."""
    return max(width, height) / min(width, height)


def _common_shape(examples: Sequence[Example]) -> float | None:
    """Longer over shorter side of NEARLY_ALL ``examples``; None if they do not agree.

    Only headers are read. What cannot be opened is judged when its turn comes.
    """
    shapes = [shape for example in examples if (shape := _shape(Path(example.path)))]
    if not shapes:
        return None
    common = statistics.median(shapes)
    alike = sum(1 / FOREIGN_RATIO <= shape / common <= FOREIGN_RATIO for shape in shapes)
    return common if alike >= NEARLY_ALL * len(shapes) else None


def _shape(path: Path) -> float:
    """Longer over shorter side of an image, 0 if it cannot be opened."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return _longness(*picture.size)
    except (OSError, ValueError, Image.DecompressionBombError):
        return 0.0
