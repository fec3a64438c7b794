"""The release report: one page that a browser shows without complaint, from records that fit."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from export.__main__ import main
from export.answers import ANSWERS, encode_answers, read_answers
from export.release import RELEASE, FormReport, Release, encode_release
from export.report import ladder, reproduce, retention, robustness, verdict
from export.report.contents import sections
from export.report.facts import Facts, read_facts
from export.report.page import REPORT, write_page
from runtime.dataset import read_dataset, write_dataset
from tests.browser import Browser, browser
from tests.conftest import QUICK, ROOT

IDS = (
    "verdict", "ladder", "samples", "answers", "flipped", "retention", "robustness", "calibration",
    "precision", "selective", "reproduce",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def facts(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Facts:
    monkeypatch.chdir(quick)
    return read_facts(QUICK)


@pytest.fixture
def build(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the quick build that a test may spoil, below the working directory."""
    monkeypatch.chdir(tmp_path)
    leave = shutil.ignore_patterns("*.onnx", "*.zip", "samples", "tensorboard", REPORT)
    return Path(
        shutil.copytree(quick / "build" / "quick", tmp_path / "build" / "quick", ignore=leave)
    )


def test_export_leaves_a_page_with_every_section_that_loads_nothing(
    quick: Path, page: Browser
) -> None:
    file = quick / "build" / "quick" / REPORT
    assert file.stat().st_size < 15_000_000
    page.resize(1200, 900)
    page.open(file.as_uri())
    assert page.run("[...document.querySelectorAll('main > section')].map(s => s.id)") == [*IDS]
    assert page.run(
        "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))"
    )
    assert page.run("performance.getEntriesByType('resource').map(r => r.name)") == []
    assert page.run("[...document.images].length") > 0
    assert page.run("Promise.all([...document.images].map(i => i.decode())).then(() => true)")
    assert page.problems == []


@pytest.mark.parametrize("width", [1200, 390])
def test_only_what_is_wide_scrolls_sideways(quick: Path, page: Browser, width: int) -> None:
    page.resize(width, 844)
    page.open((quick / "build" / "quick" / REPORT).as_uri())
    page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.run("document.documentElement.scrollWidth") == width


def test_words_and_drawings_stand_out_from_dark_and_light_paper(quick: Path, page: Browser) -> None:
    colours = {}
    for dark in (False, True):
        page.resize(390, 844, dark=dark)
        page.open((quick / "build" / "quick" / REPORT).as_uri())
        colours[dark] = [
            page.run(f"getComputedStyle(document.querySelector({where!r})).{what}")
            for where, what in (
                ("body", "color"), (".soft", "color"), ("#ladder svg", "color"),
                ("#ladder path[style*='stroke: var(--green)']", "stroke"),
                ("body", "backgroundColor"),
            )
        ]  # fmt: skip
    for dark, (*inks, paper) in colours.items():
        assert min(_contrast(ink, paper) for ink in inks) >= 4.5, (dark, inks, paper)
    assert all(light != dark for light, dark in zip(*colours.values(), strict=True))


def _contrast(one: str, other: str) -> float:
    """Of two CSS colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        levels = [int(level) / 255 for level in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in levels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_picture_and_drawing_says_in_words_what_it_shows(quick: Path, page: Browser) -> None:
    page.open((quick / "build" / "quick" / REPORT).as_uri())
    assert page.run("[...document.images].filter(i => !i.alt).length") == 0
    drawings = "[...document.querySelectorAll('.drawing > svg')]"
    assert page.run(f"{drawings}.length") >= 3
    assert page.run(f"{drawings}.filter(d => !d.ariaLabel).length") == 0
    assert page.run("[...document.querySelectorAll('th')].filter(h => !h.scope).length") == 0
    names = "document.querySelectorAll('[id]')"
    assert page.run(f"new Set([...{names}].map(e => e.id)).size === {names}.length")


def test_a_page_without_its_images_says_so_where_they_were(
    build: Path, page: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = build / "train" / "images.json"
    dataset = read_dataset(listed)
    moved = [msgspec.structs.replace(e, path=f"/moved/{e.sha256}") for e in dataset.examples]
    write_dataset(listed, msgspec.structs.replace(dataset, examples=tuple(moved)))
    assert main(["report", str(QUICK)]) == 0
    assert capsys.readouterr().out == f"{build.relative_to(Path.cwd()) / REPORT}\n"
    page.open((build / REPORT).as_uri())
    assert page.run("[...document.querySelectorAll('main > section')].map(s => s.id)") == [*IDS]
    assert "not there any more" in page.run("document.querySelector('#samples').textContent")
    assert page.problems == []


def test_the_command_opens_the_page_and_says_where_it_is_if_it_cannot(
    quick: Path, tmp_path: Path
) -> None:
    program, opened = tmp_path / "browser", tmp_path / "opened"
    program.write_text(f'#!/bin/sh\necho "$1" > "{opened}"\n')
    program.chmod(0o755)
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
        f"from export.__main__ import show_page\nshow_page(Path({REPORT!r}))"
    )
    command = [sys.executable, "-c", script]
    there, nowhere = (
        subprocess.run(
            command, env={"PATH": "", "BROWSER": name}, cwd=tmp_path, capture_output=True,
            text=True, check=True,
        )
        for name in (f"{program} %s", "")
    )  # fmt: skip
    assert opened.read_text().strip() == (tmp_path / REPORT).as_uri()
    assert there.stderr == ""
    assert nowhere.stderr == f"no browser could be opened here; the report is {REPORT}\n"


def refuse(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command fails."""
    assert main(["report", str(QUICK)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("missing", "way_out"),
    [
        ("train/images.json", "run `python -m train RECIPE` first"),
        ("train/training.json", "run `make train` first"),
        ("release.json", "run `make export` first"),
        ("answers.npz", "run `make export` again"),
    ],
)
def test_what_is_not_there_is_named_with_the_way_out(
    build: Path, capsys: pytest.CaptureFixture[str], missing: str, way_out: str
) -> None:
    (build / missing).unlink()
    line = refuse(capsys)
    assert missing in line
    assert line.endswith(way_out)
    assert not (build / REPORT).exists()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive"])
def test_damaged_answers_are_told(
    build: Path, capsys: pytest.CaptureFixture[str], damage: bytes
) -> None:
    (build / "answers.npz").write_bytes(damage)
    line = refuse(capsys)
    assert line.startswith("export: build/quick/answers.npz: damaged")
    assert line.endswith("run `make export` again")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"checkpoint_sha256": "0" * 64}, "of another checkpoint than training left"),
        ({"dataset_sha256": "0" * 64}, "of other images, labels or splits than training has"),
        ({"forms": ()}, "of other answers than answers.npz holds"),
    ],
)
def test_records_of_different_exports_make_no_page(
    build: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], reason: str
) -> None:
    release = msgspec.json.decode((build / RELEASE).read_bytes(), type=Release)
    (build / RELEASE).write_bytes(encode_release(msgspec.structs.replace(release, **change)))
    assert refuse(capsys) == f"export: build/quick/{RELEASE}: {reason}; run `make export` again"


def test_a_release_of_which_nothing_was_written_says_so_first(
    facts: Facts, tmp_path: Path, page: Browser
) -> None:
    reports = tuple(_without(report) for report in facts.release.forms)
    adaptation = msgspec.structs.replace(facts.release.adaptation, verified=False)
    release = msgspec.structs.replace(facts.release, forms=reports, adaptation=adaptation)
    nothing = facts._replace(release=release, manifest=None)
    write_page(tmp_path / REPORT, nothing, (verdict.make, reproduce.make))
    page.open((tmp_path / REPORT).as_uri())
    first = page.run("document.querySelector('main > section').textContent")
    assert "Nothing ships. int8 and int8-cpu did not pass, so no bundle was written." in first
    assert "UNVERIFIED" in first
    verdicts = "[...document.querySelectorAll('#verdict td:nth-child(2)')].map(c => c.textContent)"
    assert page.run(verdicts) == ["reference", "passed", "passed", "refused", "refused"]
    assert "smallest" not in first
    assert "no INT8 for TensorRT: int8 was refused: agreement 12.00% < 98.00%" in first
    assert "fieldfit verify" not in page.run("document.querySelector('#reproduce').textContent")
    assert page.problems == []


def _without(report: FormReport) -> FormReport:
    if not report.form.startswith("int8"):
        return report
    reason = "agreement 12.00% < 98.00%"
    return msgspec.structs.replace(report, released=False, reason=reason)


def test_the_verdict_counts_what_ships(facts: Facts) -> None:
    release = facts.release
    forms = ("fp32", "fp16", "int8", "int8-cpu")
    assert tuple(report.form for report in release.forms) == forms
    assert verdict.headline(release, written=True) == (
        "fp32, fp16, int8 and int8-cpu ship: every form that was asked for passed."
    )
    some = msgspec.structs.replace(release, forms=tuple(map(_without, release.forms)))
    assert verdict.headline(some, written=True) == (
        "fp32 and fp16 ship; int8 and int8-cpu did not pass."
    )
    sizes = {report.form: report.bytes for report in some.forms}
    assert f"{sizes['fp16'] / 1e6:.1f} MB" in [
        tile.value for tile in verdict.tiles(facts._replace(release=some))
    ]


def test_a_model_that_was_not_adapted_is_compared_with_nothing(facts: Facts) -> None:
    first = facts.training.rungs[0]
    rungs = (msgspec.structs.replace(first, kept=True),)
    alone = facts._replace(training=msgspec.structs.replace(facts.training, rungs=rungs))
    assert "→" not in verdict.tiles(alone)[0].value
    assert "<svg" not in str(robustness.make(alone))
    assert ladder.make(alone).lead == f"“as is” stays: {first.reason}."
    section = retention.make(alone)
    assert section is not None
    assert section.lead == "The source model ships as it is: nothing could be forgotten."


def test_an_adapted_model_is_shown_beside_the_source_model(facts: Facts) -> None:
    last = [rung for rung in facts.training.rungs if rung.similarity][-1]
    rungs = tuple(
        msgspec.structs.replace(rung, kept=rung is last, passed=rung is last)
        for rung in facts.training.rungs
    )
    adapted = facts._replace(training=msgspec.structs.replace(facts.training, rungs=rungs))
    assert "→" in verdict.tiles(adapted)[0].value
    assert ladder.make(adapted).lead.startswith(f"“{last.name}” is kept: field auc")
    kept, swept = retention.make(adapted), robustness.make(adapted)
    assert kept is not None
    assert swept is not None
    assert f'<th scope="col" class="number">{last.name}</th>' in kept.body
    assert "<svg" in swept.body
    assert last.similarity is not None
    assert f"{last.similarity.mean_corruption_error:.2f} times" in swept.lead


def test_what_an_earlier_export_calibrated_is_not_shown_for_a_release_without_int8(
    build: Path,
) -> None:
    release = msgspec.json.decode((build / RELEASE).read_bytes(), type=Release)
    float_only = tuple(r for r in release.forms if not r.form.startswith("int8"))
    answers = read_answers(build / ANSWERS, read_dataset(build / "train" / "images.json"))
    logits = {f: a for f, a in answers.logits.items() if not f.startswith("int8")}
    (build / ANSWERS).write_bytes(encode_answers(answers.labels, logits))
    changed = msgspec.structs.replace(release, forms=float_only)
    (build / RELEASE).write_bytes(encode_release(changed))
    facts = read_facts(QUICK)
    assert (facts.choice, facts.table, facts.sensitivities) == (None, None, {})
    assert facts.manifest is None, "the bundle is of the other release"


def test_without_source_images_there_is_nothing_to_retain(facts: Facts) -> None:
    unknown: dict[str, object] = {
        "errors": None,
        "agreement": None,
        "negative_flips": None,
        "images": {},
    }
    rungs = [
        msgspec.structs.replace(
            r, similarity=r.similarity and msgspec.structs.replace(r.similarity, **unknown)
        )
        for r in facts.training.rungs
    ]
    training = msgspec.structs.replace(facts.training, rungs=tuple(rungs))
    blind = facts._replace(training=training)
    assert retention.make(blind) is None
    assert robustness.make(blind) is None


def test_each_severity_is_shown_beside_what_it_was() -> None:
    row = robustness.row("blur", (0.1, 0.5), (0.125, 0.25), 0.625)
    assert [(cell.before, cell.after, cell.shade) for cell in row.cells] == [
        ("10%", "12%", 12), ("50%", "25%", 25),
    ]  # fmt: skip
    assert (row.relative, row.better) == ("0.62", True)


def test_a_changed_working_tree_is_no_revision_to_go_back_to(facts: Facts) -> None:
    def body(git: str | None) -> str:
        release = msgspec.structs.replace(facts.release, git=git)
        return str(reproduce.make(facts._replace(release=release)).body)

    assert "git checkout abc123\n" in body("abc123")
    assert "git checkout" not in body("abc123-dirty")
    assert "Files differed from revision abc123-dirty" in body("abc123-dirty")
    assert "revision" not in body(None)


def test_the_recipe_and_the_digests_are_in_the_page(facts: Facts) -> None:
    body = str(reproduce.make(facts).body)
    assert "limit = 120" in body
    assert facts.manifest is not None
    for digest in (facts.manifest.digest, facts.release.checkpoint_sha256, facts.recipe.sha256):
        assert digest in body
    assert f"python -m train {QUICK}" in body
    assert len(sections()) == len(IDS)
