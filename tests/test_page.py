"""The status page as a person sees it, in headless Chromium: one browser for all of it."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from runtime.line.page import snapshot
from runtime.line.page.snapshot import Board
from runtime.line.verdict import Finding
from tests.boards import condition, image, published, rewrite, verdict
from tests.browser import Browser, browser
from tests.model_zips import model_zip
from tests.test_page_server import ATTACK, page

ROOT = Path(__file__).resolve().parent.parent
CSS = (ROOT / "runtime/line/page/page.css").read_text()
SECTIONS = ("verdicts", "notable", "recent", "sources", "speed", "health", "drift", "engine",
            "machine", "results")  # fmt: skip
LONG = "x" * 250


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as one:
        yield one


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def url(state: Path) -> Iterator[str]:
    with page(state) as port:
        yield f"http://127.0.0.1:{port}/"


def some() -> list[Finding]:
    return [
        verdict("OK", 1),
        verdict("ABSTAIN", 2, flags=("blurred",), reason="sharpness 14 is below 31"),
        verdict("NOT INSPECTED", 3, reason="camera lost: no frame for 1.2 s"),
        verdict("DEFECT", 4, label="broken"),
    ]


@pytest.fixture
def board(state: Path, chrome: Browser, url: str) -> Board:
    """What a line has just put up, and the browser shows."""
    chrome.resize(1280, 900)
    made = published(state, some())
    chrome.open(url)
    return made


def test_every_section_is_there_with_its_pictures_and_no_complaint(
    board: Board, chrome: Browser
) -> None:
    chrome.until("[...document.images].every(i => i.complete)")
    found = chrome.run("""({
        sections: [...document.querySelectorAll("section[id] h2")].map(h => h.parentNode.id),
        images: [...document.images].map(i => [i.naturalWidth, i.alt]),
        title: document.title,
        newest: document.querySelector(".newest .big").innerText,
        strip: document.querySelectorAll(".strip li:not(.empty)").length,
        styled: getComputedStyle(document.querySelector(".pair")).display,
    })""")
    assert found["sections"] == list(SECTIONS)
    assert found["title"] == "Inspecting – station-2"
    assert found["newest"] == "DEFECT"
    assert found["strip"] == 4
    assert found["styled"] == "grid"
    assert len(found["images"]) == 2 + 2 + 1
    for width, text in found["images"]:
        assert width == 64
        assert re.match(r"Frame 0{5}\d of cam-1: (DEFECT broken|ABSTAIN functional)$", text)
    assert chrome.problems == []


def test_a_new_state_comes_in_without_disturbing_what_is_open(
    board: Board, chrome: Browser
) -> None:
    chrome.run("""(() => { document.querySelector("details").open = true;
        window.kept = document.querySelector(".cards img"); kept.mark = 1; })()""")
    places = """[...document.querySelectorAll("section[id]")].map(s => [s.id, s.offsetTop])"""
    before = chrome.run(places)
    board.judged(verdict("OK", 5), image(200))
    board.publish(condition())
    chrome.until("""document.querySelectorAll(".strip li:not(.empty)").length === 5""")
    found = chrome.run("""({ open: document.querySelector("details").open,
        there: kept.isConnected && kept.mark, title: document.title,
        newest: document.querySelector(".newest .big").innerText,
        last: document.querySelector(".strip li:last-child").className })""")
    assert found == {
        "open": True, "there": 1, "title": "Inspecting – station-2", "newest": "OK", "last": "ok"
    }  # fmt: skip
    assert chrome.run(places) == before, "nothing has jumped"
    assert chrome.problems == []


def test_what_is_old_is_shown_as_old(board: Board, state: Path, chrome: Browser) -> None:
    rewrite(state, monotonic=-100.0)
    chrome.until("""document.title.startsWith("Stale")""")
    found = chrome.run("""({ word: document.querySelector(".banner .word").innerText,
        sentence: document.querySelector(".state .sentence").innerText,
        newest: document.querySelector(".newest").innerText,
        filter: getComputedStyle(document.querySelector(".body")).filter })""")
    assert found["word"] == "Stale"
    assert "Nothing below is current." in found["sentence"]
    assert found["newest"].startswith("No current verdict")
    assert found["filter"] == "grayscale(1)"
    published(state, some())
    chrome.until("""document.title.startsWith("Inspecting")""")
    assert chrome.run("getComputedStyle(document.querySelector('.body')).filter") == "none"


def test_a_page_that_hears_nothing_says_so(state: Path, chrome: Browser) -> None:
    published(state, some())
    with page(state) as port:
        chrome.open(f"http://127.0.0.1:{port}/")
        assert chrome.run("document.getElementById('lost').hidden")
    # The server is gone. Five seconds later is now: waiting for them would prove no more.
    chrome.run(
        "(now => { performance.now = () => now.call(performance) + 6000; })(performance.now)"
    )
    chrome.until("""!document.getElementById("lost").hidden""")
    found = chrome.run("""({ said: document.getElementById("lost").innerText,
        title: document.title,
        seen: [...document.querySelectorAll("main > .banner, .newest")].map(
            e => getComputedStyle(e).visibility),
        filter: getComputedStyle(document.querySelector("main")).filter })""")
    assert "Nothing below is current." in found["said"]
    assert found["title"] == "No connection"
    assert found["seen"] == ["hidden", "hidden"], "an OK of then must not look like one of now"
    assert found["filter"] == "grayscale(1)"


def test_hostile_names_are_text(state: Path, chrome: Browser, url: str) -> None:
    frames: list[Finding] = [
        verdict("DEFECT", 1, label=ATTACK, source=ATTACK, frame=ATTACK, reason=ATTACK)
    ]
    published(state, frames, device=ATTACK)
    chrome.open(url)
    chrome.run("new Promise(done => setTimeout(done, 1500))")  # the script has brought it once, too
    found = chrome.run("""({ owned: window.owned ?? null, title: document.title,
        h1: document.querySelector("h1").textContent,
        scripts: document.querySelectorAll("main script, main img:not(.picture)").length })""")
    assert found["owned"] is None
    assert found["title"].startswith('Inspecting – "><script>document.title')
    assert found["h1"].startswith('"><script>')
    assert found["scripts"] == 0
    assert chrome.problems == []
    # What would have shown it: this browser does run such a text where it is markup.
    chrome.open("data:text/html," + ATTACK)
    chrome.until("window.owned === 1")


@pytest.mark.parametrize("text", ["cam-1", LONG], ids=["usual", "long"])
def test_it_fits_a_phone_and_a_desk(state: Path, chrome: Browser, url: str, text: str) -> None:
    frames = some()
    frames.append(verdict("DEFECT", 5, label=text, source=text, frame=text, reason=text))
    frames.append(verdict("ABSTAIN", 6, flags=(text,)))
    published(
        state, frames, device=text, machine=text, stages={text: snapshot.Spread(1, 2, 123456.7)},
        cameras=(snapshot.Camera(name=text, kind=text, fault=text),),
        drift=(snapshot.Drift(of=text, p_value=1e-300, alpha=1e-3, drifted=True, window=10**9),),
        disks=(snapshot.Disk(path=text, free=1, total=2),),
        engine=snapshot.Engine(name=text, reasons=(text,), degraded=text),
    )  # fmt: skip
    for width in (320, 390, 768, 1280, 1920):
        chrome.resize(width, 800)
        chrome.open(url)
        inside, needed = chrome.run("[innerWidth, document.documentElement.scrollWidth]")
        assert (inside, needed) == (width, width)
        cut = chrome.run("""[...document.querySelectorAll("section")].filter(
            s => s.scrollWidth > s.clientWidth + 1).map(s => s.id || s.className)""")
        assert cut == [], f"cut off at {width}"


def test_a_line_that_is_killed_takes_its_page_along_and_the_next_one_tells(
    tmp_path: Path, chrome: Browser
) -> None:
    """The first command of docs/page.md, as written but for its port, on a small bundle."""
    text = (ROOT / "docs" / "page.md").read_text()
    (command,) = re.findall(r"^fieldfit (watch .*)$", text, re.MULTILINE)
    *words, _ = shlex.split(command)
    (tmp_path / "build" / "solar").mkdir(parents=True)
    archive = model_zip(tmp_path, "1", labels=("functional", "defective", "c", "d"))
    archive.rename(tmp_path / "build" / "solar" / "bundle")
    (tmp_path / "inbox").mkdir()
    Image.fromarray(image(120)[..., 0]).save(tmp_path / "inbox" / "one.png")
    state = tmp_path / "state"
    with subprocess.Popen(
        [sys.executable, "-m", "runtime", *words, "127.0.0.1:0", "--state", str(state),
         "--threads", "1"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as line:  # fmt: skip
        try:
            assert line.stderr is not None
            said = next(text for text in line.stderr if "the page is at" in text)
            chrome.open(said.split()[-1])
            chrome.until("""document.querySelectorAll(".strip li:not(.empty)").length === 1""")
            chrome.until("[...document.images].some(i => i.naturalWidth > 0)")
            assert chrome.problems == []
        finally:
            line.kill()
    # The page beside it ended with it. One that is started seconds later tells that it is dead.
    rewrite(state, monotonic=time.monotonic() - 6)
    with page(state) as port:
        chrome.open(f"http://127.0.0.1:{port}/")
        chrome.until("""document.title.startsWith("Stale")""")
        assert chrome.run("document.querySelector('.newest').innerText").startswith("No current")


def test_light_and_dark_follow_the_user(state: Path, chrome: Browser, url: str) -> None:
    published(state, some())
    backs = set()
    for dark in (False, True):
        chrome.resize(1280, 900, dark=dark)
        chrome.open(url)
        backs.add(chrome.run("getComputedStyle(document.body).backgroundColor"))
    assert backs == {"rgb(244, 245, 247)", "rgb(15, 18, 21)"}


def test_without_a_script_it_shows_the_same_and_asks_again(
    state: Path, chrome: Browser, url: str
) -> None:
    published(state, some())
    chrome("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chrome.open(url)
        found = chrome.run("""({ newest: document.querySelector(".newest .big").innerText,
            again: document.querySelector("meta[http-equiv=refresh]")?.content ?? null })""")
    finally:
        chrome("Emulation.setScriptExecutionDisabled", value=False)
    assert found == {"newest": "DEFECT", "again": "5"}


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    full = colour[1:] if len(colour) == 7 else "".join(2 * letter for letter in colour[1:])
    parts = [int(full[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_text_can_be_read_in_light_and_dark() -> None:
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w+);", block))
        for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    ]
    assert len(themes) == 2
    verdicts = ("ok", "defect", "abstain", "not-inspected")
    pairs = [(name, back) for name in ("text", "soft") for back in ("back", "card")]
    pairs += [(name, f"{name}-back") for name in verdicts] + [(name, "card") for name in verdicts]
    pairs += [("text", f"{name}-back") for name in verdicts]
    pairs += [("soft", f"{name}-back") for name in verdicts]
    pairs += [(level, "card") for level in ("healthy", "failing", "attention", "unknown")]
    pairs += [("on", name) for name in (*verdicts, "failing", "unknown")]
    for theme in themes:
        for name, back in pairs:
            assert contrast(theme[name], theme[back]) >= 4.5, (name, back)


def test_the_picture_of_it_in_the_docs_is_small() -> None:
    picture = ROOT / "docs" / "page.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 200_000


def test_the_page_starts_without_an_extra() -> None:
    code = (
        "import sys, runtime.line.page.server, runtime.verbs.page; "
        "print([n for n in ('starlette', 'uvicorn', 'cv2', 'onnxruntime') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
