"""Pictures that were made to hurt are refused in a sentence, or read; none costs much memory."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from benchmarks.hostile_images import LIMIT_MB, Victim, as_expected
from benchmarks.hostile_pictures import Kind, fuzzed, kinds
from runtime.preprocess import decode


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with Victim() as victim:
        yield victim


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_a_hostile_picture_is_survived(kind: Kind, victim: Victim) -> None:
    seen = victim.read(kind.make())
    assert as_expected(kind, seen), seen
    assert seen.megabytes < LIMIT_MB
    assert (seen.fate == "refused") == bool(seen.words)


def test_fuzzed_pictures_are_read_or_refused(victim: Victim) -> None:
    fates = {victim.read(data).fate for data in fuzzed(500, seed=1)}
    assert fates == {"read", "refused"}


def test_a_picture_that_was_lent_is_not_turned() -> None:
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    picture.getexif()[0x0112] = 6
    assert decode(picture).size == (3, 4)
    assert picture.size == (4, 3)
    assert picture.getexif()[0x0112] == 6
