"""Reading domains, and the data set that training gets from two of them."""

import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from runtime.errors import DataError
from runtime.recipe import DataSettings, Recipe, parse_recipe
from train import domains
from train.data import prepare
from train.domains import Listing, check_images, list_domain

WriteDomain = Callable[..., Path]


def recipe(source: Path | str, target: Path | str | None = None, **data: Any) -> Recipe:
    place = None if target is None else str(target)
    return Recipe(name="test", data=DataSettings(source=str(source), target=place, **data))


def write_csv(folder: Path, text: str, encoding: str = "utf-8") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "list.csv").write_text(text, encoding=encoding)
    return str(folder / "list.csv")


def names(listing: Listing) -> list[tuple[str, str | None]]:
    return [(Path(c.path).name, c.label) for c in listing.candidates]


# --- folder


def test_the_class_is_the_first_folder(tmp_path: Path) -> None:
    for name in ("good/a.png", "good/line 2/shift/b.JPG", "bad/c.tiff", "bad/.hidden.png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "bad" / "notes.txt").touch()
    (tmp_path / "good" / "loop").symlink_to(tmp_path / "good")
    listing = list_domain(str(tmp_path), "source")
    assert sorted(names(listing)) == [("a.png", "good"), ("b.JPG", "good"), ("c.tiff", "bad")]
    assert [(Path(s.path).name, s.reason) for s in listing.set_aside] == [
        ("notes.txt", "not an image by its extension '.txt'"),
        ("loop", "a link to a folder"),
    ]


def test_a_target_may_have_images_beside_the_class_folders(
    tmp_path: Path, pictures: WriteDomain
) -> None:
    source = pictures(tmp_path / "source", {"bad": 6, "good": 6})
    target = pictures(tmp_path / "target", {"bad": 2}, first=100)
    for number, file in enumerate(sorted((source / "good").iterdir())):
        Image.open(file).rotate(90).save(target / f"{number}.png")
    dataset = prepare(recipe(source, target), cache=tmp_path / "cache")
    labels = Counter((e.domain, e.label) for e in dataset.examples)
    assert labels["target", None] == 6
    assert labels["target", "bad"] == 2
    assert dataset.label_index(dataset.select("target", "train")[0]) in (-1, 0)
    with pytest.raises(DataError, match="has no label; put it into the folder of its class"):
        prepare(recipe(target), cache=tmp_path / "cache")


def test_places_without_images(tmp_path: Path, pictures: WriteDomain) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "notes.txt").touch()
    hollow = pictures(tmp_path / "hollow", {"good": 1})
    (hollow / "bad").mkdir()
    for place, words in [
        (tmp_path / "missing", r"source .*missing: expected a folder .* nothing there; correct"),
        (tmp_path / "notes.txt", r"got a file; correct \[data\.source\]"),
        (empty, r"no images; expected .*empty/CLASS/IMAGE"),
        (hollow, r"hollow/bad: no images in this class folder"),
    ]:
        with pytest.raises(DataError, match=words):
            list_domain(str(place), "source")
    assert len(list_domain(str(hollow), "target").candidates) == 1


# --- CSV


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_columns_in_any_order(tmp_path: Path, encoding: str) -> None:
    text = 'group,label,path,split\nm1,good,"a, b.png",test\n\n ,bad,sub/ü.png,\n'
    file = write_csv(tmp_path, text, encoding)
    one, other = list_domain(file, "source").candidates
    assert (one.path, one.label) == (str(tmp_path / "a, b.png"), "good")
    assert (one.group, one.split) == ("m1", "test")
    assert (other.path, other.label) == (str(tmp_path / "sub" / "ü.png"), "bad")
    assert (other.group, other.split) == (None, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"empty; expected a header path,label"),
        ("path,label\n", r"no images below the header"),
        ("path,lable\n", r"list\.csv:1: .*got 'lable'; did you mean 'label'\?"),
        ("path;label\na.png;good\n", r"list\.csv:1: .*got 'path;label'"),
        ("path,split\na.png,test\n", r"list\.csv:1: .*label is missing"),
        ("path,label,label\n", r"list\.csv:1: .*once each"),
        ("path,label\na.png,good\nb.png\n", r"list\.csv:3: expected 2 cells"),
        ("path,label\na.png,good\n,bad\n", r"list\.csv:3: the path is empty"),
        ("path,label\na.png,good\nb.png,\n", r"list\.csv:3: the label is empty; only a target"),
        (
            "path,label,split\na.png,good,tset\n",
            r"list\.csv:2: expected a split of train, validation, test or nothing, got 'tset'",
        ),
        (
            "path,label\na.png,good\nb.png,good\n./a.png,bad\n",
            r"list\.csv:4: \./a\.png is listed on line 2 with label 'good' instead of 'bad'",
        ),
        ('path,label\n"a.png,good\n', r"expected UTF-8 text with commas"),
        ("path,label\na\0.png,good\n", r"null byte|NUL"),
    ],
)
def test_csv_mistakes_name_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    file = write_csv(tmp_path, text)
    with pytest.raises(DataError, match=words):
        check_images(list_domain(file, "source"))


def test_csv_equal_rows_count_once_and_latin_1_is_refused(tmp_path: Path) -> None:
    file = write_csv(tmp_path, "path,label\na.png,\na.png,\n")
    assert names(list_domain(file, "target")) == [("a.png", None)]
    with pytest.raises(DataError, match="expected UTF-8"):
        list_domain(write_csv(tmp_path, "path,label\nü.png,a\n", "latin-1"), "target")


# --- embedded sample


def test_elpv() -> None:
    everything = list_domain("elpv", "source").candidates
    assert len(everything) == 2624
    assert Counter(c.label for c in everything) == {"functional": 1803, "defective": 821}
    mono = list_domain("elpv:mono", "source").candidates
    poly = list_domain("elpv:poly", "target").candidates
    assert (len(mono), len(poly)) == (1074, 1550)
    assert {c.stratum for c in poly} == {"poly 0.00", "poly 0.33", "poly 0.67", "poly 1.00"}
    assert Path(poly[0].path).is_file()
    assert "CC BY-NC-SA" in domains.ELPV_LICENCE


def test_elpv_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="expected elpv, elpv:mono or elpv:poly, got 'elpv:multi'"):
        list_domain("elpv:multi", "source")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install elpv-dataset"):
        list_domain("elpv", "source")


# --- opening


def test_unreadable_images_are_set_aside(tmp_path: Path, pictures: WriteDomain) -> None:
    source = pictures(tmp_path / "source", {"bad": 100, "good": 100}, size=16)
    (source / "bad" / "0003.png").write_bytes(b"")
    (source / "good" / "0007.png").write_bytes((source / "good" / "0007.png").read_bytes()[:90])
    dataset = prepare(recipe(source), cache=tmp_path / "cache")
    assert [Path(s.path).name for s in dataset.set_aside] == ["0003.png", "0007.png"]
    assert dataset.set_aside[0].reason == "expected an image, got an empty file"
    assert len(dataset.examples) == 198
    (source / "good" / "0008.png").unlink()
    (source / "good" / "0008.png").mkdir()  # a folder is walked, not opened
    (source / "good" / "0009.png").write_text("garbage")
    with pytest.raises(DataError) as caught:
        prepare(recipe(source), cache=tmp_path / "cache")
    assert "source: 3 of 199 images cannot be used, expected at most 1%" in str(caught.value)
    assert "0009.png: not an image" in str(caught.value)


def test_one_domain_s_good_images_do_not_excuse_the_other_s(
    tmp_path: Path, pictures: WriteDomain
) -> None:
    source = pictures(tmp_path / "source", {"bad": 100, "good": 100}, size=16)
    target = write_csv(tmp_path / "target", "path,label\nmissing.png,good\n")
    with pytest.raises(DataError, match=r"target: 1 of 1 images .*\n.*missing\.png: cannot be"):
        prepare(recipe(source, target), cache=tmp_path / "cache")


def test_the_cache_opens_only_what_changed(tmp_path: Path, pictures: WriteDomain) -> None:
    source, cache = pictures(tmp_path / "source", {"bad": 5, "good": 5}), tmp_path / "cache"
    opened: list[str] = []

    def track(paths: Sequence[str]) -> Iterable[str]:
        opened.extend(Path(path).name for path in paths)
        return paths

    first = prepare(recipe(source), cache=cache, track=track)
    assert len(opened) == 10
    opened.clear()
    assert prepare(recipe(source), cache=cache, track=track) == first
    assert opened == []
    Image.new("L", (20, 20), 9).save(source / "bad" / "0002.png")
    second = prepare(recipe(source), cache=cache, track=track)
    assert opened == ["0002.png"]
    assert second.sha256 != first.sha256
    # same size, other time
    opened.clear()
    os.utime(source / "bad" / "0003.png", ns=(1, 1))
    assert prepare(recipe(source), cache=cache, track=track) == second
    assert opened == ["0003.png"]
    for damage in (b"", b"{", b'{"format": 1, "images": {"a": 3}}', b"\xff", b"[]"):
        opened.clear()
        (cache / "images.json").write_bytes(damage)
        assert prepare(recipe(source), cache=cache, track=track) == second
        assert len(opened) == 10


# --- the whole data set


def test_a_data_set_of_two_domains(tmp_path: Path, pictures: WriteDomain) -> None:
    source = pictures(tmp_path / "source", {"bad": 30, "good": 50})
    target = pictures(tmp_path / "target", {"bad": 10, "good": 20}, first=100)
    dataset = prepare(recipe(source, target), cache=tmp_path / "cache")
    assert dataset.classes == ("bad", "good")
    assert dataset.field == "target"
    assert (dataset.set_aside, dataset.duplicates) == ((), ())
    keys = [(e.domain, e.sha256) for e in dataset.examples]
    assert keys == sorted(keys)
    counts = Counter((e.domain, e.label, e.split) for e in dataset.examples)
    assert counts["source", "good", "test"] in (12, 13)
    assert counts["target", "bad", "validation"] == 2
    assert prepare(recipe(source), cache=tmp_path / "cache").field == "source"


def test_moving_the_folder_changes_nothing(tmp_path: Path, pictures: WriteDomain) -> None:
    source = pictures(tmp_path / "one", {"bad": 10, "good": 10})
    before = prepare(recipe(source), cache=tmp_path / "cache").sha256
    for number, file in enumerate(sorted(source.rglob("*.png"), reverse=True)):
        file.rename(file.with_name(f"renamed-{number}.png"))
    moved = shutil.move(source, tmp_path / "other")
    assert prepare(recipe(moved), cache=tmp_path / "cache").sha256 == before


def test_limit(tmp_path: Path, pictures: WriteDomain) -> None:
    source = pictures(tmp_path / "source", {"bad": 30, "good": 60})
    dataset = prepare(recipe(source, limit=30), cache=tmp_path / "cache")
    assert Counter(e.label for e in dataset.examples) == {"bad": 10, "good": 20}
    with pytest.raises(DataError, match=r"split; .* raise \[data\] limit"):
        prepare(recipe(source, limit=2), cache=tmp_path / "cache")


def test_class_names_must_match(tmp_path: Path, pictures: WriteDomain) -> None:
    source = pictures(tmp_path / "source", {"defective": 5, "functional": 5})
    target = pictures(tmp_path / "target", {"defectiv": 5, "functional": 5, "x": 1}, first=100)
    with pytest.raises(DataError) as caught:
        prepare(recipe(source, target), cache=tmp_path / "cache")
    message = str(caught.value)
    assert "lacks: 'defectiv' (did you mean 'defective'?), 'x'; " in message
    assert "source: defective, functional; target: defectiv, functional, x; rename" in message


def test_one_class_is_refused(tmp_path: Path, pictures: WriteDomain) -> None:
    source = pictures(tmp_path / "source", {"good": 5})
    with pytest.raises(DataError, match="two or more classes, got only 'good'"):
        prepare(recipe(source), cache=tmp_path / "cache")


def test_too_few_images_for_three_splits(tmp_path: Path, pictures: WriteDomain) -> None:
    source = pictures(tmp_path / "source", {"bad": 1, "good": 1})
    with pytest.raises(DataError, match=r"source: no image of 2 is in the \w+ split; add images"):
        prepare(recipe(source), cache=tmp_path / "cache")


def test_a_class_that_training_would_never_see(tmp_path: Path, pictures: WriteDomain) -> None:
    source = pictures(tmp_path / "source", {"bad": 3, "good": 9})
    rows = [
        f"{file},{file.parent.name},{'test' if file.parent.name == 'bad' else ''}"
        for file in sorted(source.rglob("*.png"))
    ]
    place = write_csv(tmp_path, "path,label,split\n" + "\n".join(rows))
    with pytest.raises(DataError, match="the train split has no image of class 'bad'"):
        prepare(recipe(place), cache=tmp_path / "cache")


# --- duplicates


def test_duplicates_are_reported_and_one_is_kept(tmp_path: Path, pictures: WriteDomain) -> None:
    source = pictures(tmp_path / "source", {"bad": 10, "good": 10})
    target = pictures(tmp_path / "target", {"bad": 10, "good": 10}, first=9)  # shares number 9
    shutil.copy(source / "bad" / "0000.png", source / "bad" / "copy.png")
    dataset = prepare(recipe(source, target), cache=tmp_path / "cache")
    assert [[Path(p).relative_to(tmp_path).as_posix() for p in d] for d in dataset.duplicates] == [
        ["source/bad/0000.png", "source/bad/copy.png"],
        ["source/bad/0009.png", "target/bad/0009.png"],
        ["source/good/0009.png", "target/good/0009.png"],
    ]
    assert len(dataset.examples) == 40
    assert str(source / "bad" / "copy.png") not in {e.path for e in dataset.examples}
    splits: dict[str, set[str]] = {}
    for example in dataset.examples:
        splits.setdefault(example.sha256, set()).add(example.split)
    assert all(len(split) == 1 for split in splits.values())


def test_the_labelled_duplicate_is_kept(tmp_path: Path, pictures: WriteDomain) -> None:
    source = pictures(tmp_path / "source", {"bad": 5, "good": 5})
    target = pictures(tmp_path / "target", {"bad": 5, "good": 5}, first=100)
    shutil.copy(target / "bad" / "0100.png", target / "0000.png")
    dataset = prepare(recipe(source, target), cache=tmp_path / "cache")
    assert all(example.label for example in dataset.examples)
    assert len(dataset.duplicates) == 1


@pytest.mark.parametrize("across", [False, True])
def test_identical_images_with_different_labels_are_refused(
    tmp_path: Path, pictures: WriteDomain, across: bool
) -> None:
    source = pictures(tmp_path / "source", {"bad": 5, "good": 5})
    target = pictures(tmp_path / "target", {"bad": 5, "good": 5}, first=100)
    place = target if across else source
    shutil.copy(source / "bad" / "0001.png", place / "good" / "wrong.png")
    with pytest.raises(DataError, match=r"bad/0001\.png \(source, 'bad'\) and .*wrong\.png .*same"):
        prepare(recipe(source, target), cache=tmp_path / "cache")


def test_explicit_splits_may_part_duplicates_and_are_reported(
    tmp_path: Path, pictures: WriteDomain
) -> None:
    source = pictures(tmp_path / "source", {"bad": 9, "good": 9})
    shutil.copy(source / "bad" / "0000.png", source / "bad" / "copy.png")
    rows = [f"{file},{file.parent.name}," for file in sorted(source.rglob("0*.png"))]
    rows[0] += "train"
    rows.append(f"{source}/bad/copy.png,bad,test")
    dataset = prepare(
        recipe(write_csv(tmp_path, "path,label,split\n" + "\n".join(rows))),
        cache=tmp_path / "cache",
    )
    copies = [e for e in dataset.examples if Path(e.path).name in ("0000.png", "copy.png")]
    assert {"train", "test"} <= {e.split for e in copies}
    assert len(dataset.duplicates) == 1


def test_relative_places_become_absolute(
    tmp_path: Path, pictures: WriteDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "source", {"bad": 1})
    monkeypatch.chdir(tmp_path)
    (only,) = list_domain("source", "target").candidates
    assert only.path == str(tmp_path / "source" / "bad" / "0000.png")


def test_a_label_budget_takes_labels_from_training_images_only(
    tmp_path: Path, pictures: WriteDomain
) -> None:
    source = pictures(tmp_path / "source", {"bad": 20, "good": 20})
    target = pictures(tmp_path / "target", {"bad": 30, "good": 60}, first=100)

    def labelled(budget: int | None) -> set[str]:
        made = recipe(source, target)
        data = msgspec.structs.replace(made.data, labels=budget)
        dataset = prepare(msgspec.structs.replace(made, data=data), cache=tmp_path / "cache")
        for split in ("validation", "test"):
            assert all(e.label for e in dataset.select("target", split))
        assert all(e.label for e in dataset.select("source", "train"))
        found = [e for e in dataset.select("target", "train") if e.label]
        if budget:
            share = sum(e.label == "bad" for e in found) / len(found)
            assert share == pytest.approx(1 / 3, abs=0.1), "every class by its share"
        return {e.sha256 for e in found}

    everything = labelled(None)
    assert labelled(0) == set()
    assert len(labelled(12)) == 12
    assert labelled(12) < labelled(24) < everything
    assert labelled(10_000) == everything


def test_a_brought_model_s_classes_hold_without_source_images(
    tmp_path: Path, pictures: WriteDomain
) -> None:
    target = pictures(tmp_path / "target", {"bad": 12, "good": 12})
    text = f'name = "t"\n[data]\ntarget = "{target}"\n[source]\ncheckpoint = "m.safetensors"\n'
    made = parse_recipe(text, "t.toml")
    dataset = prepare(made, cache=tmp_path / "cache", known=("bad", "dirty", "good"))
    assert dataset.classes == ("bad", "dirty", "good")
    assert dataset.field == "target"
    assert not dataset.select("source", "train")
    with pytest.raises(DataError, match=r"the data: has classes that the checkpoint lacks: 'good'"):
        prepare(made, cache=tmp_path / "cache", known=("bad", "goods"))
