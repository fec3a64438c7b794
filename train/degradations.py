"""What a field camera does to a picture: light, obstruction and sensor errors, at five severities.

It does not know files, data sets or models. Pictures are uint8 ``[N, H, W, C]``, on the CPU or a
GPU; all of a batch are worked on at once.

A picture depends on the image, the degradation, the severity and its own seed alone, not on the
batch it is in; another device differs by at most one level. Therefore random numbers are hashes
of (seed, draw, position), not draws from a generator, and edges are antialiased: rounding in the
last bit must not move a whole pixel. Severities share their random numbers, so that a higher one
has the lower one's faults and more.

Lengths are shares of the shorter side. Noise, hot pixels and dead lines belong to pixels: degrade
at the sensor's resolution, before any resize, where that can be had.
"""

import difflib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.errors import DataError

Kind = Literal["lighting", "obstruction", "sensor"]
SEVERITIES = (1, 2, 3, 4, 5)
FIELD_PHOTO_VERSION = 1
"""Raise it when field_photo makes other pictures than before: stored ones are then made again."""

_REFERENCE_SIDE = 300.0
"""Pixels per side of the camera that field_photo's lengths were written down for."""
_BLOCKS = 16
"""Blocks along the shorter side that a transmission loses as a whole."""
_DIRT_CELLS = (9, 28)
"""Cells along the shorter side, each with room for one speck: large specks, then small ones."""


@dataclass(frozen=True)
class Degradation:
    """One way in which a picture gets worse."""

    name: str
    kind: Kind
    meaning: str
    """What it stands for and looks like, on one line."""
    parameter: str
    """What ``severities`` are, with the unit."""
    severities: tuple[float, float, float, float, float]
    apply: Callable[[Tensor, Tensor, "_Dice"], Tensor]
    """``(x [N, C, H, W] in [0, 1], parameter [N, 1, 1, 1], dice) -> x``, not yet clipped."""


def degrade(
    images: Tensor, name: str, severity: int | Tensor, seeds: Tensor | Sequence[int]
) -> Tensor:
    """``images`` as they look under the degradation ``name``.

    ``images`` is uint8 ``[N, H, W, C]`` with C 1 or 3, ``severity`` 1 to 5 for all or int64
    ``[N]``, ``seeds`` int64 ``[N]``. Returns new pictures of the same shape on the same device.

    Raises DataError for an unknown name or other shapes, types or severities.
    """
    degradation = _known(name)
    dice = _Dice(_checked_seeds(images, seeds), salt=zlib.crc32(name.encode()))
    amount = torch.tensor(degradation.severities, device=images.device)
    amount = amount[_checked_severity(images, severity) - 1]
    return _to_bytes(degradation.apply(_to_float(images), amount, dice))


def field_photo(images: Tensor, seeds: Tensor | Sequence[int]) -> Tensor:
    """``images`` as a random field camera shows them: several faults at once, harsh on purpose.

    Shapes, types and errors as in degrade. In this order, with U uniform and lengths for a side
    of 300 pixels: Gaussian blur (probability .6, sigma U(.8, 3)); exposure U(.55, 1.15) with a
    gradient U(.3, 1) across the picture in any direction; gamma U(.6, 1.7); 1-3 grey occluders
    (.5); Gaussian noise U(.01, .08); 1-5 dead lines (.3); hot pixels, 50-600 of 90,000 (.3).
    """
    dice = _Dice(_checked_seeds(images, seeds), salt=0)
    x = _to_float(images)
    pixel = 1 / _REFERENCE_SIDE
    sigma = dice.uniform(0.8, 3.0) * pixel * dice.chance(0.6)
    x = _gaussian_blur(x, sigma, most=3.0 * pixel)
    exposure, slope = dice.uniform(0.55, 1.15), dice.uniform(0.3, 1.0)
    x = (x * (exposure + slope * _ramp(x, dice)).clamp(0.05, 2.0)).clamp(0, 1)
    x = x.pow(dice.uniform(0.6, 1.7))
    x = _occlude(x, dice.whole(1, 3) * dice.chance(0.5), dice, most=3)
    x = _noise(x, dice.uniform(0.01, 0.08), dice)
    x = _dead_lines(x, dice.whole(1, 5) * dice.chance(0.3), dice, most=5)
    x = _hot_pixels(x, dice.uniform(50, 600) * pixel**2 * dice.chance(0.3), dice)
    return _to_bytes(x)


def content_seed(sha256: str) -> int:
    """The seed that gives an image its one fixed degraded picture, whatever a run's own seed."""
    return int(sha256[:15], 16)


# --- lighting: x is [N, C, H, W], amounts are [N, 1, 1, 1]


def _gradient(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    return x * (1 + amount * _ramp(x, dice)).clamp(min=0.05)


def _underexposure(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    return x / amount


def _overexposure(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    return x * amount


def _gamma(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    return x.pow(torch.where(dice.chance(0.5), amount, 1 / amount))


def _banding(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    height = x.shape[2]
    rows = (torch.arange(height, device=x.device).view(1, 1, height, 1) + 0.5) / height
    phase = 2 * math.pi * (dice.uniform(3, 9) * rows + dice.uniform(0, 1))
    return x * (1 - amount * (0.5 - 0.5 * torch.cos(phase)))


def _ramp(x: Tensor, dice: "_Dice") -> Tensor:
    """From -.5 to .5 across the picture (a little more between corners), in a random direction."""
    height, width = x.shape[2:]
    v = (torch.arange(height, device=x.device).view(1, 1, height, 1) + 0.5) / height - 0.5
    u = (torch.arange(width, device=x.device).view(1, 1, 1, width) + 0.5) / width - 0.5
    angle = dice.uniform(0, 2 * math.pi)
    return torch.cos(angle) * u + torch.sin(angle) * v


# --- obstruction


def _dirt(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    for cells in _DIRT_CELLS:
        shape, rows, columns, y, u = _cells(x, cells)

        radius = 0.08 + 0.34 * dice.uniform(0, 1, *shape).square()  # small ones are commoner
        centre_y, centre_u = (radius + (1 - 2 * radius) * dice.uniform(0, 1, *shape) for _ in "yu")
        opacity = dice.uniform(0.35, 0.95, *shape)
        opacity = opacity * (dice.uniform(0, 1, *shape) < amount[:, :, 0])
        radius, centre_y, centre_u, opacity = (
            _spread(values, rows, columns) for values in (radius, centre_y, centre_u, opacity)
        )
        distance = (y - centre_y).square_().add_((u - centre_u).square_()).sqrt_()
        # Out of focus: the rim fades over half of the radius.
        cover = distance.div_(radius).mul_(-2).add_(2).clamp_(0, 1).mul_(opacity)
        x = x - x * cover
    return x


def _occluders(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    return _occlude(x, amount, dice, most=6)


def _occlude(x: Tensor, count: Tensor, dice: "_Dice", *, most: int) -> Tensor:
    """``count`` (at most ``most``) flat ellipses or bars, each below those before it."""
    height, width = x.shape[2:]
    side = min(height, width)
    y = (torch.arange(height, device=x.device).view(1, 1, height, 1) + 0.5) / side
    u = (torch.arange(width, device=x.device).view(1, 1, 1, width) + 0.5) / side
    free, paint = torch.ones_like(x[:, :1]), torch.zeros_like(x[:, :1])
    for number in range(most):
        grey, bar = dice.uniform(0, 0.9), dice.chance(0.5)
        place = [torch.where(bar, 0.2 + 0.6 * at, at) for at in (dice.uniform(0, 1) for _ in "yu")]
        dy, du = y - place[0] * (height / side), u - place[1] * (width / side)
        half_y, half_u = dice.uniform(0.05, 0.18), dice.uniform(0.05, 0.18)
        half_width, angle = dice.uniform(0.01, 0.03), dice.uniform(0, math.pi)
        # Both outlines are where (across du + slant dy)^2 + (down dy)^2 is 1.
        across = torch.where(bar, torch.cos(angle) / half_width, 1 / half_u)
        slant = torch.where(bar, torch.sin(angle) / half_width, 0.0)
        down = torch.where(bar, 0.0, 1 / half_y)
        distance = (across * du + slant * dy).square_().add_((down * dy).square()).sqrt_()
        scale = side * torch.where(bar, half_width, torch.minimum(half_y, half_u))
        offset = torch.where(count > number, scale + 0.5, 0.0)
        visible = distance.mul_(-scale).add_(offset).clamp_(0, 1).mul_(free)
        free.sub_(visible)
        paint.addcmul_(visible, grey)
    return x * free + paint


def _edge_cover(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    height, width = x.shape[2:]
    v = (torch.arange(height, device=x.device).view(1, 1, height, 1) + 0.5) / height
    u = (torch.arange(width, device=x.device).view(1, 1, 1, width) + 0.5) / width
    upright, far = dice.chance(0.5), dice.chance(0.5)
    across, along = torch.where(upright, u, v), torch.where(upright, v, u)
    across = torch.where(far, 1 - across, across)
    depth = amount + dice.uniform(-0.06, 0.06) * (along - 0.5) - across
    cover = (depth * torch.where(upright, width, height) + 0.5).clamp(0, 1)
    return x + cover * (dice.uniform(0, 0.15) - x)


# --- sensor


def _few_dead_lines(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    return _dead_lines(x, amount, dice, most=16)


def _dead_lines(x: Tensor, count: Tensor, dice: "_Dice", *, most: int) -> Tensor:
    """``count`` (at most ``most``) rows or columns, all black or all white."""
    height, width = x.shape[2:]
    thickness = max(1.0, min(height, width) / _REFERENCE_SIDE)
    row, white = dice.chance(0.5, most), dice.chance(0.5, most)
    place = dice.uniform(0, 1, most)
    dead = torch.arange(most, device=x.device) < count[:, :, 0, 0]
    for is_this, length, shape in (
        (~row, width, (-1, 1, 1, width)),
        (row, height, (-1, 1, height, 1)),
    ):
        start = (place * length).floor()[:, :, None]
        pixels = torch.arange(length, device=x.device)
        share = ((start + thickness - pixels).clamp(0, 1) * (pixels >= start)).mul(
            (dead & is_this)[:, :, None]
        )
        # The first line at a pixel stays on top.
        share, first = share.max(dim=1)
        level = white.gather(1, first).to(x.dtype)
        x = x + share.view(shape) * (level.view(shape) - x)
    return x


def _hot_pixels(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    hot = dice.uniform(0, 1, 1, *x.shape[2:]) < amount
    return x.masked_fill(hot, 1.0)


def _noise(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    return dice.normal(*x.shape[1:]).mul_(amount).add_(x)


def _blur(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    return _gaussian_blur(x, amount, most=DEGRADATIONS["blur"].severities[-1])


def _gaussian_blur(x: Tensor, sigma: Tensor, *, most: float) -> Tensor:
    side = min(x.shape[2:])
    taps = torch.arange(math.ceil(3 * most * side) + 1, device=x.device)
    # A sigma of 0 leaves the picture as it is: every tap but the middle one is exactly 0.
    kernel = torch.exp(-0.5 * (taps / (sigma * side).clamp(min=1e-2)).square())
    return _convolve(_convolve(x, kernel, 2), kernel, 3)


def _motion_blur(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    side = min(x.shape[2:])
    most = DEGRADATIONS["motion-blur"].severities[-1]
    taps = torch.arange(math.ceil(most * side / 2) + 1, device=x.device)
    across = dice.chance(0.5)
    for axis, moves in ((2, ~across), (3, across)):
        length = 1 + amount * side * moves  # a pixel at rest is a pixel long
        x = _convolve(x, (length / 2 + 0.5 - taps).clamp(0, 1), axis)
    return x


def _convolve(x: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """``x`` with a symmetric ``kernel [N, 1, 1, K]``, middle tap first, along ``axis`` 2 or 3.

    Shifted pictures are added up in one fixed order: a library's convolution may choose another
    algorithm, and so another rounding, for another batch size.
    """
    kernel = kernel / (2 * kernel.double().sum(dim=3, keepdim=True) - kernel[..., :1])
    kernel = kernel.to(x.dtype)
    reach, length = kernel.shape[3] - 1, x.shape[axis]
    padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
    wide = F.pad(x, padding, mode="replicate")
    total = x * kernel[..., :1]
    for tap in range(1, reach + 1):
        before = wide.narrow(axis, reach - tap, length)
        after = wide.narrow(axis, reach + tap, length)
        total.addcmul_(before + after, kernel[..., tap : tap + 1])
    return total


def _bit_depth(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    steps = 1 << amount.to(torch.int32)
    # In whole numbers: no rounding may lift a level into the next step.
    kept = (x * 255).round().to(torch.int32) * steps // 256
    return kept / (steps - 1)


def _dropped_blocks(x: Tensor, amount: Tensor, dice: "_Dice") -> Tensor:
    shape, rows, columns, _, _ = _cells(x, _BLOCKS)
    lost = dice.uniform(0, 1, *shape) < amount[:, :, 0]
    grey = 0.5 * dice.chance(0.5)
    return torch.where(_spread(lost, rows, columns), grey, x)


def _cells(x: Tensor, count: int) -> tuple[tuple[int, int], Tensor, Tensor, Tensor, Tensor]:
    """A grid of square cells, ``count`` along the shorter side.

    Returns rows and columns of the grid, each pixel's row ``[H]`` and column ``[W]`` in it,
    and its place inside that cell, in cells, ``[H, 1]`` and ``[W]``.
    """
    height, width = x.shape[2:]
    side = min(height, width)
    rows = torch.arange(height, device=x.device) * count
    columns = torch.arange(width, device=x.device) * count
    inside_y, inside_u = ((at % side + 0.5 * count) / side for at in (rows, columns))
    grid = ((height - 1) * count // side + 1, (width - 1) * count // side + 1)
    return grid, rows // side, columns // side, inside_y[:, None], inside_u


def _spread(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values of cells ``[N, rows of the grid, columns]`` at every pixel, ``[N, 1, H, W]``."""
    return values.index_select(1, rows).index_select(2, columns)[:, None]


# --- the list


_ALL = (
    Degradation(
        "gradient", "lighting",
        "One-sided light: the picture gets brighter towards one side and darker towards the other.",
        "gain difference across the picture",
        (0.3, 0.6, 0.9, 1.3, 1.8), _gradient,
    ),
    Degradation(
        "underexposure", "lighting",
        "Too little light or too short an exposure; levels merge in the dark.",
        "exposure divided by",
        (1.5, 2, 3, 4, 6), _underexposure,
    ),
    Degradation(
        "overexposure", "lighting",
        "Too much light; bright parts saturate and their detail is gone.",
        "exposure times",
        (1.25, 1.5, 1.8, 2.3, 3), _overexposure,
    ),
    Degradation(
        "gamma", "lighting",
        "Another tone curve than in training: darker or brighter midtones, by chance.",
        "exponent, or one over it",
        (1.25, 1.5, 1.8, 2.2, 2.8), _gamma,
    ),
    Degradation(
        "banding", "lighting",
        "Flickering lamps and a rolling shutter: 3 to 9 dark bands over the rows.",
        "share of light lost in a band",
        (0.12, 0.25, 0.4, 0.6, 0.8), _banding,
    ),
    Degradation(
        "dirt", "obstruction",
        "Dust and drops on the window: soft dark specks, large and small.",
        "share of grid cells with a speck",
        (0.06, 0.12, 0.22, 0.36, 0.55), _dirt,
    ),
    Degradation(
        "occluders", "obstruction",
        "Things before the part: flat grey ellipses, and bars like cables or strips.",
        "number of things",
        (1, 2, 3, 4, 6), _occluders,
    ),
    Degradation(
        "edge-cover", "obstruction",
        "A housing, clamp or shifted part covers one side of the picture with near black.",
        "share of the picture covered",
        (0.05, 0.1, 0.16, 0.24, 0.34), _edge_cover,
    ),
    Degradation(
        "dead-lines", "sensor",
        "Rows or columns of the sensor that read all black or all white.",
        "number of lines",
        (1, 2, 4, 8, 16), _few_dead_lines,
    ),
    Degradation(
        "hot-pixels", "sensor",
        "Single pixels that always read white.",
        "share of pixels",
        (0.0005, 0.0015, 0.004, 0.01, 0.03), _hot_pixels,
    ),
    Degradation(
        "noise", "sensor",
        "Gaussian noise of high gain or heat, in every channel by itself.",
        "standard deviation as a share of full scale",
        (0.02, 0.04, 0.08, 0.12, 0.18), _noise,
    ),
    Degradation(
        "blur", "sensor",
        "Out of focus, or a greasy lens: Gaussian blur.",
        "standard deviation as a share of the shorter side",
        (0.004, 0.007, 0.011, 0.016, 0.024), _blur,
    ),
    Degradation(
        "motion-blur", "sensor",
        "The belt moves during exposure: blur along rows or columns.",
        "way moved as a share of the shorter side",
        (0.01, 0.02, 0.035, 0.055, 0.08), _motion_blur,
    ),
    Degradation(
        "bit-depth", "sensor",
        "Too few levels: a converter or codec that drops the low bits.",
        "bits per channel",
        (6, 5, 4, 3, 2), _bit_depth,
    ),
    Degradation(
        "dropped-blocks", "sensor",
        "Lost packets: square blocks of the picture arrive black or grey.",
        "share of blocks lost",
        (0.02, 0.05, 0.1, 0.2, 0.35), _dropped_blocks,
    ),
)  # fmt: skip

DEGRADATIONS: dict[str, Degradation] = {degradation.name: degradation for degradation in _ALL}
"""By name, grouped by kind; the order of sweeps, contact sheets and docs."""


# --- random numbers and borders


class _Dice:
    """Random numbers of each picture: the k-th draw hashes (salt, the picture's seed, k).

    The hash is lowbias32, a 32-bit integer mixer (C. Wellons, hash-prospector, 2018).
    """

    def __init__(self, seeds: Tensor, salt: int) -> None:
        low, high = seeds.to(torch.int32), (seeds >> 32).to(torch.int32)
        self._keys = _mix(_mix(low ^ (salt & 0x7FFFFFFF)) ^ high)
        self._draws = 0

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """float32 ``[N, *shape]`` inside (low, high); without a shape ``[N, 1, 1, 1]``."""
        shape = shape or (1, 1, 1)
        self._draws += 1
        keys = _mix(self._keys + self._draws)[:, None]
        places = _mix(torch.arange(math.prod(shape), dtype=torch.int32, device=keys.device))
        bits = _mix(places ^ keys)
        # 23 bits and a half: neither 0 nor 1, whose normal deviates are infinite.
        share = (bits >> 9).bitwise_and_(0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
        return share.mul_(high - low).add_(low).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal deviates, float32 ``[N, *shape]``."""
        return self.uniform(-1, 1, *shape).erfinv_().mul_(math.sqrt(2))

    def chance(self, share: float, *shape: int) -> Tensor:
        """True with probability ``share``, bool ``[N, *shape]``."""
        return self.uniform(0, 1, *shape) < share

    def whole(self, low: int, high: int) -> Tensor:
        """A whole number from ``low`` to ``high``, float32 ``[N, 1, 1, 1]``."""
        return self.uniform(low, high + 1).floor()


def _mix(x: Tensor) -> Tensor:
    """int32 in, well mixed int32 of the same shape out; products wrap around."""
    x = (x >> 16).bitwise_and_(0xFFFF).bitwise_xor_(x)
    x.mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x.mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _to_float(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255


def _to_bytes(x: Tensor) -> Tensor:
    levels = (x * 255).round_().clamp_(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def _known(name: str) -> Degradation:
    if name not in DEGRADATIONS:
        close = difflib.get_close_matches(name, DEGRADATIONS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(
            f"degradation {name!r} is unknown; {hint}expected one of {', '.join(DEGRADATIONS)}"
        )
    return DEGRADATIONS[name]


def _checked_seeds(images: Tensor, seeds: Tensor | Sequence[int]) -> Tensor:
    """Refuse images that are none, then bring ``seeds`` to their device."""
    shape = list(images.shape)
    if images.dtype != torch.uint8 or images.ndim != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise DataError(
            f"degradations: expected images uint8 [N, H, W, C] with C 1 or 3, got "
            f"{_words(images)}; pass pictures as runtime.preprocess returns them"
        )
    seeds = torch.as_tensor(seeds)
    if seeds.dtype != torch.int64 or seeds.shape != (len(images),):
        raise DataError(
            f"degradations: expected seeds int64 [{len(images)}], got {_words(seeds)}; "
            "give each image its own"
        )
    return seeds.to(images.device)


def _checked_severity(images: Tensor, severity: int | Tensor) -> Tensor:
    """int64 ``[1, 1, 1, 1]`` or ``[N, 1, 1, 1]``."""
    levels = torch.as_tensor(severity, device=images.device)
    if levels.dtype != torch.int64 or levels.shape not in ((), (len(images),)):
        raise DataError(
            f"degradations: expected one whole severity or int64 [{len(images)}], "
            f"got {_words(levels)}"
        )
    low, high = int(levels.min()), int(levels.max())
    if low < SEVERITIES[0] or high > SEVERITIES[-1]:
        wrong = low if low < SEVERITIES[0] else high
        raise DataError(
            f"degradations: expected severities {SEVERITIES[0]} (mild) to {SEVERITIES[-1]} "
            f"(severe), got {wrong}"
        )
    return levels.view(-1, 1, 1, 1)


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# --- docs


def degradations_page() -> str:
    """``docs/degradations.md``: every degradation with what it stands for and its severities."""
    lines = _PAGE_TOP.strip().splitlines()
    for kind in get_args(Kind):
        lines += ["", f"## {kind.capitalize()}", ""]
        lines += ["| name | what it stands for | severities are | 1 | 2 | 3 | 4 | 5 |"]
        lines += ["| --- | --- | --- |" + " ---: |" * len(SEVERITIES)]
        for d in DEGRADATIONS.values():
            if d.kind == kind:
                steps = " | ".join(f"{value:g}" for value in d.severities)
                lines.append(f"| `{d.name}` | {d.meaning} | {d.parameter} | {steps} |")
    return "\n".join(lines) + "\n\n" + _PAGE_END.strip() + "\n"


_PAGE_TOP = """
# Field degradations

<!-- Generated from train/degradations.py by `make docs`; edit the tables there. -->

What light, dirt and sensors do to a picture. One module, three uses: training augmentation, the
simulated target domain, and the robustness sweep of the similarity report. To see all of them on a
picture of yours:

<!-- alike: tests/test_degradations.py::test_the_command_writes_where_it_says -->
```sh
python -m train degradations IMAGE
```

Pictures are uint8 `[N, H, W, C]`, gray or RGB, on the CPU or a GPU:

<!-- run: tests/test_docs.py::test_the_python_of_the_degradations_page_runs -->
```python
from train.degradations import degrade, field_photo

dark = degrade(images, "underexposure", 3, seeds)  # seeds: int64 [N]
photos = field_photo(images, seeds)
```

A result depends on the image, the name, the severity and the image's own seed alone: not on the
batch, and on the device only by one level. A higher severity has the lower one's faults and more.
Lengths are shares of the shorter side. Noise, hot pixels and dead lines belong to pixels, so
degrade at the sensor's resolution where that can be had.
"""

_PAGE_END = """
## The field photo

One random composition, harsh on purpose, for augmentation (`degrade` in `[train]`) and for the
simulated target (`target = "simulated"` in `[data]`). U is uniform, lengths are for a side of 300
pixels, the order is this:

1. probability .6: Gaussian blur, standard deviation U(.8, 3) pixels;
2. exposure U(.55, 1.15) with a gradient of U(.3, 1) across the picture, in any direction;
3. gamma U(.6, 1.7);
4. probability .5: 1 to 3 grey ellipses or bars;
5. Gaussian noise, standard deviation U(.01, .08) of full scale;
6. probability .3: 1 to 5 dead lines;
7. probability .3: hot pixels, 50 to 600 in 90,000.

A simulated target has one such photo per image, seeded by the image's content: the same in every
run, whatever the recipe's seed. It is made at the image's own resolution and kept as PNG.

[Adding one](add-a-degradation.md) is a walk-through of its own.
"""
