"""Field degradations: what they do to pictures, what they depend on, and their contact sheet."""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from runtime.errors import DataError
from train import contact_sheet, degradations
from train.degradations import DEGRADATIONS, SEVERITIES, degrade, field_photo
from train.domains import list_domain

NAMES = list(DEGRADATIONS)
SAME_FOR_EVERY_SEED = {"underexposure", "overexposure", "blur", "bit-depth"}


def cell() -> Tensor:
    """A solar cell at 150 pixels, uint8 ``[1, 150, 150, 1]``."""
    picture = Image.open(list_domain("elpv:mono", "source").candidates[0].path)
    return torch.from_numpy(np.array(picture.resize((150, 150)))).view(1, 150, 150, 1)


def portrait() -> Tensor:
    """A photograph in colour that is not square, uint8 ``[1, 96, 128, 3]``."""
    photograph = skimage.data.astronaut()  # type: ignore[no-untyped-call]
    picture = Image.fromarray(photograph).resize((128, 128))
    return torch.from_numpy(np.array(picture))[None, :96].contiguous()


def batch(image: Tensor, count: int) -> Tensor:
    return image.repeat(count, 1, 1, 1)


def change(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of each image, ``[N]``."""
    return (one.float() - other.float()).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image", [cell(), portrait()], ids=["cell", "portrait"])
def test_each_severity_changes_more_than_the_one_below(name: str, image: Tensor) -> None:
    seeds = torch.arange(4)
    images = batch(image, 4)
    changes = [change(degrade(images, name, severity, seeds), images) for severity in SEVERITIES]
    assert (changes[0] > 0).any()
    for milder, stronger in itertools.pairwise(changes):
        assert (stronger >= milder).all()
        assert stronger.mean() > 1.05 * milder.mean()


@pytest.mark.parametrize("name", [*NAMES, "field photo"])
@pytest.mark.parametrize("shape", [(24, 40, 1), (40, 24, 3), (9, 9, 1)], ids=str)
def test_a_picture_depends_on_its_own_seed_alone(name: str, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (5, *shape), dtype=np.uint8))
    seeds = torch.tensor([3, -1, 2**62 + 3, 3, 7])
    severities = torch.tensor([1, 5, 2, 4, 3])

    def make(chosen: Sequence[int]) -> Tensor:
        picked = torch.tensor(chosen)
        if name == "field photo":
            return field_photo(images[picked], seeds[picked])
        return degrade(images[picked], name, severities[picked], seeds[picked].tolist())

    before = images.clone()
    together = make([0, 1, 2, 3, 4])
    assert torch.equal(images, before)
    assert together.shape == images.shape
    assert together.dtype == torch.uint8
    assert torch.equal(together, make([0, 1, 2, 3, 4]))
    assert torch.equal(together.flip(0), make([4, 3, 2, 1, 0]))
    for index in range(5):
        assert torch.equal(together[index : index + 1], make([index]))
        if name != "field photo":
            one = degrade(
                images[index : index + 1], name, int(severities[index]), seeds[index : index + 1]
            )
            assert torch.equal(together[index : index + 1], one)


@pytest.mark.parametrize("name", [*NAMES, "field photo"])
def test_another_seed_is_another_picture(name: str) -> None:
    images = batch(cell(), 8)
    seeds = [0, 1, 2, 3, 4, 5, 2**32, 2**33]  # the last two differ in the upper half only
    photos = (
        field_photo(images, seeds) if name == "field photo" else degrade(images, name, 3, seeds)
    )
    different = len({photo.numpy().tobytes() for photo in photos})
    # Two ways to turn, and nothing else to choose.
    two = ("gamma", "motion-blur")
    expected = 1 if name in SAME_FOR_EVERY_SEED else 2 if name in two else 7
    assert different >= expected
    assert name not in SAME_FOR_EVERY_SEED or different == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", [*NAMES, "field photo"])
def test_a_gpu_draws_the_same_picture_within_one_level(name: str) -> None:
    images, seeds = batch(portrait(), 16), torch.arange(16)
    for severity in SEVERITIES:
        one, other = (
            field_photo(x, seeds) if name == "field photo" else degrade(x, name, severity, seeds)
            for x in (images, images.cuda())
        )
        assert other.is_cuda
        assert (one.int() - other.cpu().int()).abs().max() <= 1


def test_exposure_bits_and_lines_are_what_the_table_says() -> None:
    images = cell()
    before = images.numpy().astype(np.float64)
    for severity, divisor in enumerate(DEGRADATIONS["underexposure"].severities, start=1):
        dark = degrade(images, "underexposure", severity, [0]).numpy()
        assert np.abs(dark - before / divisor).max() <= 0.5 + 1e-4
    every_level = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    for severity, bits in enumerate(DEGRADATIONS["bit-depth"].severities, start=1):
        kept = degrade(every_level, "bit-depth", severity, [0])
        levels = set(kept.flatten().tolist())
        assert (len(levels), min(levels), max(levels)) == (2**bits, 0, 255)
    grey = torch.full((64, 100, 120, 1), 90, dtype=torch.uint8)
    lines = degrade(grey, "dead-lines", 1, torch.arange(64)) != 90
    rows, columns = lines.all(dim=2).sum(dim=(1, 2)), lines.all(dim=1).sum(dim=(1, 2))
    assert (rows + columns == 1).all()
    assert 16 < rows.sum() < 48


def test_blur_is_a_gaussian_of_the_stated_width() -> None:
    """Against SciPy's, at 300 pixels, away from the border."""
    from scipy.ndimage import gaussian_filter

    point = torch.zeros(1, 300, 300, 1, dtype=torch.uint8)
    point[0, 140:160, 140:160] = 255
    for severity, sigma in enumerate(DEGRADATIONS["blur"].severities, start=1):
        blurred = degrade(point, "blur", severity, [0])[0, :, :, 0].numpy()
        expected = gaussian_filter(point[0, :, :, 0].numpy().astype(float), sigma * 300)
        assert np.abs(blurred - expected).max() < 1.5


def test_noise_is_normal_and_independent() -> None:
    grey = torch.full((4, 200, 200, 3), 128, dtype=torch.uint8)
    noise = (degrade(grey, "noise", 3, torch.arange(4)).double() - 128) / 255
    sigma = DEGRADATIONS["noise"].severities[2]
    assert abs(noise.mean()) < 0.001
    assert abs(noise.std() / sigma - 1) < 0.01
    assert abs((noise.abs() < sigma).double().mean() - 0.6827) < 0.01
    columns = torch.cat([noise.flatten(1), noise.roll(1, dims=2).flatten(1)])
    assert (torch.corrcoef(columns) - torch.eye(8)).abs().max() < 0.015
    channels = torch.corrcoef(noise.reshape(-1, 3).T)
    assert (channels - torch.eye(3)).abs().max() < 0.015


def test_random_numbers_are_the_published_hash() -> None:
    """lowbias32 in unsigned NumPy arithmetic; torch has signed numbers only."""
    x = np.arange(-5000, 5000, dtype=np.int32) * 99_991
    hashed = x.view(np.uint32).copy()
    hashed ^= hashed >> 16
    hashed *= np.uint32(0x7FEB352D)
    hashed ^= hashed >> 15
    hashed *= np.uint32(0x846CA68B)
    hashed ^= hashed >> 16
    assert np.array_equal(degradations._mix(torch.from_numpy(x)).numpy().view(np.uint32), hashed)


def test_field_photos_follow_their_recipe() -> None:
    """Shares and levels of 1,000 photos against the recipe's own probabilities."""
    count, random = 1000, np.random.default_rng(0)
    seeds = torch.arange(count)
    black = field_photo(torch.zeros(count, 60, 60, 1, dtype=torch.uint8), seeds)[..., 0].numpy()
    white = black == 255
    lines = (white.mean(axis=1) > 0.8).any(axis=1) | (white.mean(axis=2) > 0.8).any(axis=1)
    # White with even chance, so that k lines are all black in 2^-k of the photos.
    expected = 0.3 * (1 - np.mean([0.5**k for k in range(1, 6)]))
    assert abs(lines.mean() - expected) < 0.045
    inner, dark = white[:, 1:-1, 1:-1], black < 100
    alone = inner & dark[:, :-2, 1:-1] & dark[:, 2:, 1:-1] & dark[:, 1:-1, :-2] & dark[:, 1:-1, 2:]
    assert abs(alone.any(axis=(1, 2)).mean() - 0.3) < 0.05

    full = torch.full((count, 60, 60, 1), 255, dtype=torch.uint8)
    levels = np.median(field_photo(full, seeds).numpy(), axis=(1, 2, 3)) / 255
    exposure = np.minimum(random.uniform(0.55, 1.15, 100_000), 1)
    reference = exposure ** random.uniform(0.6, 1.7, 100_000)
    for share in (10, 25, 50):
        assert abs(np.percentile(levels, share) - np.percentile(reference, share)) < 0.03


@pytest.mark.parametrize(
    ("name", "severity", "seeds", "words"),
    [
        ("nosie", 1, [0], "'nosie' is unknown; did you mean 'noise'"),
        ("fog", 1, [0], "'fog' is unknown; expected one of gradient, underexposure"),
        ("noise", 0, [0], r"expected severities 1 \(mild\) to 5 \(severe\), got 0"),
        ("noise", torch.tensor([6]), [0], "to 5 .severe., got 6"),
        ("noise", torch.tensor([1, 2]), [0], r"whole severity or int64 \[1\], got int64 \[2\]"),
        ("noise", torch.tensor([1.5]), [0], r"got float32 \[1\]"),
        ("noise", 1, [0, 1], r"expected seeds int64 \[1\], got int64 \[2\]"),
        ("noise", 1, [0.5], r"expected seeds int64 \[1\], got float32 \[1\]"),
    ],
)
def test_wrong_arguments_are_named(
    name: str, severity: int | Tensor, seeds: list[int], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        degrade(cell(), name, severity, seeds)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 8, 8, 1),
        torch.zeros(8, 8, 1, dtype=torch.uint8),
        torch.zeros(1, 8, 8, 4, dtype=torch.uint8),
        torch.zeros(1, 0, 8, 1, dtype=torch.uint8),
    ],
    ids=["float", "one image", "four channels", "empty"],
)
def test_what_is_no_batch_of_images_is_refused(images: Tensor) -> None:
    with pytest.raises(DataError, match=r"expected images uint8 \[N, H, W, C\] with C 1 or 3, got"):
        degrade(images, "noise", 1, [0])
    with pytest.raises(DataError, match="expected images uint8"):
        field_photo(images, [0])


def test_kinds_stay_together_and_pages_name_every_one() -> None:
    kinds = [d.kind for d in DEGRADATIONS.values()]
    assert [k for k, before in zip(kinds, [None, *kinds], strict=False) if k != before] == [
        "lighting", "obstruction", "sensor",
    ]  # fmt: skip
    page = degradations.degradations_page()
    for d in DEGRADATIONS.values():
        assert f"| `{d.name}` | {d.meaning} | {d.parameter} |" in page


# --- contact sheet


def test_the_contact_sheet_has_every_degradation(tmp_path: Path) -> None:
    Image.fromarray(portrait()[0].numpy()).save(tmp_path / "part.png")
    out = tmp_path / "sheets" / "part.png"
    contact_sheet.write_contact_sheet(tmp_path / "part.png", out, seed=3, size=64)
    with Image.open(out) as sheet:
        sheet.load()
    rows, headings = len(DEGRADATIONS) + 1, 4
    assert sheet.size == (250 + 6 * 74 + 10, 40 + headings * 40 + rows * (120 + 10))
    # The first row, a gradient: the clean picture, then five others.
    tiles = [sheet.crop((250 + 74 * k, 80, 314 + 74 * k, 128)) for k in range(6)]
    clean = Image.fromarray(portrait()[0].numpy()).resize((64, 48), Image.Resampling.BOX)
    assert np.array_equal(np.array(tiles[0]), np.array(clean))
    assert len({tile.tobytes() for tile in tiles}) == 6


def test_the_command_writes_where_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(cell()[0, :, :, 0].numpy()).save("cell.png")
    parser = argparse.ArgumentParser()
    contact_sheet.add_arguments(parser)
    assert contact_sheet.run(parser.parse_args(["cell.png"])) == 0
    assert Path("degradations.png").is_file()
    with pytest.raises(DataError, match="expected a file to write, got a folder"):
        contact_sheet.run(parser.parse_args(["cell.png", "--out", str(tmp_path)]))
    with pytest.raises(DataError, match=r"missing\.png: cannot be read"):
        contact_sheet.run(parser.parse_args(["missing.png"]))
