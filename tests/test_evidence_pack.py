"""``fieldfit collect``, and what a reader makes of a pack that is damaged or meant to harm."""

import hashlib
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from runtime.__main__ import main
from runtime.delivery.identity import device
from runtime.errors import DataError
from runtime.evidence_pack import (
    CONTENTS,
    LABELS,
    MAX_IMAGES,
    Contents,
    Record,
    open_pack,
    short,
    what_fits,
    write_pack,
)
from runtime.line.evidence_folder import Caps, EvidenceFolder, read_records
from tests.evidence_pieces import add, fill


@pytest.fixture
def folder(tmp_path: Path) -> EvidenceFolder:
    folder = EvidenceFolder(tmp_path / "state" / "evidence", Caps(reserve=0))
    fill(folder, range(3), "abstained")
    fill(folder, range(3, 5), "flagged")
    return folder


def collect(tmp_path: Path, *more: str) -> int:
    return main(["collect", "--state", str(tmp_path / "state"), *more])


def frames(path: Path) -> list[int]:
    with open_pack(path) as pack:
        for record in pack.contents.records:
            assert hashlib.sha256(pack.read(record)).hexdigest() == record.sha256
        return [int(record.frame) for record in pack.contents.records]


# --- collect


def test_collect_packs_what_is_new_and_says_what_comes_next(
    tmp_path: Path, folder: EvidenceFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect(tmp_path, "--out", str(tmp_path / "one.zip")) == 0
    said = capsys.readouterr().out
    assert "abstained       3\nflagged         2\n" in said
    assert "next: copy it to the workstation, beside the recipe, and add under [data]: " in said
    assert 'evidence = ["one.zip"]' in said
    assert frames(tmp_path / "one.zip") == [0, 1, 2, 3, 4]
    assert collect(tmp_path, "--out", str(tmp_path / "none.zip")) == 0
    assert "nothing new: all 5 images were packed before" in capsys.readouterr().out
    assert not (tmp_path / "none.zip").exists()
    add(folder, 5, "sample")
    assert collect(tmp_path, "--out", str(tmp_path / "two.zip"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "pack": str(tmp_path / "two.zip"), "images": 1, "left": 0, "reasons": {"sample": 1},
        "problems": [],
    }  # fmt: skip
    assert frames(tmp_path / "two.zip") == [5]
    assert collect(tmp_path, "--out", str(tmp_path / "all.zip"), "--all") == 0
    assert frames(tmp_path / "all.zip") == [0, 1, 2, 3, 4, 5]


def test_a_pack_says_whose_it_is_and_has_a_table_to_fill_in(
    tmp_path: Path, folder: EvidenceFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert collect(tmp_path) == 0
    (path,) = tmp_path.glob("evidence-*.zip")
    me = device(tmp_path / "state")
    with open_pack(path) as pack:
        assert (pack.contents.device, pack.contents.device_name) == (me.id, me.name)
        first = pack.contents.records[0]
    with zipfile.ZipFile(path) as archive:
        lines = archive.read(LABELS).decode().splitlines()
        assert lines[:2] == ["name,label,guess,why", f"{first.image},,,abstained"]
        assert len(lines) == 6


def test_a_device_without_evidence_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect(tmp_path) == 0
    assert "no evidence yet; fieldfit watch keeps it" in capsys.readouterr().out
    assert collect(tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 0


def test_a_pack_that_is_there_is_not_written_over(
    tmp_path: Path, folder: EvidenceFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.zip").write_bytes(b"mine")
    assert collect(tmp_path, "--out", str(tmp_path / "one.zip")) == 1
    assert "is there already, and may be the only copy" in capsys.readouterr().err
    assert (tmp_path / "one.zip").read_bytes() == b"mine"


def test_what_is_damaged_is_named_and_the_rest_is_packed(
    tmp_path: Path, folder: EvidenceFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, _), (second, _), (third, _), *_ = read_records(folder.path)[0]
    (folder.path / first.image).write_bytes(b"rotten")
    (folder.path / f"{second.image}.json").write_bytes(b"{}")
    (folder.path / third.image).unlink()  # it gave way just now: no damage
    assert collect(tmp_path, "--out", str(tmp_path / "one.zip")) == 1
    said = capsys.readouterr().err
    assert f"{first.image}: damaged since it was kept" in said
    assert f"{second.image}: expected the record of an image" in said
    assert third.image not in said
    assert frames(tmp_path / "one.zip") == [3, 4]


def test_another_folder_may_be_named(tmp_path: Path, folder: EvidenceFolder) -> None:
    moved = folder.path.rename(tmp_path / "elsewhere")
    out = tmp_path / "one.zip"
    assert main(
        ["collect", str(moved), "--state", str(tmp_path), "--out", str(out)]
    ) == 0  # fmt: skip
    assert frames(out) == [0, 1, 2, 3, 4]


def test_what_does_not_fit_into_one_pack_is_left_for_the_next() -> None:
    large = Record(
        image=f"00000001-sample-{'0' * 16}.png", sha256="0" * 64, size=60 * 2**20, why="sample",
        reasons=("sample",), time="t", source="s", frame="f", burst="b", verdict="OK",
    )  # fmt: skip
    assert len(what_fits([large] * 100)) == 68
    small = msgspec.structs.replace(large, size=10)
    assert len(what_fits([small] * (MAX_IMAGES + 1))) == MAX_IMAGES


def test_long_texts_are_cut() -> None:
    assert short("x" * 500) == "x" * 500
    assert short("x" * 501) == "x" * 499 + "…"


def test_formats_that_leave_something_to_compress_are_compressed(tmp_path: Path) -> None:
    zeros = bytes(100_000)
    records = [
        Record(
            image=f"0000000{n}-sample-{'0' * 16}{suffix}", sha256=hashlib.sha256(zeros).hexdigest(),
            size=len(zeros), why="sample", reasons=("sample",), time="t", source="s", frame=str(n),
            burst="b", verdict="OK",
        )
        for n, suffix in enumerate([".bmp", ".png"])
    ]  # fmt: skip
    contents = Contents(device="d", device_name="n", made="t", records=tuple(records))
    write_pack(tmp_path / "p.zip", contents, lambda _: zeros)
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        sizes = [archive.getinfo(record.image).compress_size for record in records]
    assert sizes[0] < 1000 < sizes[1] == len(zeros)
    assert frames(tmp_path / "p.zip") == [0, 1]


# --- hostile packs


@pytest.fixture
def pack(tmp_path: Path, folder: EvidenceFolder) -> Path:
    assert collect(tmp_path, "--out", str(tmp_path / "good.zip")) == 0
    return tmp_path / "good.zip"


Members = list[tuple[zipfile.ZipInfo, bytes]]


def members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def changed(name: str, data: bytes) -> Callable[[Members], Members]:
    return lambda found: [(i, data if i.filename == name else old) for i, old in found]


def contents(**changes: object) -> Callable[[Members], Members]:
    """The first record, changed."""

    def change(found: Members) -> Members:
        head = json.loads({i.filename: d for i, d in found}[CONTENTS])
        head["records"][0].update(changes)
        return changed(CONTENTS, json.dumps(head).encode())(found)

    return change


def added(name: str, data: bytes = b"x") -> Callable[[Members], Members]:
    return lambda found: [*found, (zipfile.ZipInfo(name), data)]


def renamed(name: str) -> Callable[[Members], Members]:
    """The first image has another name, in its record too."""

    def change(found: Members) -> Members:
        (_, data), *rest = found
        return contents(image=name)([*rest, (zipfile.ZipInfo(name), data)])

    return change


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (added("../../evil.png"), "is no name that evidence has"),
        (added("/etc/cron.d/evil"), "is no name that evidence has"),
        (added("00000009-sample-0000000000000000.png/"), "is no name that evidence has"),
        (renamed("../00000001-sample-0000000000000000.png"), "is no name that evidence has"),
        (added(f"00000009-sample-{'0' * 16}.png"), "its images are not those of its records"),
        (lambda found: found[1:], "its images are not those of its records"),
        (lambda found: [m for m in found if m[0].filename != CONTENTS], "each once"),
        (changed(CONTENTS, b"{"), "damaged or of another version"),
        (changed(CONTENTS, b'{"format": 2}'), "damaged or of another version"),
        (changed(CONTENTS, b"[" * 100_000), "damaged or of another version"),
        (contents(size=2**40), "damaged or of another version"),
        (contents(size=1), "more than 1 bytes"),
        (contents(size=101), "is not as it was packed"),
        (contents(sha256="0" * 64), "is not as it was packed"),
        (contents(why="because"), "damaged or of another version"),
        (contents(source="x" * 501), "damaged or of another version"),
        (contents(command="rm"), "damaged or of another version"),
    ],
)
def test_a_pack_with_anything_wrong_is_refused(
    tmp_path: Path, pack: Path, harm: Callable[[Members], Members], says: str
) -> None:
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        for info, data in harm(members(pack)):
            archive.writestr(info, data)
    with pytest.raises(DataError, match=says):
        frames(bad)


def test_twice_the_same_name_is_refused(tmp_path: Path, pack: Path) -> None:
    with zipfile.ZipFile(pack, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(CONTENTS, b"{}")
    with pytest.raises(DataError, match="each once"):
        frames(pack)


def test_other_ways_to_compress_are_refused(tmp_path: Path, pack: Path) -> None:
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        for info, data in members(pack):
            archive.writestr(zipfile.ZipInfo(info.filename), data, zipfile.ZIP_LZMA)
    with pytest.raises(DataError, match="compressed in a way that packs are not"):
        frames(bad)


def test_a_bomb_takes_no_memory(tmp_path: Path, pack: Path) -> None:
    bad = tmp_path / "bad.zip"
    (bomb, _), *rest = members(pack)
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(bomb.filename, bytes(2**28))
        for info, data in rest:
            archive.writestr(info, data)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than 100 bytes"):
            frames(bad)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("place", "kind", "value"),
    [(10, "<H", 65535), (12, "<L", 2**31), (16, "<L", 2**31)],
    ids=["number of members", "size of their list", "where it begins"],
)
def test_a_list_of_members_of_any_size_is_refused_before_it_is_read(
    pack: Path, place: int, kind: str, value: int
) -> None:
    data = bytearray(pack.read_bytes())
    struct.pack_into(kind, data, len(data) - 22 + place, value)
    pack.write_bytes(data)
    with pytest.raises(DataError, match=r"expected at most 20,000 images"):
        frames(pack)


def test_the_extension_for_large_files_is_refused(pack: Path) -> None:
    data = pack.read_bytes()
    locator = b"PK\x06\x07" + bytes(16)
    pack.write_bytes(data[:-22] + locator + data[-22:])
    with pytest.raises(DataError, match="got no zip, or a part of one"):
        frames(pack)


def test_what_is_no_pack_at_all_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"PK", bytes(1000), b"name,label\n" * 100):
        (tmp_path / "p.zip").write_bytes(data)
        with pytest.raises(DataError, match="expected a pack of evidence"):
            frames(tmp_path / "p.zip")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        frames(tmp_path / "missing.zip")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        frames(tmp_path)


def test_a_pack_that_was_cut_short_or_had_bytes_flipped_is_refused_or_whole(
    tmp_path: Path, pack: Path
) -> None:
    good, expected = pack.read_bytes(), frames(pack)
    random = np.random.default_rng(0)
    refused = 0
    for number in range(1500):
        data = bytearray(good)
        if number % 5 == 0:
            del data[int(random.integers(len(data))) :]
        for place in random.integers(len(data) or 1, size=number % 3 + 1) if data else []:
            data[place] ^= 1 << random.integers(8)
        pack.write_bytes(data)
        try:
            assert frames(pack) == expected
        except DataError:
            refused += 1
    assert refused > 750
