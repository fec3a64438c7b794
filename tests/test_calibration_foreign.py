"""Images that are not the field's are doubted by their features, the field's own are not."""

import numpy as np
import pytest

from calibration.foreign import MIN_TARGET, doubt, share_far


def field(count: int, seed: int) -> np.ndarray:
    """Features ``[count, 24]`` that share a direction, each with its own strength."""
    random = np.random.default_rng(seed)
    directions = np.eye(24)[0] + random.normal(0, 0.1, (count, 24))
    return np.asarray(directions * random.uniform(0.5, 20, (count, 1)))


def others(count: int) -> np.ndarray:
    return np.asarray(np.roll(field(count, 9), 7, axis=1))


def test_the_field_s_own_images_are_near_whatever_their_contrast() -> None:
    assert share_far(field(100, 1), field(200, 2)) < 0.1
    assert doubt(field(100, 1), field(200, 2)) == ""


def test_other_images_are_doubted_with_the_share() -> None:
    mixed = np.concatenate([others(60), field(40, 1)])
    assert share_far(mixed, field(200, 2)) == pytest.approx(0.6, abs=0.05)
    said = doubt(mixed, field(200, 2))
    assert "of the calibration images look to the network like no held-out image" in said
    assert "from another field?" in said


def test_a_few_others_are_diversity() -> None:
    assert doubt(np.concatenate([others(30), field(70, 1)]), field(200, 2)) == ""


def test_too_few_field_images_say_nothing() -> None:
    assert doubt(others(60), field(MIN_TARGET - 1, 2)) == ""
    assert doubt(others(60), field(MIN_TARGET, 2)) != ""
