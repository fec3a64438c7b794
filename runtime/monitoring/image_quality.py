"""Whether a frame looks as frames of this field do: light, sharpness, lost blocks, a frozen camera.

It measures pixels against limits that were learned from the field's images at export; it knows no
model and no label. NumPy alone, well under a millisecond for 224 x 224 pixels.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Int16 = npt.NDArray[np.int16]
Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]

STATISTICS = (
    "brightness", "contrast", "black", "saturated", "sharpness", "noise", "flat", "lines",
    "rows",
)  # fmt: skip
"""What is measured, in the order of ``measure``."""

TAIL = 0.005
"""Share of the images that limits are learned from which, on each side, may be anything."""

NOTICED, ALARMING = 1.5, 2.0
"""Limits, as multiples of the distance from the median to where those tails begin."""

FROZEN_AFTER = 3

_FROZEN = 0.1
_CLIPPED = 2
_FLAT_SIDE = 4
_NOTHING = 1.5


class Flag(NamedTuple):
    """One thing that was noticed on a frame."""

    word: str
    """For programs and metrics, e.g. ``blurred``."""
    sentence: str
    """For people, with the value and the limit that it broke."""
    value: float
    limit: float
    alarms: bool
    """Whether the frame is too far from what was learned to act on its answer."""


class Limits(NamedTuple):
    """What one statistic may be; beyond the inner two it is noticed, beyond the outer it alarms."""

    alarm_below: float
    low: float
    high: float
    alarm_above: float


class _Scale(NamedTuple):
    """Where a statistic's distances are comparable: limits are learned there."""

    to: Callable[[Floats], Floats]
    back: Callable[[Floats], Floats]
    least: float
    """Smallest distance from the median to a tail: what is less says nothing about a camera."""


def _logit(levels: Floats) -> Floats:
    return np.asarray(np.log((levels + 0.5) / (255.5 - levels)))


def _levels(logit: Floats) -> Floats:
    return np.asarray(256.0 / (1.0 + np.exp(-logit)) - 0.5)


def _log(values: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(values, 1e-4)))


_BOUNDED = _Scale(_logit, _levels, 0.05)
_RATIO = _Scale(_log, np.exp, 0.05)
_SHARE = _Scale(np.asarray, np.asarray, 0.0025)
_CORRELATION = _Scale(np.asarray, np.asarray, 0.1)

_SCALES = {
    "brightness": _BOUNDED, "contrast": _RATIO, "black": _SHARE, "saturated": _SHARE,
    "sharpness": _RATIO, "noise": _RATIO, "flat": _SHARE, "lines": _RATIO,
    "rows": _CORRELATION,
}  # fmt: skip


class _Fault(NamedTuple):
    word: str
    statistic: str
    side: Literal["below", "above"]
    words: str
    """What is measured, for people; ``{}`` is a value."""


_FAULTS = (
    _Fault("dark", "brightness", "below", "mean level {:.1f}"),
    _Fault("bright", "brightness", "above", "mean level {:.1f}"),
    _Fault("low-contrast", "contrast", "below", "standard deviation of {:.1f} levels"),
    _Fault("high-contrast", "contrast", "above", "standard deviation of {:.1f} levels"),
    _Fault("crushed", "black", "above", "{:.1%} of the pixels are black"),
    _Fault("saturated", "saturated", "above", "{:.1%} of the pixels are white"),
    _Fault("blurred", "sharpness", "below", "detail of {:.4f} of the brightness"),
    _Fault("noisy", "noise", "above", "noise of {:.2f} levels"),
    _Fault("dropped-blocks", "flat", "above", "{:.1%} of the picture is one flat level"),
    _Fault("dead-line", "lines", "above", "a row or column that is {:.1f} levels off"),
    _Fault("torn", "rows", "below", "correlation of {:.2f} between rows next to each other"),
)


def measure(image: UInt8) -> Float64:
    """The STATISTICS ``[9]`` of ``image``, uint8 ``[H, W, C]`` as the model sees it.

    Brightness and contrast are mean and standard deviation in levels; black, saturated and flat
    are shares of the pixels, flat being those in a 4 x 4 square of one level below white: white
    ones are saturated, which has its own statistic. Sharpness is the mean absolute Laplacian over
    the mean level, so that exposure does not move it. Noise is Immerkær's estimate (1996) in
    levels; lines is how far a row's or column's mean is off its neighbours'. Rows is the least
    correlation between pairs of rows with one row between them: where a decoder has lost its place
    what follows is shifted sideways.
    """
    gray = _gray(image)
    across, down = np.diff(gray, axis=1), np.diff(gray, axis=0)
    bend_across, bend_down = np.diff(across, axis=1), np.diff(down, axis=0)
    brightness = gray.mean()
    detail = np.abs(bend_across[1:-1] + bend_down[:, 1:-1]).mean()
    grain = np.abs(np.diff(bend_across, n=2, axis=0)).mean()
    return np.array(
        [
            brightness,
            gray.std(),
            np.count_nonzero(gray <= _CLIPPED) / gray.size,
            np.count_nonzero(gray >= 255 - _CLIPPED) / gray.size,
            detail / (brightness + 1.0),
            grain * np.sqrt(np.pi / 2) / 6,
            _flat_share(gray, across, down),
            max(_line(gray.mean(axis=1)), _line(gray.mean(axis=0))),
            _least_correlation(gray),
        ]
    )


def _gray(image: UInt8) -> Int16:
    if image.shape[2] == 1:
        return image[:, :, 0].astype(np.int16)
    red, green, blue = (image[:, :, index].astype(np.int16) for index in range(3))
    return np.asarray((red + 2 * green + blue) >> 2)


def _flat_share(gray: Int16, across: Int16, down: Int16) -> float:
    """Share of the positions at which a square of _FLAT_SIDE pixels has one level below white."""
    flat = (across[:-1] == 0) & (down[:, :-1] == 0) & (gray[:-1, :-1] < 255 - _CLIPPED)
    steps = range(1, _FLAT_SIDE - 1)
    width, height = flat.shape[1] - len(steps), flat.shape[0] - len(steps)
    wide = flat[:, :width].copy()
    for step in steps:
        wide &= flat[:, step : step + width]
    square = wide[:height].copy()
    for step in steps:
        square &= wide[step : step + height]
    return float(np.count_nonzero(square) / square.size)


def _line(means: Float64) -> float:
    return float(np.abs(means[1:-1] - (means[:-2] + means[2:]) / 2).max())


def _least_correlation(gray: Int16) -> float:
    pairs = (gray[:-1] + gray[1:]).astype(np.float32)
    pairs -= pairs.mean(axis=1, keepdims=True)
    pairs /= np.sqrt(np.square(pairs).mean(axis=1, keepdims=True)) + 1e-3  # a row may be flat
    return float((pairs[:-3] * pairs[3:]).mean(axis=1).min())


def limits_of(samples: Floats) -> dict[str, Limits]:
    """The limits by name, from ``samples [N, 9]`` of images of the field that are in order.

    A few that are not in order do no harm: the TAIL at each end only says where it begins. Limits
    lie NOTICED and ALARMING times as far from the median as that, on a scale of each statistic's
    own: shares as they are, the rest by its logarithm, brightness by its logit.
    """
    limits = {}
    for name, column in zip(STATISTICS, np.asarray(samples, np.float64).T, strict=True):
        scale = _SCALES[name]
        low, middle, high = np.quantile(scale.to(column), [TAIL, 0.5, 1 - TAIL])
        below, above = max(middle - low, scale.least), max(high - middle, scale.least)
        ends = [-ALARMING * below, -NOTICED * below, NOTICED * above, ALARMING * above]
        limits[name] = Limits(*scale.back(middle + np.array(ends)).tolist())
    return limits


def look(image: UInt8, before: UInt8 | None, limits: Mapping[str, Limits]) -> tuple[Flag, ...]:
    """What is wrong with ``image``, uint8 ``[H, W, C]``, alarms first; empty if nothing is.

    ``before`` is the frame before it from the same camera. If it is the same, ``frozen`` is
    noticed; after how many of them it alarms is ``Watch``'s to count.
    """
    values = dict(zip(STATISTICS, measure(image).tolist(), strict=True))
    flags = [
        flag
        for fault in _FAULTS
        if fault.statistic in limits
        and (flag := _judge(fault, values[fault.statistic], limits[fault.statistic]))
    ]
    flags = _black(flags, values) or flags
    if before is not None and (frozen := _frozen(image, before, limits)):
        flags.append(frozen)
    return tuple(sorted(flags, key=lambda flag: not flag.alarms))


def _judge(fault: _Fault, value: float, limits: Limits) -> Flag | None:
    if fault.side == "below":
        broken, alarms, usual = value < limits.low, value < limits.alarm_below, limits.low
    else:
        broken, alarms, usual = value > limits.high, value > limits.alarm_above, limits.high
    if not broken:
        return None
    bound = "at least" if fault.side == "below" else "at most"
    usually = fault.words[fault.words.index("{") : fault.words.index("}") + 1].format(usual)
    sentence = f"{fault.word}: {fault.words.format(value)}, usual is {bound} {usually}"
    return Flag(fault.word, sentence, value, usual, alarms)


def _black(flags: list[Flag], values: Mapping[str, float]) -> list[Flag]:
    """One flag for a dark frame with nothing but noise on it, instead of all that follows."""
    dark = next((flag for flag in flags if flag.word == "dark"), None)
    contrast, noise = values["contrast"], values["noise"]
    if dark is None or contrast > _NOTHING * noise + 1.0:
        return []
    sentence = (
        f"black: mean level {dark.value:.1f}, usual is at least {dark.limit:.1f}, and a contrast "
        f"of {contrast:.1f} levels, which is no more than noise"
    )
    return [Flag("black", sentence, dark.value, dark.limit, True)]


def _frozen(image: UInt8, before: UInt8, limits: Mapping[str, Limits]) -> Flag | None:
    """Two exposures differ by their noise, whatever they show: 1.13 sigma on average.

    Less than a tenth of the least noise that images of this field have cannot be two exposures.
    """
    if image.shape != before.shape:  # another bundle answers now
        return None
    difference = float(np.abs(image.astype(np.int16) - before).mean())
    limit = _FROZEN * limits["noise"].low if "noise" in limits else 0.0
    if difference > limit:
        return None
    sentence = (
        f"frozen: {difference:.3f} levels from the frame before it; the noise of two exposures "
        f"makes it more than {limit:.3f}"
    )
    return Flag("frozen", sentence, difference, limit, False)


class Watch:
    """Looks at the frames of several cameras, and counts how long one has been frozen.

    From the ``frozen_after``-th repeat of a picture on ``frozen`` alarms; 0 for sources, such as
    files, that may well bring the same picture twice: then it never does.
    """

    def __init__(self, limits: Mapping[str, Limits], *, frozen_after: int = FROZEN_AFTER) -> None:
        self._limits, self._frozen_after = limits, frozen_after
        self._before: dict[str, UInt8] = {}
        self._repeats: dict[str, int] = {}

    def look(self, source: str, image: UInt8) -> tuple[Flag, ...]:
        """What is wrong with the next ``image`` of ``source``; it is kept, not copied."""
        flags = look(image, self._before.get(source), self._limits)
        self._before[source] = image
        if not any(flag.word == "frozen" for flag in flags):
            self._repeats[source] = 0
            return flags
        self._repeats[source] = repeats = self._repeats.get(source, 0) + 1
        if not 0 < self._frozen_after <= repeats:
            return flags
        return tuple(
            flag._replace(alarms=True, sentence=f"{flag.sentence}, {repeats} times in a row")
            if flag.word == "frozen"
            else flag
            for flag in flags
        )

    def forget(self, source: str) -> None:
        """``source`` gave no image: its next one follows none."""
        self._before.pop(source, None)
        self._repeats.pop(source, None)
