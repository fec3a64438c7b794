"""Make docs/page.png: the status page of a made-up line, as a browser shows it.

python -m docs.page_picture
"""

import io
import random
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.line.page.snapshot import Board, Camera, board_folder
from runtime.line.verdict import Word
from tests.boards import Clock, condition, verdict
from tests.browser import browser
from tests.test_page_server import page

OUT = Path(__file__).with_name("page.png")


def cell(chance: random.Random, broken: bool) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A drawing that could be a solar cell, uint8 [192, 192, 1]."""
    noise = np.random.default_rng(chance.randrange(2**32))
    coarse = noise.normal(chance.randrange(130, 185), 9, (6, 6)).astype(np.float32)
    picture = np.asarray(
        Image.fromarray(coarse).resize((192, 192), Image.Resampling.BICUBIC)
    ).copy()
    for bar in (40, 96, 152):
        picture[bar - 1 : bar + 2] -= 80
    if broken:
        x = chance.randrange(40, 110)
        for y in range(chance.randrange(20, 90), 180):
            x = min(180, max(4, x + chance.choice((-1, 0, 1, 1))))
            picture[y, x - 2 : x + 3] -= 95
    return picture.clip(0, 255).astype(np.uint8)[..., None]


def main() -> None:
    """An hour of two cameras, told in a moment."""
    chance, clock = random.Random(8), Clock()
    words: list[Word] = ["OK", "DEFECT", "ABSTAIN", "NOT INSPECTED"]
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        board = Board(board_folder(state), clock=clock)
        for number in range(7200):
            clock.now += 0.5
            odds = [0.94, 0.05, 0.009, 0.001] if 2400 < number < 3400 else [0.99, 0.008, 0.002, 0]
            (word,) = chance.choices(words, odds)
            broken = word == "DEFECT"
            at = f"2026-03-01T08:{number // 120:02d}:{number // 2 % 60:02d}Z"
            said = verdict(
                word, number, time=at, source=f"cam-{number % 2 + 1}",
                label="crack" if broken else "sound",
                score=chance.uniform(*((0.5, 0.6) if word == "ABSTAIN" else (0.96, 0.999))),
                reason="sharpness 14 is below 31" if word == "ABSTAIN" else "",
                flags=("blurred",) if word == "ABSTAIN" else (),
            )  # fmt: skip
            board.judged(said, None if word == "NOT INSPECTED" else cell(chance, broken))
            if board.due:
                board.publish(condition())
        cameras = tuple(Camera(name=f"cam-{n}", kind="camera", age_s=0.2) for n in (1, 2))
        board.publish(condition(cameras=cameras))
        with browser(state / "profile") as chrome, page(state) as port:
            chrome.resize(1280, 960)
            chrome.open(f"http://127.0.0.1:{port}/")
            chrome.until("[...document.images].every(i => i.complete)")
            shot = Image.open(io.BytesIO(chrome.picture(whole=False)))
        shot.convert("RGB").save(OUT, optimize=True)


if __name__ == "__main__":
    main()
