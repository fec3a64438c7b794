"""Evidence from the line as more field images: packs are checked, unpacked, and given a split.

It does not know which splits the other images get: whatever a pack brings, they stay where they
were. A pack is what ``fieldfit collect`` writes. Its images have the labels that somebody gave them
beside it, under its name: ``line3.csv`` with ``name,label``, or ``line3/CLASS/IMAGE``, where they
were unpacked and sorted. Images without one join unlabelled; bytes are always the pack's.
"""

import csv
import difflib
import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from runtime import atomic
from runtime.dataset import Example, Split
from runtime.errors import DataError
from runtime.evidence_pack import LABEL_COLUMNS, NAME, Pack, Record, open_pack
from runtime.recipe import Recipe, Splits
from train.domains import Candidate

_REQUIRED = LABEL_COLUMNS[:2]


def list_evidence(places: Sequence[str], folder: Path) -> tuple[Candidate, ...]:
    """The images of the packs at ``places``, unpacked into ``folder`` under names of their content.

    Raises DataError if a pack is damaged, or its labels are none of its images'.
    """
    return tuple(one for place in places for one in _list_pack(Path(place), folder.absolute()))


def place_evidence(
    candidates: Sequence[Candidate], others: Collection[str], recipe: Recipe
) -> list[Example]:
    """Examples of ``candidates``, each in a split that its burst and the seed alone decide.

    Training and validation by their shares; testing too only where the recipe has no other field
    images, so that a test stays the one it was. ``others`` are digests of images that the recipe
    has anyway: those stay what they are. Of identical images one is kept, the labelled if any is.
    """
    data = recipe.data
    kept: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: (c.label is None, c.group or "", c.path)):
        if candidate.sha256 not in others:
            kept.setdefault(candidate.sha256, candidate)
    examples = []
    for sha256, candidate in sorted(kept.items()):
        split = _split(candidate.group or "", data.splits, recipe.seed, data.target is None)
        hidden = data.labels == 0 and split == "train"
        examples.append(
            Example(
                path=candidate.path,
                sha256=sha256,
                domain="target",
                label=None if hidden else candidate.label,
                group=candidate.group,
                split=split,
            )
        )
    return examples


def _split(group: str, shares: Splits, seed: int, with_test: bool) -> Split:
    drawn = hashlib.sha256(f"evidence {seed} {group}".encode()).digest()
    share = int.from_bytes(drawn[:8], "big") / 2**64
    total = 1.0 if with_test else shares.train + shares.validation
    if share * total < shares.train:
        return "train"
    return "validation" if share * total < shares.train + shares.validation else "test"


def _list_pack(path: Path, folder: Path) -> list[Candidate]:
    with open_pack(path) as pack:
        labels = _read_labels(path, pack)
        return [
            Candidate(
                path=str(_unpacked(pack, record, folder)),
                domain="target",
                label=labels.get(record.image),
                group=f"evidence {pack.contents.device} {record.source} {record.burst}",
            )
            for record in pack.contents.records
        ]


def _unpacked(pack: Pack, record: Record, folder: Path) -> Path:
    data = pack.read(record)
    path = folder / f"{record.sha256[:32]}{Path(record.image).suffix}"
    if not (path.is_file() and path.read_bytes() == data):
        atomic.write_bytes(path, data)
    return path


def _read_labels(path: Path, pack: Pack) -> dict[str, str]:
    """Labels of the images of the pack at ``path``, by name."""
    names = {record.image for record in pack.contents.records}
    table, folder = path.with_suffix(".csv"), path.with_suffix("")
    labels: dict[str, str] = {}
    for place, name, label in (*_from_table(table), *_from_folder(folder)):
        if name not in names:
            close = difflib.get_close_matches(name, sorted(names), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise DataError(f"{place}: {name!r} is no image of {path.name}{hint}")
        if label and labels.setdefault(name, label) != label:
            raise DataError(
                f"{place}: {name} is labelled {label!r} here and {labels[name]!r} elsewhere; keep "
                "one of the two"
            )
    return labels


def _from_folder(path: Path) -> Iterator[tuple[str, str, str]]:
    """Place, name and label of each image that was sorted into the folder of its class."""
    for file in sorted(path.glob("*/*")) if path.is_dir() else ():
        if NAME.fullmatch(file.name):  # file managers leave files of their own
            yield str(file), file.name, file.parent.name


def _from_table(path: Path) -> Iterator[tuple[str, str, str]]:
    """Place, name and label of each line of the table, if there is one."""
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: expected UTF-8 text with commas: {error}") from error
    header = rows[0][1] if rows else []
    if not set(_REQUIRED) <= set(header) <= set(LABEL_COLUMNS) or len(set(header)) != len(header):
        raise DataError(
            f"{path}: expected the columns {','.join(_REQUIRED)}, as in labels.csv of the pack, "
            f"got {','.join(header) or 'nothing'}"
        )
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(f"{path}:{line}: expected {len(header)} cells, got {row}")
        cells = dict(zip(header, row, strict=True))
        yield f"{path}:{line}", cells["name"], cells["label"]
