"""One labelled picture of all field degradations: the command ``python -m train degradations``.

It only draws; what a degradation does to a picture is in train/degradations.
"""

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from runtime import atomic
from runtime.errors import DataError
from runtime.preprocess import decode
from train import console

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_OUT = Path("degradations.png")
TILE = 160
"""Pixels of the longer side of one picture on the sheet."""

_GAP, _LINE, _LABELS, _TITLE, _NOTES = 10, 18, 250, 40, 120
_INK, _QUIET, _PAPER = (20, 20, 20), (105, 105, 105), (255, 255, 255)


class Row(NamedTuple):
    """One line of the sheet: pictures with captions, and what stands left of them."""

    name: str
    notes: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    captions: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``python -m train degradations`` takes."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the picture to degrade")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="FILE",
        help=f"where the sheet goes, as PNG; {DEFAULT_OUT} if left out",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="other dirt, lines and directions; 0 if left out",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Draw the sheet that ``options`` ask for and return the exit code."""
    write_contact_sheet(options.image, options.out, seed=options.seed)
    console.say(
        f"wrote {options.out}; next: compare with your field images; to train with field photos, "
        'set degrade in [train] of a recipe, or target = "simulated" in [data]'
    )
    return 0


def write_contact_sheet(image_path: Path, out_path: Path, seed: int = 0, size: int = TILE) -> None:
    """Write a PNG with every degradation of ``image_path`` at every severity, and field photos.

    The picture is shrunk to ``size`` pixels first: faults of single pixels then stay visible.

    Raises DataError if the image cannot be read or ``out_path`` is a folder.
    """
    if out_path.is_dir():
        raise DataError(f"{out_path}: expected a file to write, got a folder; add a file name")
    picture = decode(image_path)
    picture.thumbnail((size, size), Image.Resampling.BOX)
    with atomic.replacing_file(out_path) as temporary:
        _draw_sheet(_rows(picture, seed), image_path.name).save(temporary, format="PNG")


def _rows(picture: Image.Image, seed: int) -> dict[str, list[Row]]:
    """The lines of the sheet under their headings."""
    import numpy as np  # with torch below: the command's --help must not wait for them
    import torch

    from train.degradations import DEGRADATIONS, SEVERITIES, degrade, field_photo

    count = len(SEVERITIES)
    pixels = torch.from_numpy(np.array(picture))
    images = pixels.view(1, *pixels.shape[:2], -1).repeat(count, 1, 1, 1)
    rows: dict[str, list[Row]] = {}
    for d in DEGRADATIONS.values():
        made = _pictures(degrade(images, d.name, torch.tensor(SEVERITIES), [seed] * count))
        captions = tuple(f"{s}: {v:g}" for s, v in zip(SEVERITIES, d.severities, strict=True))
        row = Row(d.name, (d.meaning, d.parameter), (picture, *made), ("clean", *captions))
        rows.setdefault(d.kind, []).append(row)
    seeds = list(range(seed, seed + count))
    made = _pictures(field_photo(images, seeds))
    captions = tuple(f"seed {s}" for s in seeds)
    notes = ("Random compositions: augmentation, and the simulated target domain.",)
    rows["all together"] = [Row("field photo", notes, (picture, *made), ("clean", *captions))]
    return rows


def _pictures(images: "Tensor") -> list[Image.Image]:
    arrays = images.numpy()
    return [Image.fromarray(a[:, :, 0] if a.shape[2] == 1 else a) for a in arrays]


def _draw_sheet(groups: dict[str, list[Row]], title: str) -> Image.Image:
    fonts = {points: ImageFont.load_default(points) for points in (12, 15, 20)}
    (first, *_), *_ = groups.values()
    tile = first.pictures[0]
    row_height = max(tile.height + _LINE, _NOTES) + _GAP
    height = sum(_TITLE + row_height * len(rows) for rows in groups.values()) + _TITLE
    width = _LABELS + len(first.pictures) * _pitch(tile) + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), f"Field degradations of {title}", _INK, fonts[20])
    y = _TITLE
    for heading, rows in groups.items():
        draw.rectangle((0, y + 4, width, y + _TITLE - 6), (226, 232, 240))
        draw.text((_GAP, y + 9), heading, _INK, fonts[15])
        y += _TITLE
        for row in rows:
            _draw_row(sheet, draw, row, y, fonts[15], fonts[12])
            y += row_height
    return sheet


def _draw_row(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    row: Row,
    y: int,
    large: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    small: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    draw.text((_GAP, y), row.name, _INK, large)
    lines = "\n\n".join(textwrap.fill(note, 36) for note in row.notes)
    draw.multiline_text((_GAP, y + 22), lines, _QUIET, small, spacing=3)
    for index, (picture, caption) in enumerate(zip(row.pictures, row.captions, strict=True)):
        x = _LABELS + index * _pitch(picture)
        sheet.paste(picture, (x, y))
        draw.text((x, y + picture.height + 2), caption, _INK, small)


def _pitch(tile: Image.Image) -> int:
    """From one picture's left edge to the next one's; a caption fits below a narrow one."""
    return max(tile.width, 64) + _GAP
