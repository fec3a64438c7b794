"""Small labelled pictures for every test that needs a domain."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def draw(class_index: int, number: int, size: int = 32) -> Image.Image:
    """A gray picture of stripes, finer for each further class, with phase and noise of its own."""
    random = np.random.default_rng([class_index, number])
    phase = np.arange(size) * (class_index + 1) * 4 * np.pi / size + random.uniform(0, 2 * np.pi)
    levels = 128 + 60 * np.sin(phase) + random.normal(0, 12, (size, size))
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


WriteDomain = Callable[..., Path]


@pytest.fixture
def pictures() -> WriteDomain:
    """Write a folder of class folders: ``pictures(folder, {"good": 9, "bad": 3}, first=0)``.

    Pictures are numbered from ``first``; equal class position and number give equal bytes.
    """

    def write(folder: Path, counts: Mapping[str, int], *, first: int = 0, size: int = 32) -> Path:
        for class_index, (name, count) in enumerate(counts.items()):
            (folder / name).mkdir(parents=True)
            for number in range(first, first + count):
                draw(class_index, number, size).save(folder / name / f"{number:04}.png")
        return folder

    return write
