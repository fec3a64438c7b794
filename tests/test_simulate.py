"""The simulated target: halves, twins, and photos that are made once."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.dataset import Example, Split
from runtime.errors import DataError
from runtime.preprocess import decode
from train.degradations import content_seed, field_photo
from train.simulate import simulate

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def example(path: Path, picture: Image.Image, **fields: Any) -> Example:
    picture.save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Example(path=str(path), sha256=digest, domain="source", **fields)


@pytest.fixture
def source(tmp_path: Path) -> list[Example]:
    """60 images: two labels in two strata each, 36 to train, 12 to validate, 12 to test."""
    random, examples = np.random.default_rng(0), []
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(60):
        levels = random.integers(60, 200, (20, 24), dtype=np.uint8)
        examples.append(
            example(
                folder / f"{number:02}.png",
                Image.fromarray(levels),
                label=("bad", "good")[number % 2],
                stratum=f"line {number // 2 % 2}",
                split=SPLITS[0 if number < 36 else 1 + number % 4 // 2],
                group=f"module {number}" if number % 5 == 0 else None,
            )
        )
    return examples


def of(examples: Sequence[Example], domain: str, split: str) -> list[Example]:
    return [e for e in examples if (e.domain, e.split) == (domain, split)]


def test_training_images_are_halved_in_every_stratum(source: list[Example], tmp_path: Path) -> None:
    result = simulate(source, seed=0, folder=tmp_path / "photos")
    stay, moved = of(result, "source", "train"), of(result, "target", "train")
    originals = {e.group or e.sha256: e for e in source}
    left = {originals[e.group or ""].sha256 for e in moved}
    assert left.isdisjoint(e.sha256 for e in stay)
    assert left | {e.sha256 for e in stay} == {e.sha256 for e in of(source, "source", "train")}
    strata = Counter((e.label, e.stratum) for e in of(source, "source", "train"))
    for half in (stay, moved):
        shares = Counter((e.label, e.stratum) for e in half)
        assert all(abs(shares[key] - count / 2) <= 0.5 for key, count in strata.items())
    assert [e for e in result if e in stay] == sorted(
        (e for e in source if e in stay), key=lambda e: e.sha256
    )


def test_held_out_images_keep_a_twin(source: list[Example], tmp_path: Path) -> None:
    result = simulate(source, seed=0, folder=tmp_path / "photos")
    for split in ("validation", "test"):
        pairs: dict[str | None, list[Example]] = defaultdict(list)
        for e in of(result, "source", split) + of(result, "target", split):
            pairs[e.group].append(e)
        assert {clean.sha256 for clean, _ in pairs.values()} == {
            e.sha256 for e in of(source, "source", split)
        }
        for clean, twin in pairs.values():
            assert (clean.domain, twin.domain) == ("source", "target")
            assert (clean.label, clean.stratum) == (twin.label, twin.stratum)
    keys = [(e.domain, e.sha256) for e in result]
    assert keys == sorted(set(keys))


def test_photos_are_field_photos_of_their_original(source: list[Example], tmp_path: Path) -> None:
    result = simulate(source, seed=0, folder=tmp_path / "photos")
    originals = {e.group or e.sha256: e for e in source}
    for twin in of(result, "target", "test"):
        original = originals[twin.group or ""]
        pixels = torch.from_numpy(np.array(decode(original.path)))[None, :, :, None]
        expected = field_photo(pixels, [content_seed(original.sha256)])[0, :, :, 0]
        assert np.array_equal(np.array(decode(twin.path)), expected.numpy())
        assert twin.sha256 == hashlib.sha256(Path(twin.path).read_bytes()).hexdigest()
        assert original.sha256[:32] in Path(twin.path).name


def test_another_seed_halves_otherwise_but_photos_stay(
    source: list[Example], tmp_path: Path
) -> None:
    one, again, other = (
        simulate(examples, seed=seed, folder=tmp_path / "photos")
        for examples, seed in ((source, 0), (source[::-1], 0), (source, 1))
    )
    assert one == again
    assert of(one, "target", "train") != of(other, "target", "train")
    assert of(one, "target", "test") == of(other, "target", "test")


def test_photos_are_made_once_and_again_only_if_damaged(
    source: list[Example], tmp_path: Path
) -> None:
    def stamps() -> dict[str, tuple[int, bytes]]:
        files = (tmp_path / "photos").iterdir()
        return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    opened: list[int] = []

    def track(items: Sequence[Any]) -> Iterable[Any]:
        opened.append(len(items))
        return items

    first = simulate(source, seed=0, folder=tmp_path / "photos", track=track)
    before = stamps()
    assert opened == [len(before)] == [18 + 24]
    assert simulate(source, seed=0, folder=tmp_path / "photos") == first
    assert stamps() == before

    cut, flipped, *_ = sorted((tmp_path / "photos").iterdir())
    cut.write_bytes(before[cut.name][1][:-40])
    spoiled = bytearray(before[flipped.name][1])
    spoiled[len(spoiled) // 2] ^= 0xFF
    flipped.write_bytes(spoiled)
    assert simulate(source, seed=0, folder=tmp_path / "photos") == first
    after = stamps()
    assert {name: data for name, (_, data) in after.items()} == {
        name: data for name, (_, data) in before.items()
    }
    assert {name for name in after if after[name] != before[name]} == {cut.name, flipped.name}


def test_colour_and_16_bit_sources_go_by_the_image_policy(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (30, 20, 3), dtype=np.uint8)
    deep = random.integers(0, 4096, (30, 20), dtype=np.uint16)
    examples = [
        example(tmp_path / "colour.png", Image.fromarray(colour), label="good", split="test"),
        example(tmp_path / "deep.png", Image.fromarray(deep), label="bad", split="test"),
    ]

    def photo_of(original: Example, window: tuple[int, int]) -> Image.Image:
        result = simulate(examples, seed=0, folder=tmp_path / "photos", window=window)
        (twin,) = (e for e in of(result, "target", "test") if e.group == original.sha256)
        return decode(twin.path)

    wide, narrow = (0, 65535), (0, 4095)
    assert (photo_of(examples[0], wide).mode, photo_of(examples[0], wide).size) == ("RGB", (20, 30))
    assert photo_of(examples[1], narrow).mode == "L"
    # The same photo is asked for again, now by other levels: the stored one must not answer.
    bright, dark = (np.array(photo_of(examples[1], window)).mean() for window in (narrow, wide))
    assert bright > dark + 20


def test_an_image_that_vanished_is_named(source: list[Example], tmp_path: Path) -> None:
    Path(source[-1].path).unlink()
    with pytest.raises(DataError, match=r"59\.png: cannot be read"):
        simulate(source, seed=0, folder=tmp_path / "photos")
