"""The list of images that one recipe uses: written by train, read by calibration and export.

It does not know where images come from (train/domains) nor how they are split (train/splits).
"""

import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from runtime import atomic
from runtime.errors import DataError

Domain = Literal["source", "target"]
Split = Literal["train", "validation", "test"]


class Example(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One image of a domain."""

    path: str
    sha256: str
    """Digest of the file's bytes; splits and caches are keyed by it, never by the path."""
    domain: Domain
    label: str | None = None
    """Class name; None where it is unknown (target only)."""
    group: str | None = None
    """Part, module or camera burst; members never straddle splits."""
    stratum: str | None = None
    """What to balance the splits by, when that is finer than the label."""
    split: Split = "train"


class SetAside(msgspec.Struct, frozen=True, kw_only=True):
    """An image that could not be used, and why."""

    path: str
    reason: str


class Dataset(msgspec.Struct, frozen=True, kw_only=True):
    """Every image of a recipe with its domain, label and split."""

    classes: tuple[str, ...]
    """Class names in the order of the model's outputs: sorted."""
    examples: tuple[Example, ...]
    set_aside: tuple[SetAside, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Paths of byte-identical images, a tuple for each picture that occurs more than once."""
    field: Domain = "target"
    """The domain that calibration and gate judge by: the source if the recipe has no target."""

    def select(self, domain: Domain, split: Split) -> tuple[Example, ...]:
        """The examples of one domain and split, in the order of the list."""
        return tuple(e for e in self.examples if e.domain == domain and e.split == split)

    def label_index(self, example: Example) -> int:
        """Index of the example's class, -1 if its label is unknown."""
        return -1 if example.label is None else self.classes.index(example.label)

    @property
    def sha256(self) -> str:
        """Digest of content, labels and splits; paths do not count."""
        digest = hashlib.sha256(msgspec.json.encode(self.classes))
        for line in sorted(f"{e.domain} {e.split} {e.label} {e.sha256}" for e in self.examples):
            digest.update(line.encode())
        return digest.hexdigest()


def write_dataset(path: Path, dataset: Dataset) -> None:
    """Write ``dataset`` as readable JSON, atomically."""
    atomic.write_bytes(path, msgspec.json.format(msgspec.json.encode(dataset), indent=1))


def read_dataset(path: Path) -> Dataset:
    """Read what write_dataset wrote.

    Raises DataError if the file is missing (train has not run) or is not such a list.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Dataset)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no list of images; run `python -m train RECIPE` first") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise DataError(f"{path}: not a list of images: {error}") from error
