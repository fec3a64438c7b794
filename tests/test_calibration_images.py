"""Which images calibrate: decided by content and seed, balanced, diverse, none degenerate."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from calibration.faults import degenerate, texture
from calibration.images import (
    MIN_IMAGES,
    Choice,
    batches,
    choose_images,
    held_out,
    write_choice,
)
from runtime.dataset import Example
from runtime.errors import DataError
from runtime.preprocess import InputSpec

SPEC = InputSpec(size=(16, 16), channels=1)


def draw(*seed: int, size: tuple[int, int] = (16, 16)) -> npt.NDArray[np.uint8]:
    """A picture ``[H, W]`` of random patches with a little sensor noise."""
    random = np.random.default_rng(seed)
    patches = random.uniform(40, 215, (4, 4)).repeat(size[0] // 4, 0).repeat(size[1] // 4, 1)
    return np.clip(patches + random.normal(0, 10, size), 0, 255).astype(np.uint8)


def write_image(path: Path, levels: np.ndarray) -> str:
    Image.fromarray(levels.astype(np.uint8)).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_examples(
    folder: Path,
    count: int,
    *,
    label: str | None = "good",
    seed: int = 0,
    stratum: str | None = None,
    group: str | None = None,
) -> list[Example]:
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number in range(count):
        path = folder / f"{label}-{seed}-{number}.png"
        digest = write_image(path, draw(seed, number))
        examples.append(
            Example(
                path=str(path),
                sha256=digest,
                domain="target",
                label=label,
                stratum=stratum,
                group=group,
            )
        )
    return examples


def choose(examples: list[Example], count: int = 8, seed: int = 0, **options: object) -> Choice:
    return choose_images(examples, count=count, spec=SPEC, seed=seed, **options)  # type: ignore[arg-type]


def test_the_choice_does_not_depend_on_paths_or_order(tmp_path: Path) -> None:
    examples = write_examples(tmp_path / "a", 30)
    moved = write_examples(tmp_path / "somewhere else", 30)[::-1]
    first = choose(examples)
    assert choose(moved).digests == first.digests
    assert choose(examples, seed=1).digests != first.digests
    features = np.random.default_rng(0).normal(size=(30, 4))
    spread = choose(examples, features=features)
    assert choose(moved, features=features[::-1]).digests == spread.digests


def test_classes_strata_and_groups_get_equal_shares_as_far_as_they_reach(tmp_path: Path) -> None:
    examples = [
        *write_examples(tmp_path, 40, label="good", seed=1, group="a"),
        *write_examples(tmp_path, 4, label="good", seed=2, group="b"),
        *write_examples(tmp_path, 5, label="cracked", seed=3),
        *write_examples(tmp_path, 9, label="dark", seed=4, stratum="mono"),
        *write_examples(tmp_path, 9, label="dark", seed=5, stratum="poly"),
    ]
    choice = choose(examples, 23)
    assert choice.per_class(["cracked", "dark", "good", "new"]) == {
        "cracked": 5,
        "dark": 9,
        "good": 9,
        "new": 0,
    }
    seeds = Counter(Path(image.path).name.split("-")[1] for image in choice.chosen)
    assert (seeds["1"], seeds["2"]) == (5, 4)
    assert sorted((seeds["4"], seeds["5"])) == [4, 5]
    assert "of 'dark', stratum " in " ".join(image.reason for image in choice.chosen)


def test_with_features_each_pick_is_the_farthest_from_those_before(tmp_path: Path) -> None:
    examples = write_examples(tmp_path, 40)
    features = np.random.default_rng(3).normal(size=(40, 3)).astype(np.float32)
    choice = choose(examples, 12, features=features)
    row = {example.sha256: index for index, example in enumerate(examples)}
    picks = [row[digest] for digest in choice.digests]
    for position in range(1, len(picks)):
        before = features[picks[:position]].astype(np.float64)
        distance = np.linalg.norm(features[:, None] - before, axis=2).min(axis=1)
        assert distance[picks[position]] == pytest.approx(distance.max())
    assert "the first" in choice.chosen[0].reason
    assert "from the nearest chosen before" in choice.chosen[1].reason


def test_what_would_mislead_is_refused_with_the_reason(tmp_path: Path) -> None:
    good = write_examples(tmp_path, 20)
    pictures: dict[str, npt.NDArray[Any]] = {
        "black": np.full((16, 16), 3),
        "saturated": np.full((16, 16), 255),
        "constant": np.full((16, 16), 90),
        "noise": np.random.default_rng(5).integers(0, 256, (64, 64)),
        "foreign": draw(5, size=(32, 64)),
        "small": draw(5, size=(12, 12)),
    }
    bad = []
    for name, levels in pictures.items():
        digest = write_image(tmp_path / f"{name}.png", levels)
        bad.append(Example(path=str(tmp_path / f"{name}.png"), sha256=digest, domain="target"))
    (tmp_path / "unreadable.png").write_bytes(b"not a picture")
    digest = hashlib.sha256(b"not a picture").hexdigest()
    bad.append(Example(path=str(tmp_path / "unreadable.png"), sha256=digest, domain="target"))
    bad.append(Example(path=str(tmp_path / "gone.png"), sha256="1" * 64, domain="target"))
    write_examples(tmp_path, 1, label="changed", seed=9)
    bad.append(Example(path=str(tmp_path / "changed-9-0.png"), sha256="0" * 64, domain="target"))
    twin = Example(
        path=str(tmp_path / "twin.png"), sha256=good[0].sha256, domain="target", label="good"
    )
    choice = choose([*good, *bad, twin], 80)
    assert set(choice.digests) == {example.sha256 for example in good}
    reasons = {Path(refused.path).stem: refused.reason for refused in choice.refused}
    assert reasons["black"] == "black: no level above 3"
    assert reasons["saturated"] == "saturated: no level below 255"
    assert reasons["constant"] == "constant: levels 90 to 90"
    assert reasons["unreadable"].startswith("unreadable: ")
    assert reasons["gone"].startswith("unreadable: ")
    assert reasons["changed-9-0"] == "changed since the list of images was made"
    assert any(reason.startswith("byte-identical to ") for reason in reasons.values())
    assert reasons["noise"].startswith("noise: neighbouring pixels correlate by -0.0")
    assert reasons["foreign"] == (
        "foreign: 64 x 32 pixels are 2.00 : 1, nearly all others 1.00 : 1"
    )
    assert reasons["small"] == "too small: 12 x 12 pixels"
    assert len(choice.refused) == 10


@pytest.mark.parametrize("side", [64, 160])
@pytest.mark.parametrize("noise", ["uniform", "gaussian", "faint", "dark", "salt and pepper"])
def test_noise_of_any_mean_and_contrast_is_told_from_pictures(noise: str, side: int) -> None:
    random = np.random.default_rng(side)
    size = (side, side)
    draws: dict[str, Callable[[], npt.NDArray[Any]]] = {
        "uniform": lambda: random.uniform(0, 256, size),
        "gaussian": lambda: random.normal(128, 50, size),
        "faint": lambda: random.normal(200, 3, size),
        "dark": lambda: random.normal(0, 20, size),
        "salt and pepper": lambda: 255 * (random.random(size) < 0.1),
    }
    drawn = [np.clip(draws[noise](), 0, 255).astype(np.uint8) for _ in range(20)]
    assert all(texture(picture).is_noise for picture in drawn)
    # The same noise over a picture that it drowns for the eye.
    scene = draw(1, size=size).astype(np.float64)
    scene = (scene - scene.mean()) / scene.std()
    spread = np.mean([picture.std() for picture in drawn])
    mixed = [np.clip(picture + scene * spread / 2, 0, 255).astype(np.uint8) for picture in drawn]
    assert not any(texture(picture).is_noise for picture in mixed)


def test_a_weave_without_any_shading_is_a_picture() -> None:
    weave = 127 + 60 * np.sin(np.arange(128) * np.pi / 4)
    found = texture(np.broadcast_to(weave, (128, 128)).astype(np.uint8))
    assert found.structure < 0.1
    assert not found.is_noise


def test_noise_is_judged_at_its_own_size(tmp_path: Path) -> None:
    good = write_examples(tmp_path, 8)
    path = tmp_path / "noise.png"  # sixteen times smaller it looks like a picture
    digest = write_image(path, np.random.default_rng(0).integers(0, 256, (256, 256)))
    choice = choose([*good, Example(path=str(path), sha256=digest, domain="target")], 9)
    assert [refused.reason.split(":")[0] for refused in choice.refused] == ["noise"]


def test_hot_pixels_do_not_save_a_black_image_nor_spoil_a_dark_one() -> None:
    black = np.zeros((64, 64, 1), np.uint8)
    black[3, 3] = 255
    assert degenerate(black).startswith("black")
    dark = np.random.default_rng(0).integers(0, 30, (64, 64, 1)).astype(np.uint8)
    assert degenerate(dark) == ""


def test_a_camera_on_its_side_is_the_same_camera_and_many_shapes_are_a_field(
    tmp_path: Path,
) -> None:
    wide = write_examples(tmp_path, 8)
    for example in wide[4:]:
        write_image(Path(example.path), draw(int(example.path[-5]), size=(20, 32)))
    for example in wide[:4]:
        write_image(Path(example.path), draw(int(example.path[-5]), size=(32, 20)))
    renewed = [
        msgspec.structs.replace(
            example, sha256=hashlib.sha256(Path(example.path).read_bytes()).hexdigest()
        )
        for example in wide
    ]
    assert choose(renewed).refused == ()
    square = write_examples(tmp_path, 8, seed=1)
    assert choose([*renewed, *square], 16).refused == ()


def test_one_picture_in_many_files_is_too_few_images(tmp_path: Path) -> None:
    examples = []
    picture = Image.fromarray(draw(0, size=(256, 256)))
    for quality in range(60, 100, 4):
        path = tmp_path / f"{quality}.jpg"
        picture.save(path, quality=quality)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        examples.append(Example(path=str(path), sha256=digest, domain="target"))
    with pytest.raises(DataError, match=r"got 1 of 10 \(.*shows the same as"):
        choose(examples)


def test_data_that_is_mostly_unusable_is_an_error(tmp_path: Path) -> None:
    good = write_examples(tmp_path, 10)
    gone = [
        Example(path=str(tmp_path / "no" / f"{n}.png"), sha256=f"{n:064}", domain="target")
        for n in range(11)
    ]
    assert len(choose([*good, *gone[1:]], 20).chosen) == 10
    with pytest.raises(DataError, match=r"11 of 21 calibration images are unusable, .* 50%.*"):
        choose([*good, *gone], 21)
    with pytest.raises(DataError, match=r"got 0 of 11 .*No such file"):
        choose(gone)


def test_unlabelled_images_are_a_class_of_their_own(tmp_path: Path) -> None:
    choice = choose(write_examples(tmp_path, 9, label=None))
    assert choice.per_class(["good"]) == {"good": 0, "(no label)": 8}


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    examples = write_examples(tmp_path, MIN_IMAGES)
    with pytest.raises(DataError, match="at least 8 usable calibration images, got 7 of 7"):
        choose(examples[1:])
    validation = Example(path="x.png", sha256="0" * 64, domain="target", split="validation")
    with pytest.raises(DataError, match=r"x.png: .* got one of the validation split"):
        choose([*examples, validation])
    source = Example(path="x.png", sha256="0" * 64, domain="source")
    with pytest.raises(DataError, match="one domain, got source and target"):
        choose([*examples, source])
    with pytest.raises(DataError, match=r"expected features \[8, D\], .* got \[7, 2\]"):
        choose(examples, features=np.zeros((7, 2)))
    with pytest.raises(DataError, match="expected finite features"):
        choose(examples, features=np.full((8, 2), np.nan))


def test_batches_hold_the_chosen_images_in_their_order(tmp_path: Path) -> None:
    choice = choose(write_examples(tmp_path, 10))
    read = list(batches(choice, SPEC, size=3))
    assert [len(batch) for batch in read] == [3, 3, 2]
    assert read[0].shape == (3, 16, 16, 1)
    with Image.open(choice.chosen[4].path) as picture:
        np.testing.assert_array_equal(read[1][1][:, :, 0], np.asarray(picture))
    write_choice(tmp_path / "images.json", choice)
    assert choice.chosen[0].reason in (tmp_path / "images.json").read_text()


def test_held_out_images_are_balanced_usable_and_not_among_the_chosen(tmp_path: Path) -> None:
    examples = [
        *write_examples(tmp_path, 20, label="good", seed=1),
        *write_examples(tmp_path, 12, label="cracked", seed=2),
    ]
    Path(examples[-1].path).unlink()
    choice = choose(examples, 8)
    held = held_out(examples, choice, count=10, spec=SPEC, seed=0)
    assert Counter(example.label for example in held) == {"good": 5, "cracked": 5}
    assert not {example.sha256 for example in held} & set(choice.digests)
    again = held_out(examples[::-1], choice, count=10, spec=SPEC, seed=0)
    assert again == held
    assert held_out(examples, choice, count=10, spec=SPEC, seed=1) != held
    rest = held_out(examples, choice, count=100, spec=SPEC, seed=0)
    assert len(rest) == 32 - 8 - 1
    assert examples[-1] not in rest
    everything = choose(examples, 32)
    assert held_out(examples, everything, count=4, spec=SPEC, seed=0) == ()
