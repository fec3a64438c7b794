"""``[data] evidence``: packs become field images, and nothing else changes its place."""

import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runtime.dataset import Dataset, Example
from runtime.errors import DataError, RecipeError
from runtime.evidence_pack import Contents, Record, write_pack
from runtime.recipe import DataSettings, Recipe, load_recipe, parse_recipe
from tests.conftest import draw
from train.data import prepare

WriteDomain = Callable[..., Path]
COUNTS = {"bad": 30, "good": 30}


@pytest.fixture
def places(tmp_path: Path, pictures: WriteDomain) -> dict[str, Any]:
    source = pictures(tmp_path / "source", COUNTS)
    target = pictures(tmp_path / "target", COUNTS, first=1000)
    return {"source": str(source), "target": str(target)}


def prepared(tmp_path: Path, places: dict[str, Any], *packs: Path, **data: Any) -> Dataset:
    settings = DataSettings(**places, evidence=tuple(map(str, packs)), **data)
    return prepare(Recipe(name="t", data=settings, seed=3), cache=tmp_path / "cache")


def pack(
    path: Path, numbers: Sequence[int], *, labels: dict[int, str] | None = None,
    burst: Callable[[int], str] = str, device: str = "d",
) -> Path:  # fmt: skip
    """A pack of the pictures ``numbers``, even ones of class bad and odd ones good, with labels."""
    images: dict[str, bytes] = {}
    records, rows = [], ["name,label"]
    for position, number in enumerate(numbers, start=1):
        data = encoded(number)
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{position:08}-sample-{sha256[:16]}.png"
        images[name] = data
        rows.append(f"{name},{(labels or {}).get(number, '')}")
        records.append(
            Record(
                image=name, sha256=sha256, size=len(data), why="sample", reasons=("sample",),
                time="t", source="cam", frame=str(number), burst=burst(number), verdict="OK",
            )
        )  # fmt: skip
    contents = Contents(device=device, device_name="n", made="t", records=tuple(records))
    write_pack(path, contents, lambda record: images[record.image])
    if labels is not None:
        path.with_suffix(".csv").write_text("\n".join(rows) + "\n")
    return path


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    draw(number % 2, number).save(file, "PNG")
    return file.getvalue()


def without(dataset: Dataset, names: set[str]) -> list[Example]:
    return [e for e in dataset.examples if e.sha256 not in names]


def digests(numbers: Sequence[int]) -> set[str]:
    return {hashlib.sha256(encoded(n)).hexdigest() for n in numbers}


def truth(numbers: Sequence[int]) -> dict[int, str]:
    return {n: ("bad", "good")[n % 2] for n in numbers}


@pytest.mark.parametrize("more", [{}, {"limit": 40}, {"labels": 7}])
def test_a_pack_moves_no_other_image_and_none_of_its_own_into_the_test(
    tmp_path: Path, places: dict[str, Any], more: dict[str, int]
) -> None:
    first, second = range(5000, 5040), range(6000, 6025)
    one = pack(tmp_path / "one.zip", first, labels=truth(first[:20]))
    two = pack(tmp_path / "two.zip", second)
    before = prepared(tmp_path, places, **more)
    with_one = prepared(tmp_path, places, one, **more)
    with_two = prepared(tmp_path, places, two, one, **more)
    assert without(with_one, digests(first)) == list(before.examples)
    assert without(with_two, digests(second)) == list(with_one.examples)
    mine = [e for e in with_one.examples if e.sha256 in digests(first)]
    assert len(mine) == 40
    assert {e.domain for e in mine} == {"target"}
    splits = Counter(e.split for e in mine)
    assert set(splits) == {"train", "validation"}
    assert 2 <= splits["validation"] <= 16
    assert Counter(e.label for e in mine) == {"bad": 10, "good": 10, None: 20}
    assert before.select("target", "test") == with_two.select("target", "test")
    for example in mine:
        data = Path(example.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == example.sha256


def test_another_seed_places_it_otherwise(tmp_path: Path, places: dict[str, Any]) -> None:
    one = pack(tmp_path / "one.zip", range(5000, 5040))
    data = DataSettings(**places, evidence=(str(one),))
    splits = []
    for seed in (0, 1):
        dataset = prepare(Recipe(name="t", data=data, seed=seed), cache=tmp_path / "cache")
        mine = digests(range(5000, 5040))
        splits.append({e.sha256: e.split for e in dataset.examples if e.sha256 in mine})
    assert splits[0] != splits[1]


def test_frames_of_one_burst_stay_together_and_those_of_two_devices_need_not(
    tmp_path: Path, places: dict[str, Any]
) -> None:
    one = pack(tmp_path / "one.zip", range(5000, 5100), burst=lambda n: str(n // 5))
    dataset = prepared(tmp_path, places, one)
    splits: dict[str, set[str]] = {}
    for example in dataset.examples:
        if example.group:
            splits.setdefault(example.group, set()).add(example.split)
    assert len(splits) == 20
    assert all(len(found) == 1 for found in splits.values())
    other = pack(tmp_path / "two.zip", [7001], burst=lambda n: "1000", device="e")
    groups = {e.group for e in prepared(tmp_path, places, one, other).examples}
    assert {"evidence d cam 1000", "evidence e cam 1000"} <= groups


def test_what_the_recipe_has_anyway_stays_what_it_was(
    tmp_path: Path, places: dict[str, Any]
) -> None:
    """Also images of the test that a pack brings with a label: no leak, no new label."""
    before = prepared(tmp_path, places)
    folder = Path(places["target"])
    for file in sorted(folder.glob("*/*.png"))[:4]:  # unlabelled from now on
        file.rename(folder / f"{file.parent.name}-{file.name}")
    unlabelled = prepared(tmp_path, places)
    numbers = [n for n in range(1000, 1030) if n % 2]  # as in the folder of good ones
    again = pack(tmp_path / "again.zip", numbers, labels=truth(numbers))
    assert digests(numbers) <= {e.sha256 for e in before.examples}
    dataset = prepared(tmp_path, places, again)
    assert dataset.examples == unlabelled.examples
    assert len(dataset.duplicates) == len(numbers)


def test_the_same_image_in_two_packs_is_one_and_its_label_counts(
    tmp_path: Path, places: dict[str, Any]
) -> None:
    one = pack(tmp_path / "one.zip", [5001, 5002])
    two = pack(tmp_path / "two.zip", [5001, 5003], labels={5001: "good"}, device="e")
    dataset = prepared(tmp_path, places, one, two)
    (mine,) = [e for e in dataset.examples if e.sha256 in digests([5001])]
    assert mine.label == "good"
    contradiction = pack(tmp_path / "three.zip", [5001], labels={5001: "bad"})
    with pytest.raises(DataError, match="are the same image with different labels"):
        prepared(tmp_path, places, two, contradiction)


def test_no_labels_means_none_for_training(tmp_path: Path, places: dict[str, Any]) -> None:
    numbers = range(5000, 5040)
    one = pack(tmp_path / "one.zip", numbers, labels=truth(numbers))
    dataset = prepared(tmp_path, places, one, labels=0)
    assert {e.label for e in dataset.select("target", "train")} == {None}
    assert None not in {e.label for e in dataset.select("target", "validation")}


def test_without_another_target_packs_are_the_field_and_test_it_too(
    tmp_path: Path, places: dict[str, Any]
) -> None:
    source = {"source": places["source"]}
    first, second = range(5000, 5060), range(6000, 6010)
    one = pack(tmp_path / "one.zip", first, labels=truth(first))
    two = pack(tmp_path / "two.zip", second)
    dataset = prepared(tmp_path, source, one)
    assert dataset.field == "target"
    splits = Counter(e.split for e in dataset.examples if e.domain == "target")
    assert min(splits[name] for name in ("train", "validation", "test")) > 3
    both = prepared(tmp_path, source, one, two)
    assert without(both, digests(second)) == list(dataset.examples)
    few = pack(tmp_path / "few.zip", [5001])
    with pytest.raises(DataError, match=r"target: no image of 1 is in the \w+ split; add images"):
        prepared(tmp_path, source, few)


def test_a_simulated_target_takes_evidence_as_well(tmp_path: Path, places: dict[str, Any]) -> None:
    numbers = range(5000, 5010)
    one = pack(tmp_path / "one.zip", numbers, labels=truth(numbers))
    simulated = {"source": places["source"], "target": "simulated"}
    before, after = prepared(tmp_path, simulated), prepared(tmp_path, simulated, one)
    assert without(after, digests(numbers)) == list(before.examples)
    assert len(after.examples) == len(before.examples) + 10


# --- labels


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected the columns name,label.*got nothing"),
        ("name;label\n", "expected the columns name,label"),
        ("name,label,lable\n", "expected the columns name,label"),
        ("name,label\nNAME\n", r"one\.csv:2: expected 2 cells"),
        ("name,label\nX.png,good\n", r"one\.csv:2: 'X\.png' is no image of one\.zip"),
        (
            "name,label\nNAME,good\nNAME,bad\n",
            r"csv:3: .* is labelled 'bad' here and 'good' else",
        ),
        ("name,label\nNAME,godo\n", r"'godo' \(did you mean 'good'\?\)"),
        ('name,label\n"NAME,good\n', "expected UTF-8 text with commas"),
        ("name,label\nNAME,\xff\n", None),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(
    tmp_path: Path, places: dict[str, Any], text: str, says: str | None
) -> None:
    one = pack(tmp_path / "one.zip", [5001])
    name = f"00000001-sample-{min(digests([5001]))[:16]}.png"
    data = text.replace("NAME", name).encode("latin-1")
    one.with_suffix(".csv").write_bytes(data)
    with pytest.raises(DataError, match=says or "expected UTF-8 text"):
        prepared(tmp_path, places, one)


def test_the_pack_s_own_table_filled_in_by_a_spreadsheet_is_read(
    tmp_path: Path, places: dict[str, Any]
) -> None:
    one = pack(tmp_path / "one.zip", [5001, 5002])
    names = [f"{p:08}-sample-{min(digests([n]))[:16]}.png" for p, n in ((1, 5001), (2, 5002))]
    rows = f"name,label,guess,why\r\n{names[0]}, good ,bad,sample\r\n{names[1]},,bad,sample\r\n"
    one.with_suffix(".csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    dataset = prepared(tmp_path, places, one)
    labels = {e.sha256: e.label for e in dataset.examples}
    assert [labels[min(digests([n]))] for n in (5001, 5002)] == ["good", None]


def test_unpacked_images_that_were_sorted_into_folders_are_labelled(
    tmp_path: Path, places: dict[str, Any]
) -> None:
    numbers = (5001, 5002, 5003)
    one = pack(tmp_path / "one.zip", numbers)
    with zipfile.ZipFile(one) as archive:
        archive.extractall(tmp_path / "one")
    first, second, _ = sorted((tmp_path / "one").glob("*.png"))
    for file, label in ((first, "good"), (second, "bad")):
        (tmp_path / "one" / label).mkdir()
        file.rename(tmp_path / "one" / label / file.name)
    (tmp_path / "one" / "bad" / "Thumbs.db").touch()
    (tmp_path / "one" / "bad" / second.name).write_bytes(b"nobody reads these bytes")
    labels = {e.sha256: e.label for e in prepared(tmp_path, places, one).examples}
    assert [labels[min(digests([n]))] for n in numbers] == ["good", "bad", None]
    (tmp_path / "one" / "bad" / first.name).touch()
    with pytest.raises(DataError, match=r"is labelled 'good' here and 'bad' elsewhere"):
        prepared(tmp_path, places, one)
    (tmp_path / "one" / "bad" / first.name).rename(
        tmp_path / "one" / "bad" / first.name.replace("1-", "7-", 1)
    )
    with pytest.raises(DataError, match=r"is no image of one\.zip; did you mean"):
        prepared(tmp_path, places, one)


# --- packs


def test_a_damaged_pack_is_an_error_that_names_it(tmp_path: Path, places: dict[str, Any]) -> None:
    one = pack(tmp_path / "one.zip", [5001])
    one.write_bytes(one.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"one\.zip: expected a pack of evidence"):
        prepared(tmp_path, places, one)


def test_an_unpacked_image_that_was_damaged_is_unpacked_again(
    tmp_path: Path, places: dict[str, Any]
) -> None:
    one = pack(tmp_path / "one.zip", [5001])
    dataset = prepared(tmp_path, places, one)
    (mine,) = [e for e in dataset.examples if e.sha256 in digests([5001])]
    Path(mine.path).write_bytes(b"rotten")
    assert prepared(tmp_path, places, one) == dataset
    with Image.open(mine.path) as image:
        image.load()


def test_packs_are_named_relative_to_the_recipe(tmp_path: Path) -> None:
    text = 'name = "t"\n[data]\nsource = "clean"\ntarget = "field"\nevidence = ["line3.zip"]\n'
    (tmp_path / "t.toml").write_text(text)
    assert load_recipe(tmp_path / "t.toml").data.evidence == (str(tmp_path / "line3.zip"),)
    with pytest.raises(RecipeError, match=r"\[data\.evidence\]: expected a list, got 'a\.zip'"):
        parse_recipe('name = "t"\n[data]\nsource = "s"\nevidence = "a.zip"\n', "t.toml")
