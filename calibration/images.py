"""Choose calibration images: balanced over classes and groups, diverse, none that would mislead.

It does not know the model; of features it knows only how far apart two are. The choice depends on
the images' content and the seed, never on their paths or order.

Why it matters: a few black images or pure noise among the calibration images widen or collapse
ranges so much that a good model answers at random, while any sane choice works about equally well.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from calibration.faults import Judge
from runtime import atomic
from runtime.dataset import Example, SetAside
from runtime.errors import DataError
from runtime.preprocess import InputSpec, UInt8, preprocess_batch

MIN_IMAGES = 8
"""Fewer cannot represent a domain: calibration is refused."""

ADVISED_IMAGES = 64
"""Fewer can leave a network with unbounded activations some 20 dB worse."""

MAX_FAULTY = 0.5
"""Share of the images looked at that may be unusable before the data as a whole is wrong."""


class Chosen(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A calibration image and why it is one."""

    path: str
    sha256: str
    label: str | None
    reason: str


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The calibration images in their order, and the candidates that were refused on the way."""

    chosen: tuple[Chosen, ...]
    refused: tuple[SetAside, ...]
    """Only what was looked at: candidates that were not needed are not judged."""
    candidates: int
    doubt: str = ""
    """Why the chosen images are hardly the field's, if so: see calibration/foreign."""

    @property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of each chosen image's file."""
        return tuple(image.sha256 for image in self.chosen)

    def per_class(self, classes: Sequence[str]) -> dict[str, int]:
        """Number of chosen images of each of ``classes``; unlabelled ones as ``(no label)``."""
        found = Counter(image.label for image in self.chosen)
        counts = {name: found[name] for name in classes}
        return counts | ({"(no label)": found[None]} if found[None] else {})


def choose_images(
    examples: Sequence[Example],
    *,
    count: int,
    spec: InputSpec,
    seed: int,
    features: npt.NDArray[np.floating] | None = None,
) -> Choice:
    """Choose ``count`` of ``examples``, or all that are usable if they are fewer.

    Each pick goes to the class with the fewest images so far, in it to the poorest stratum, in
    that to the poorest group; among equals to the image farthest from all picked before it, in
    the space of ``features`` ``[len(examples), D]`` (k-centre greedy: Gonzalez 1985), or without
    features in an order drawn by ``seed``.

    Images that must not calibrate (see Judge) are refused on the way, each with its reason.

    Raises DataError for an example that is not of a training split, examples of several domains,
    features that do not fit the examples, fewer than MIN_IMAGES usable images, or more than
    MAX_FAULTY of those looked at unusable: what is left of a wrong folder is no sample of the
    field, and nobody reads a warning in a nightly run. Images that occur twice are no fault.
    """
    _refuse_examples(examples, features)
    order = _order(examples, seed)
    rows, twins = _without_duplicates(examples, order)
    picker = _Picker([examples[row] for row in rows], None if features is None else features[rows])
    judge = Judge(examples, spec)
    chosen: list[Chosen] = []
    refused: list[SetAside] = []
    while len(chosen) < count:
        pick = picker.next()
        if pick is None:
            break
        example = picker.examples[pick]
        if reason := judge.objection(example):
            refused.append(SetAside(path=example.path, reason=reason))
            picker.refuse(pick)
            continue
        chosen.append(
            Chosen(
                path=example.path,
                sha256=example.sha256,
                label=example.label,
                reason=picker.accept(pick),
            )
        )
    refused += twins
    _refuse_choice(chosen, refused, judge.faulty, len(examples))
    return Choice(chosen=tuple(chosen), refused=tuple(refused), candidates=len(examples))


def held_out(
    examples: Sequence[Example], choice: Choice, *, count: int, spec: InputSpec, seed: int
) -> tuple[Example, ...]:
    """Up to ``count`` of ``examples`` that ``choice`` did not take, to test its ranges on.

    Balanced over classes, strata and groups like the choice, in an order drawn by ``seed``; only
    images that could have been chosen. Empty if ``choice`` took all.
    """
    chosen = set(choice.digests)
    rows, _ = _without_duplicates(examples, _order(examples, seed))
    picker = _Picker([examples[row] for row in rows if examples[row].sha256 not in chosen], None)
    judge = Judge(examples, spec)
    for example in examples:
        if example.sha256 in chosen:
            judge.objection(example)
    held: list[Example] = []
    while len(held) < count:
        pick = picker.next()
        if pick is None:
            break
        if judge.objection(picker.examples[pick]):
            picker.refuse(pick)
            continue
        picker.accept(pick)
        held.append(picker.examples[pick])
    return tuple(held)


def batches(choice: Choice, spec: InputSpec, *, size: int = 4) -> Iterator[UInt8]:
    """The chosen images as uint8 batches ``[<= size, H, W, C]``, read one batch at a time."""
    for start in range(0, len(choice.chosen), size):
        part = choice.chosen[start : start + size]
        yield preprocess_batch([image.path for image in part], spec)


def write_choice(path: Path, choice: Choice) -> None:
    """Write ``choice`` as readable JSON, atomically."""
    atomic.write_bytes(path, msgspec.json.format(msgspec.json.encode(choice), indent=1) + b"\n")


def _refuse_choice(
    chosen: Sequence[Chosen], refused: Sequence[SetAside], faulty: int, candidates: int
) -> None:
    why = "; ".join(f"{r.path}: {r.reason}" for r in refused[:3]) or "none was refused"
    if len(chosen) < MIN_IMAGES:
        raise DataError(
            f"expected at least {MIN_IMAGES} usable calibration images, got {len(chosen)} of "
            f"{candidates} ({why}); add images to the training split"
        )
    looked_at = len(chosen) + faulty
    if faulty > MAX_FAULTY * looked_at:
        raise DataError(
            f"{faulty} of {looked_at} calibration images are unusable, expected at most "
            f"{MAX_FAULTY:.0%} ({why}); is this the field's folder? Mend or remove them"
        )


def _refuse_examples(
    examples: Sequence[Example], features: npt.NDArray[np.floating] | None
) -> None:
    for example in examples:
        if example.split != "train":
            raise DataError(
                f"{example.path}: expected images of the training split, got one of the "
                f"{example.split} split; calibrating on it would make the gate's verdict worthless"
            )
    domains = sorted({example.domain for example in examples})
    if len(domains) > 1:
        raise DataError(f"expected images of one domain, got {' and '.join(domains)}")
    if features is None:
        return
    if features.ndim != 2 or len(features) != len(examples):
        got = list(features.shape)
        raise DataError(f"expected features [{len(examples)}, D], one row an image, got {got}")
    if not np.isfinite(features).all():
        raise DataError("expected finite features, got NaN or infinity")


def _order(examples: Sequence[Example], seed: int) -> list[int]:
    """Rows of ``examples`` in an order that only content and seed decide."""

    def key(row: int) -> tuple[bytes, str, str]:
        example = examples[row]
        drawn = hashlib.sha256(f"{seed} {example.sha256}".encode()).digest()
        return drawn, example.label or "", example.path

    return sorted(range(len(examples)), key=key)


def _without_duplicates(
    examples: Sequence[Example], order: Sequence[int]
) -> tuple[list[int], list[SetAside]]:
    first: dict[str, int] = {}
    refused = []
    for row in order:
        example = examples[row]
        kept = first.setdefault(example.sha256, row)
        if kept != row:
            reason = f"byte-identical to {examples[kept].path}"
            refused.append(SetAside(path=example.path, reason=reason))
    return list(first.values()), refused


@dataclasses.dataclass
class _Level:
    """One level of balance: the member of each example, and how many of each are chosen."""

    name: str
    members: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.int64]


class _Picker:
    """Greedy balanced k-centre selection over ``examples``, in their order among equals."""

    def __init__(
        self, examples: Sequence[Example], features: npt.NDArray[np.floating] | None
    ) -> None:
        self.examples = examples
        self._open = np.ones(len(examples), dtype=bool)
        self._features = None if features is None else features.astype(np.float64)
        self._distance = np.full(len(examples), np.inf)
        labels = [(e.label,) for e in examples]
        strata = [(e.label, e.stratum) for e in examples]
        groups = [(e.label, e.stratum, e.group) for e in examples]
        self._levels = [
            _level("class", labels),
            _level("stratum", strata),
            _level("group", groups),
        ]

    def next(self) -> int | None:
        """Row of the next candidate; None when none is left."""
        rows = np.flatnonzero(self._open)
        if not len(rows):
            return None
        for level in self._levels:
            counts = level.chosen[level.members[rows]]
            rows = rows[counts == counts.min()]
        return int(rows[np.argmax(self._distance[rows])])

    def refuse(self, row: int) -> None:
        self._open[row] = False

    def accept(self, row: int) -> str:
        """Take ``row``; return the reason why it was its turn."""
        example, distance = self.examples[row], self._distance[row]
        self._open[row] = False
        for level in self._levels:
            level.chosen[level.members[row]] += 1
        if self._features is not None:
            step = np.linalg.norm(self._features - self._features[row], axis=1)
            self._distance = np.minimum(self._distance, step)
        number = self._levels[0].chosen[self._levels[0].members[row]]
        parts = [f"number {number} of {example.label!r}" if example.label else "unlabelled"]
        parts += [f"stratum {example.stratum!r}"] if example.stratum else []
        parts += [f"group {example.group!r}"] if example.group else []
        if self._features is None:
            parts.append("in seeded order")
        elif np.isinf(distance):
            parts.append("the first")
        else:
            parts.append(f"{distance:.3g} from the nearest chosen before")
        return ", ".join(parts)


def _level(name: str, keys: Sequence[tuple[str | None, ...]]) -> _Level:
    numbers: dict[tuple[str | None, ...], int] = {}
    members = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    return _Level(name, members, np.zeros(len(numbers), dtype=np.int64))
