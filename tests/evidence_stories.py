"""Keeping, making room and collecting, interrupted at every call that changes files.

``python -m tests.evidence_stories MODE FOLDER``, which ``test_evidence`` starts, prints how many
calls each has, or fails at the first thing that is not as it must be.
"""

import contextlib
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from runtime.__main__ import main
from runtime.evidence_pack import open_pack
from runtime.line.evidence_folder import (
    Caps,
    EvidenceFolder,
    read_image,
    read_records,
)
from tests.crashes import Mode, rounds
from tests.evidence_pieces import add, fill

CAPS = Caps(files=3, reserve=0)


def keep(work: Path) -> None:
    add(EvidenceFolder(work / "evidence", CAPS), 99, "abstained")


def collect(work: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(["collect", "--state", str(work), "--out", str(work / "pack.zip")])
    if code:
        raise OSError("refused")


def tell(pieces: int, act: Callable[[Path], None], mode: Mode, folder: Path) -> int:
    """Interrupt it everywhere, look each time, and return the number of calls."""
    template, work = folder / "template", folder / "work"
    fill(EvidenceFolder(template / "evidence", CAPS), range(pieces), "sample")

    def prepare() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(template, work)

    count = 0
    for ended in rounds(mode, prepare, lambda: act(work)):
        count = ended.call
        where = f"{mode} call {count}: {ended.message}"
        look(work, pieces, where)
        EvidenceFolder(work / "evidence", CAPS)  # the next start
        look(work, pieces, where)
        files = [file.name for file in (work / "evidence").iterdir()]
        records, _ = read_records(work / "evidence")
        assert len(files) == 2 * len(records), f"{where}: {files}"
        if mode == "full" and act is keep and ended.message:
            assert [record.frame for record, _ in records if record.frame == "99"] == [], where
    return count


def look(work: Path, pieces: int, where: str) -> None:
    """No record is without its whole image, and what is marked as packed is in the pack."""
    records, damaged = read_records(work / "evidence")
    assert not damaged, where
    assert len(records) >= min(pieces, CAPS.files - 1), where
    packed = {record.image for record, packed in records if packed}
    if packed:
        with open_pack(work / "pack.zip") as pack:
            inside = {record.image for record in pack.contents.records if pack.read(record)}
        assert packed <= inside, where
    for record, _ in records:
        assert read_image(work / "evidence", record) is not None, where


if __name__ == "__main__":
    modes: dict[str, Mode] = {mode: mode for mode in get_args(Mode)}
    stories: list[tuple[int, Callable[[Path], None]]] = [
        (0, keep),
        (1, keep),
        (3, keep),
        (2, collect),
    ]
    for number, (pieces, act) in enumerate(stories):
        place = Path(sys.argv[2], str(number))
        place.mkdir()
        with (
            contextlib.redirect_stderr(io.StringIO())
            if act is collect
            else contextlib.nullcontext()
        ):
            calls = tell(pieces, act, modes[sys.argv[1]], place)
        print(calls)
