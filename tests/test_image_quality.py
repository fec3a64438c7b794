"""What is wrong with a frame is noticed by limits that were learned, and said with the figures."""

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from runtime.monitoring.image_quality import (
    FROZEN_AFTER,
    STATISTICS,
    Watch,
    limits_of,
    look,
    measure,
)
from tests.conftest import ROOT, draw

UInt8 = npt.NDArray[np.uint8]

SIDE = 96


def frame(number: int) -> UInt8:
    """Stripes with noise, in order."""
    return np.asarray(draw(0, number, SIDE))[:, :, None]


LIMITS = limits_of(np.stack([measure(frame(number)) for number in range(200)]))


def words(image: UInt8, *, alarming: bool = False) -> set[str]:
    flags = look(image, None, LIMITS)
    return {flag.word for flag in flags if flag.alarms or not alarming}


def black(image: UInt8) -> UInt8:
    return np.random.default_rng(0).integers(0, 3, image.shape).astype(np.uint8)


def white(image: UInt8) -> UInt8:
    return np.full_like(image, 255)


def underexposed(image: UInt8) -> UInt8:
    return image // 6


def overexposed(image: UInt8) -> UInt8:
    return np.asarray(np.clip(image.astype(int) * 2, 0, 255), dtype=np.uint8)


def hazy(image: UInt8) -> UInt8:
    return (110 + image // 8).astype(np.uint8)


def out_of_focus(image: UInt8) -> UInt8:
    shifts = [(down, across) for down in range(-2, 3) for across in range(-2, 3)]
    shifted = np.stack([np.roll(image, shift, axis=(0, 1)) for shift in shifts])
    return np.asarray(shifted.mean(axis=0), dtype=np.uint8)


def noisy(image: UInt8) -> UInt8:
    noise = np.random.default_rng(0).normal(0, 60, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def half_gray(image: UInt8) -> UInt8:
    image = image.copy()
    image[SIDE // 2 :] = 128
    return image


def rows_of_blocks_lost(image: UInt8) -> UInt8:
    image = image.copy()
    image[40:48] = 0
    return image


def dead_row(image: UInt8) -> UInt8:
    image = image.copy()
    image[31] = 255
    return image


def torn(image: UInt8) -> UInt8:
    image = image.copy()
    image[40:] = np.roll(image[40:], SIDE // 4, axis=1)
    return image


FAULTS = (
    black, white, underexposed, overexposed, hazy, out_of_focus, noisy, half_gray,
    rows_of_blocks_lost, dead_row, torn,
)  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (black, "black"),
        (white, "bright"),
        (white, "saturated"),
        (underexposed, "dark"),
        (overexposed, "saturated"),
        (hazy, "low-contrast"),
        (out_of_focus, "blurred"),
        (noisy, "noisy"),
        (half_gray, "dropped-blocks"),
        (rows_of_blocks_lost, "dropped-blocks"),
        (dead_row, "dead-line"),
        (torn, "torn"),
    ],
)
def test_a_fault_alarms_under_its_name(spoil: Callable[[UInt8], UInt8], word: str) -> None:
    for number in range(500, 510):
        assert word in words(spoil(frame(number)), alarming=True)


def test_a_jpeg_file_with_zeroed_bytes_that_decoders_take_is_noticed() -> None:
    noticed = 0
    for number in range(20):
        buffer = io.BytesIO()
        Image.fromarray(frame(number)[:, :, 0]).save(buffer, "JPEG", quality=90)
        data = bytearray(buffer.getvalue())
        whole = np.asarray(Image.open(io.BytesIO(data)))[:, :, None]
        assert "torn" not in words(whole)
        data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
        noticed += "torn" in words(np.asarray(Image.open(io.BytesIO(data)))[:, :, None])
    assert noticed >= 18


def test_images_in_order_alarm_nowhere_and_are_seldom_noticed() -> None:
    flags = [look(frame(number), None, LIMITS) for number in range(1000, 1300)]
    assert not [flag for found in flags for flag in found if flag.alarms]
    assert sum(bool(found) for found in flags) <= 9


def test_a_sentence_has_the_value_and_what_is_usual() -> None:
    (flag,) = (f for f in look(underexposed(frame(0)), None, LIMITS) if f.word == "dark")
    assert flag.value == pytest.approx(underexposed(frame(0)).mean())
    assert flag.value < LIMITS["brightness"].low == flag.limit
    assert flag.sentence == (
        f"dark: mean level {flag.value:.1f}, usual is at least {flag.limit:.1f}"
    )


def test_a_black_frame_is_one_flag_and_not_all_that_follows_from_it() -> None:
    (flag,) = look(black(frame(0)), None, LIMITS)
    assert flag.word == "black"
    assert "usual is at least" in flag.sentence


def test_between_the_limits_a_frame_is_noticed_and_does_not_alarm() -> None:
    between = (LIMITS["brightness"].low + LIMITS["brightness"].alarm_below) / 2
    image = frame(0).astype(float)
    darker = np.clip(image - image.mean() + between, 0, 255).astype(np.uint8)
    (flag,) = (found for found in look(darker, None, LIMITS) if found.word == "dark")
    assert not flag.alarms


def test_alarms_come_first() -> None:
    alarms = [flag.alarms for flag in look(overexposed(frame(3)), None, LIMITS)]
    assert alarms == sorted(alarms, reverse=True)


def test_a_picture_that_comes_again_is_frozen_and_alarms_at_the_third() -> None:
    watch = Watch(LIMITS)
    assert not watch.look("left", frame(1))
    for repeat in range(1, FROZEN_AFTER + 2):
        (flag,) = watch.look("left", frame(1))
        assert flag.word == "frozen"
        assert flag.alarms == (repeat >= FROZEN_AFTER)
    assert "times in a row" in flag.sentence
    assert not watch.look("left", frame(2)), "it moves again"
    (flag,) = watch.look("left", frame(2))
    assert not flag.alarms, "it is counted anew"


def test_each_camera_is_compared_with_itself() -> None:
    watch = Watch(LIMITS)
    assert not watch.look("left", frame(1))
    assert not watch.look("right", frame(1))
    watch.forget("left")
    assert not watch.look("left", frame(1)), "what came before the gap is forgotten"
    assert watch.look("right", frame(1))


def test_files_may_bring_the_same_picture_as_often_as_they_like() -> None:
    watch = Watch(LIMITS, frozen_after=0)
    assert not [f for _ in range(9) for f in watch.look("folder", frame(1)) if f.alarms]


def test_a_still_scene_under_sensor_noise_is_not_frozen() -> None:
    """The faintest noise that the field's images have tells two exposures apart."""
    random = np.random.default_rng(0)
    scene = 128 + 60 * np.sin(np.arange(SIDE) / 4)
    faint = LIMITS["noise"].low / 2
    one, two = (
        np.rint(scene + random.normal(0, faint, (SIDE, SIDE)))[:, :, None].astype(np.uint8)
        for _ in range(2)
    )
    assert "frozen" not in {flag.word for flag in look(two, one, LIMITS)}
    assert "frozen" in {flag.word for flag in look(one, one, LIMITS)}


def test_the_same_frame_after_another_compression_is_still_frozen() -> None:
    buffer = io.BytesIO()
    Image.fromarray(frame(1)[:, :, 0]).save(buffer, "JPEG", quality=100)
    again = np.asarray(Image.open(buffer))[:, :, None]
    assert not np.array_equal(again, frame(1))
    assert {flag.word for flag in look(again, frame(1), LIMITS)} == {"frozen"}


def test_an_image_of_another_size_follows_nothing() -> None:
    """A bundle with another input may answer from one frame to the next."""
    assert not look(frame(1), frame(1)[:48], LIMITS)


def test_colour_is_measured_as_gray() -> None:
    gray = frame(4)
    np.testing.assert_allclose(measure(np.repeat(gray, 3, axis=2)), measure(gray))


def test_brightness_and_contrast_are_mean_and_deviation() -> None:
    image = frame(0)
    values = dict(zip(STATISTICS, measure(image), strict=True))
    assert values["brightness"] == pytest.approx(image.mean())
    assert values["contrast"] == pytest.approx(image.std())


def test_noise_is_estimated_in_levels() -> None:
    noise = np.random.default_rng(0).normal(128, 5, (200, 200, 1)).astype(np.uint8)
    values = dict(zip(STATISTICS, measure(noise), strict=True))
    assert values["noise"] == pytest.approx(5, rel=0.05)


def test_exposure_does_not_move_sharpness() -> None:
    image = frame(0)
    bright, dim = measure(image), measure(image // 2)
    where = STATISTICS.index("sharpness")
    assert dim[where] == pytest.approx(bright[where], rel=0.05)


def test_a_few_spoilt_images_among_those_that_limits_are_learned_from_do_no_harm() -> None:
    samples = [measure(frame(number)) for number in range(400)]
    samples[0] = measure(black(frame(0)))
    limits = limits_of(np.stack(samples))
    assert limits["brightness"].low > 20
    assert any(flag.word == "black" for flag in look(black(frame(0)), None, limits))


def test_statistics_without_limits_are_passed_over() -> None:
    """Those of a bundle from before they were measured."""
    known = {"brightness": LIMITS["brightness"]}
    assert {flag.word for flag in look(white(frame(0)), None, known)} == {"bright"}


def test_the_page_tells_of_every_flag() -> None:
    page = (ROOT / "docs" / "health.md").read_text()
    spoilt = [spoil(frame(0)) for spoil in FAULTS]
    found = {flag.word for image in spoilt for flag in look(image, None, LIMITS)}
    for word in found | {"frozen"}:
        assert f"`{word}`" in page
