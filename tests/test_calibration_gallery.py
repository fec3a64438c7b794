"""The gallery: every image with its reason, in one file that asks for nothing else."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.gallery import SIDE, thumbnail, write_gallery
from calibration.images import Choice, Chosen
from runtime.dataset import SetAside
from runtime.errors import DataError
from runtime.preprocess import InputSpec

SPEC = InputSpec(size=(96, 160), channels=1)


class Page(HTMLParser):
    """What a browser finds: attributes of every element, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write_picture(path: Path, left: int, right: int) -> str:
    levels = np.full((48, 80), left, np.uint8)
    levels[:, 40:] = right
    Image.fromarray(levels).save(path)
    return str(path)


def choose(folder: Path) -> Choice:
    return Choice(
        chosen=(
            Chosen(
                path=write_picture(folder / "a&b.png", 20, 200),
                sha256="0" * 64,
                label="<cracked>",
                reason="number 1 of '<cracked>', the first",
            ),
            Chosen(
                path=write_picture(folder / "c.png", 90, 40),
                sha256="1" * 64,
                label=None,
                reason="unlabelled, in seeded order",
            ),
        ),
        refused=(
            SetAside(path=write_picture(folder / "black.png", 0, 0), reason="black: no level"),
            SetAside(path=str(folder / "gone.png"), reason="unreadable: No such file"),
        ),
        candidates=9,
    )


def gallery(folder: Path) -> str:
    path = folder / "gallery.html"
    write_gallery(
        path, choose(folder), SPEC, title="Images of <cells>", classes=("<cracked>", "good")
    )
    return path.read_text(encoding="utf-8")


def test_every_image_is_shown_with_its_reason_and_every_class_counted(tmp_path: Path) -> None:
    page = Page(gallery(tmp_path))
    pictures = page.all("img")
    assert [picture["alt"] for picture in pictures] == [
        "<cracked>: a&b.png",
        "unlabelled: c.png",
        "refused: black.png",
    ]
    assert len(page.all("figure")) == 4
    assert "no picture" in page.text
    choice = choose(tmp_path)
    reasons = [image.reason for image in choice.chosen] + [r.reason for r in choice.refused]
    assert all(reason in page.text for reason in reasons)
    assert "2 of 9 images of the training split; 2 refused" in page.text
    rows = re.findall(r"<tr.*?</tr>", gallery(tmp_path))
    assert [re.sub("<[^>]*>", " ", row).split()[-1] for row in rows] == ["1", "0", "1"]
    assert [' class="none"' in row for row in rows] == [False, True, False]


def test_a_thumbnail_is_what_the_model_sees(tmp_path: Path) -> None:
    data = str(Page(gallery(tmp_path)).all("img")[0]["src"])
    assert data.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (SIDE, round(SIDE * 96 / 160))
        levels = np.asarray(picture).astype(int)
    assert abs(levels[:, :60] - 20).max() < 12
    assert abs(levels[:, -60:] - 200).max() < 12
    colour = thumbnail(tmp_path / "c.png", InputSpec(size=(64, 64), channels=3))
    with Image.open(io.BytesIO(colour)) as picture:
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
    with pytest.raises(DataError, match=r"gone\.png"):
        thumbnail(tmp_path / "gone.png", SPEC)


def test_the_page_asks_nothing_of_any_network(tmp_path: Path) -> None:
    html = gallery(tmp_path)
    page = Page(html)
    assert not page.all("script") + page.all("link") + page.all("iframe")
    sources = [v for _, attributes in page.elements for k, v in attributes.items() if k == "src"]
    assert all(str(source).startswith("data:") for source in sources)
    assert "url(" not in html
    assert "http:" not in html
    assert "https:" not in html
    assert "<cracked>" not in html
