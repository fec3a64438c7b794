"""The batches of a training: which images each step sees, and how they are turned.

Every step is a function of the seed and its number alone, so that a run can go on from any step,
in any number of loading processes. It does not know what is minimised.
"""

import functools
import itertools
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from runtime.recipe import Augmentation
from train import distributed
from train.degradations import field_photo
from train.device import Device, cores
from train.objective import SOURCE, Batch

Ints = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Images = npt.NDArray[Any]

WORKERS = 4
"""Loading processes beside a GPU, at most; on a CPU they would take the cores that train."""

_MOVES, _ORDER, _PHOTOS = 1, 3, 2  # streams of random numbers, each of its own


class Group(NamedTuple):
    """Images of one kind; each batch has ``share`` of them."""

    name: str
    domain: int
    """SOURCE or TARGET."""
    rows: Ints
    """``[N]`` into the array of all images."""
    labels: Ints
    """``[N]``, -1 where unknown."""
    weights: Float32
    """``[N]``, of mean 1: what each image counts among its like."""
    teacher: Float32 | None
    """Logits ``[N, K]`` that are to be kept."""
    share: int


class Drawn(NamedTuple):
    """This process's part of one step, before anything is done on the device; ``[b, ...]``."""

    images: Tensor
    labels: Tensor
    domains: Tensor
    weights: Tensor
    teacher: Tensor
    moves: Tensor
    """int64 ``[b, M]``: how often each of the M augmentations is applied."""
    photos: Tensor
    """int64 ``[b]``: the seed of a simulated field photo, -1 for none."""


class Store(Protocol):
    """Where images come from: pixels, or what frozen stages made of them."""

    moved: bool
    """Whether they come as augmented as ``moves`` says."""

    def read(self, rows: Ints, moves: Ints) -> Images:
        """One image for each row."""
        ...


class Shared:
    """An array on disk that another process opens itself, rather than being sent its content."""

    def __init__(self, array: Images) -> None:
        self.array = array

    def __getitem__(self, rows: Ints) -> Images:
        return np.asarray(self.array[rows])

    def __reduce__(self) -> tuple[object, ...]:
        array = self.array
        if not isinstance(array, np.memmap):
            return Shared, (array,)
        return _reopened, (array.filename, array.dtype.str, array.offset, array.shape)


def _reopened(path: str, dtype: str, offset: int, shape: tuple[int, ...]) -> Shared:
    return Shared(np.memmap(path, dtype, "r", offset, shape))


class Pictures:
    """Pixels ``[M, H, W, C]``, usually a memory map: each batch reads what it needs."""

    moved = False

    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        self.pixels = Shared(pixels)

    def read(self, rows: Ints, moves: Ints) -> Images:
        return self.pixels[rows]


class Steps(Dataset[Drawn]):
    """Item ``step`` is this process's part of that step's batch; of several the parts are dealt
    out image by image, so that they differ by one image at most."""

    def __init__(
        self,
        groups: Sequence[Group],
        store: Store,
        *,
        augment: tuple[Augmentation, ...],
        square: bool,
        degrade: float,
        classes: int,
        seed: int,
    ) -> None:
        self.groups, self.store, self.seed = groups, store, seed
        self.augment = augment
        self.options = [_options(kind, square) for kind in augment]
        self.degrade, self.classes = degrade, classes
        self.part = slice(distributed.rank(), None, distributed.size())

    def __getitem__(self, step: int) -> Drawn:
        drawn = [
            (group, _members(self.seed, number, len(group.rows), step * group.share, group.share))
            for number, group in enumerate(self.groups)
        ]

        def join(values: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
            return np.concatenate(values)[self.part]

        domains = np.concatenate([np.full(len(at), group.domain) for group, at in drawn])
        moves = self._moves(step, len(domains))[self.part]
        rows = join([group.rows[at] for group, at in drawn])
        return Drawn(
            images=torch.from_numpy(self.store.read(rows.astype(np.int64), moves)),
            labels=torch.from_numpy(join([group.labels[at] for group, at in drawn])),
            domains=torch.from_numpy(domains[self.part]),
            weights=torch.from_numpy(join([group.weights[at] for group, at in drawn])),
            teacher=torch.from_numpy(join([self._teacher(group, at) for group, at in drawn])),
            moves=torch.from_numpy(moves),
            photos=torch.from_numpy(self._photos(step, domains)[self.part]),
        )

    def _teacher(self, group: Group, at: Ints) -> Float32:
        if group.teacher is None:
            return np.full((len(at), self.classes), np.nan, dtype=np.float32)
        return group.teacher[at]

    def _moves(self, step: int, count: int) -> Ints:
        random = np.random.default_rng((self.seed, _MOVES, step))
        return random.integers(0, self.options, (count, len(self.options)))

    def _photos(self, step: int, domains: Ints) -> Ints:
        random = np.random.default_rng((self.seed, _PHOTOS, step))
        coins, seeds = random.random(len(domains)), random.integers(0, 2**60, len(domains))
        return np.where((coins < self.degrade) & (domains == SOURCE), seeds, -1)


def load(steps: Steps, first: int, end: int, device: Device) -> DataLoader[Drawn]:
    """The steps from ``first`` to ``end``, made ahead by other processes if there is a GPU."""
    on_gpu = device.kind == "cuda"
    return DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, end),
        num_workers=min(WORKERS, cores()) if on_gpu else 0,
        pin_memory=on_gpu,
        worker_init_fn=_leave_interrupts_to_the_loop,
    )


def _leave_interrupts_to_the_loop(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_batch(drawn: Drawn, steps: Steps, device: Device) -> Batch:
    """What ``steps`` have drawn on the device, turned and degraded there."""
    on = Drawn(*(tensor.to(device.torch, non_blocking=True) for tensor in drawn))
    images = on.images
    if steps.store.moved:
        # Channels last on disk as in memory; float32 unless autocast wants it otherwise.
        images = images.float().permute(0, 3, 1, 2)
    else:
        images = move(images, steps.augment, on.moves)
        photos = torch.nonzero(drawn.photos >= 0).flatten()
        if len(photos):
            images = images.clone()
            images[photos] = field_photo(images[photos], drawn.photos[photos])
    return Batch(images, on.labels, on.domains, on.weights, on.teacher)


def move(images: Tensor, kinds: tuple[Augmentation, ...], moves: Tensor) -> Tensor:
    """Flip and turn each image of ``[N, H, W, C]`` as its row of ``moves [N, M]`` says."""
    for kind, times in zip(kinds, moves.T, strict=True):
        if kind == "rotate-90":
            turned = torch.stack([torch.rot90(images, quarters, (1, 2)) for quarters in range(4)])
            images = turned[times, torch.arange(len(images), device=images.device)]
        else:
            axis = 2 if kind == "flip-horizontal" else 1
            images = torch.where(times[:, None, None, None] > 0, images.flip(axis), images)
    return images


def variants(kinds: tuple[Augmentation, ...], *, square: bool) -> tuple[Ints, dict[bytes, int]]:
    """The different pictures that augmentation can make of one.

    Returns moves ``[V, M]``, one row for each, and the number of the picture by the bytes of any
    row of moves: two flips are half a turn, so that several rows can make the same.
    """
    corners = torch.arange(4).reshape(1, 2, 2, 1)
    pictures: dict[bytes, int] = {}
    numbers: dict[bytes, int] = {}
    chosen: list[Ints] = []
    for times in itertools.product(*(range(_options(kind, square)) for kind in kinds)):
        row = np.array(times, dtype=np.int64)
        picture = move(corners, kinds, torch.from_numpy(row[None])).numpy().tobytes()
        if picture not in pictures:
            pictures[picture] = len(pictures)
            chosen.append(row)
        numbers[row.tobytes()] = pictures[picture]
    return np.stack(chosen), numbers


def _options(kind: Augmentation, square: bool) -> int:
    if kind == "rotate-90":
        return 4 if square else 1  # turning would change the shape
    return 2


def _members(seed: int, group: int, count: int, start: int, share: int) -> Ints:
    """``share`` places in a group of ``count``, from ``start`` in its endless stream of
    permutations: every image is seen as often as any other, give or take once."""
    taken = []
    while share:
        turn, offset = divmod(start, count)
        part = _permutation(seed, group, turn, count)[offset : offset + share]
        taken.append(part)
        start, share = start + len(part), share - len(part)
    return np.concatenate(taken)


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, group: int, turn: int, count: int) -> Ints:
    return np.random.default_rng((seed, _ORDER, group, turn)).permutation(count)
