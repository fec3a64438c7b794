"""Two releases side by side: who is better on what, whether that is sure, and the page of it."""

import argparse
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from export.__main__ import main as export
from export.compare import add_arguments, place, read_side, run
from export.comparison import (
    ACCURACY,
    AUC,
    BUNDLE,
    EQUAL,
    MISSING,
    OVERLAP,
    SIZE,
    THRESHOLD,
    WRONG,
    Line,
    Measure,
    Side,
    Value,
    accuracy,
    compare,
    headline,
    hold,
    spoken,
)
from export.release import RELEASE, Release, encode_release
from export.write_bundle import write_bundle
from runtime import metrics
from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.manifest import FileEntry, Manifest
from tests.browser import browser

ROOT = Path(__file__).resolve().parent.parent
replace = msgspec.structs.replace


def line(
    measure: Measure,
    one: float | None,
    other: float | None,
    *intervals: tuple[float, float],
    of: str = "int8",
) -> Line:
    first, second = intervals or (None, None)
    return hold(of, measure, Value(one, first), Value(other, second))


def test_intervals_that_are_apart_prove_the_better_one() -> None:
    found = line(ACCURACY, 0.8, 0.9, (0.75, 0.84), (0.86, 0.93))
    assert (found.better, found.proven, found.verdict) == ("B", True, "B")
    assert (found.one, found.other, found.change) == ("80.0%", "90.0%", "+10.0 points")
    fewer = line(WRONG, 0.05, 0.2, (0.02, 0.08), (0.15, 0.25))
    assert (fewer.better, fewer.proven) == ("A", True)


def test_intervals_that_overlap_call_nobody_better() -> None:
    found = line(ACCURACY, 0.8, 0.9, (0.75, 0.87), (0.86, 0.93))
    assert (found.better, found.proven, found.verdict) == ("", False, OVERLAP)
    touching = line(ACCURACY, 0.8, 0.9, (0.75, 0.86), (0.86, 0.93))
    assert touching.verdict == OVERLAP


def test_a_figure_without_interval_is_better_and_not_proven() -> None:
    found = line(AUC, 0.95, 0.91)
    assert (found.better, found.proven, found.verdict) == ("A", False, "A, unproven")


def test_bytes_are_counted_and_fewer_are_better() -> None:
    found = line(SIZE, 4_000_000, 3_000_000)
    assert (found.better, found.proven, found.change) == ("B", True, "-1.00 MB")


@pytest.mark.parametrize(
    ("measure", "one", "other", "verdict"),
    [
        (ACCURACY, 0.8001, 0.8002, EQUAL),  # as far as it is shown
        (ACCURACY, None, 0.9, MISSING),
        (THRESHOLD, 0.3, 0.7, ""),  # neither way is better
    ],
)
def test_where_nothing_is_better_nobody_is(
    measure: Measure, one: float | None, other: float | None, verdict: str
) -> None:
    found = line(measure, one, other)
    assert (found.better, found.verdict) == ("", verdict)


def test_the_headline_and_the_sentences_tell_proof_from_impression() -> None:
    lines = [
        line(ACCURACY, 0.8, 0.9, (0.75, 0.84), (0.86, 0.93)),
        line(AUC, 0.95, 0.91),
        line(SIZE, 4_000_000, 3_000_000),
        line(SIZE, 9_000_000, 8_000_000, of="fp32"),
    ]
    assert headline(lines) == "B is better on accuracy and size"
    assert spoken(lines, "B", proven=True) == (
        "accuracy: int8 90.0% against 80.0%",
        "size: int8 3.00 MB against 4.00 MB, fp32 8.00 MB against 9.00 MB",
    )
    assert spoken(lines, "A", proven=True) == ()
    assert spoken(lines, "A", proven=False) == ("AUC: int8 0.950 against 0.910",)
    assert headline(lines[1:2]).startswith("Nothing is proven better")
    assert headline([line(AUC, 0.9, 0.9)]) == "No figure differs"


def test_two_intervals_keep_their_order_in_the_strip() -> None:
    (low, high), (lower, higher) = place(((0.2, 0.4), (0.3, 0.8)))
    assert 0 < low < lower < high < higher < 100
    assert (low, higher) == (2, 98)


@dataclass
class Two:
    """The quick bundle and what became of it."""

    one: Path
    folder: Path

    def changed(self, change: Callable[[Release], Release], **manifest: Any) -> Path:
        """A zip of the bundle with another release in it."""
        bundle = Bundle.open(self.one)
        files = {entry.name: bundle.read(entry.name) for entry in bundle.manifest.files}
        release = msgspec.json.decode(files[RELEASE], type=Release)
        files[RELEASE] = encode_release(change(release))
        listed = tuple(
            FileEntry(name=name, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
            for name, data in files.items()
        )
        written: Manifest = replace(bundle.manifest, files=listed, **manifest)
        write_bundle(self.folder / "other", self.folder / "other.zip", written, files)
        return self.folder / "other.zip"


@pytest.fixture
def two(quick: Path, tmp_path: Path) -> Two:
    return Two(quick / "build" / "quick" / "bundle", tmp_path)


def sides(one: Path, other: Path) -> tuple[Side, Side]:
    return read_side(one), read_side(other)


def better(release: Release) -> Release:
    """Always right, without int8, from other images and another seed."""
    quality = replace(release.reference, accuracy=1.0)
    forms = tuple(
        replace(form, released=False, reason="agreement 1% < 98%") if form.form == "int8" else form
        for form in release.forms
    )
    return replace(
        release, version="0.2.0", reference=quality, forms=forms, seed=7, judged_sha256="0" * 64
    )


def test_a_bundle_against_itself_differs_in_nothing(two: Two) -> None:
    found = compare(*sides(two.one, two.one))
    assert found.headline == "No figure differs"
    assert found.doubts == ("A and B are the same bundle",)
    assert found.records == ()
    assert {each.of for each in found.lines} >= {"model", "fp32", "int8", "int8-cpu", BUNDLE}


def test_what_differs_is_told_and_nothing_else(two: Two) -> None:
    one, other = sides(two.one, two.changed(better))
    found = compare(one, other)
    assert found.headline.startswith("Only A ships int8; B is better on accuracy")
    changed = [record for record in found.records[2:] if record[0] in "+-"]
    assert [record for record in changed if "seed" in record] == ["-seed = 0", "+seed = 7"]
    assert {record[1:].partition(" ")[0] for record in changed} == {"seed", "forms:", "sha256:"}
    (images,) = found.doubts
    assert "judged on different images" in images
    assert "not paired" in images
    of_int8 = [each for each in found.lines if each.of == "int8"]
    assert [(each.one, each.other, each.better) for each in of_int8] == [("ships", "refused", "A")]
    assert "agreement 1% < 98%" in of_int8[0].reason


def test_an_accuracy_has_wilson_s_interval_at_the_gate_s_confidence(two: Two) -> None:
    quality = read_side(two.one).release.reference
    found = accuracy(quality)
    assert quality.accuracy is not None
    hits = round(quality.accuracy * quality.labelled)
    assert found.interval == metrics.wilson_interval(hits, quality.labelled, confidence=0.9)
    assert accuracy(replace(quality, accuracy=None)) == Value()


def test_other_labels_machines_and_budgets_are_doubted(two: Two) -> None:
    def change(release: Release) -> Release:
        gate = replace(release.gate, min_agreement=0.5)
        return replace(release, machine="aarch64", gate=gate, judged_sha256="")

    labels = {"labels": ("cracked", "whole"), "ok_labels": ("whole",)}
    found = compare(*sides(two.one, two.changed(change, **labels)))
    told = " / ".join(found.doubts)
    assert len(found.doubts) == 4
    assert "B knows cracked, whole" in told
    assert "not recorded which images" in told
    assert "different budgets" in told
    assert "B on aarch64" in told
    assert "+labels = cracked, whole" in found.records


def write_bundle_again(folder: Path, archive: Path) -> None:
    """``archive`` is the zip of what is in ``folder``."""
    bundle = Bundle.open(folder)
    files = {entry.name: bundle.read(entry.name) for entry in bundle.manifest.files}
    write_bundle(archive.with_suffix(""), archive, bundle.manifest, files)


def options(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_the_page_holds_both_and_fits_a_phone(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made by the command of docs/compare.md, where the bundles are as it says."""
    (command,) = re.findall(r"```sh\n(.*?)\n```", (ROOT / "docs" / "compare.md").read_text())
    _, _, program, *words = shlex.split(command)
    assert program == "export"
    other, page = two.changed(better), tmp_path / "compare.html"
    bundles = Path(words[1]), Path(words[2])
    monkeypatch.chdir(tmp_path)
    write_bundle_again(two.one, bundles[0])
    shutil.copytree(two.folder / "other", bundles[1])
    assert export(words) == 0
    shown = capsys.readouterr().err
    assert "Only A ships int8" in shown
    assert "judged on different images" in shown
    with browser(tmp_path / "profile") as window:
        for width, dark in ((1200, False), (390, True)):
            window.resize(width, 900, dark=dark)
            window.open(page.as_uri())
            assert window.run("document.documentElement.scrollWidth") == width
            assert window.problems == []
        text = window.run("document.body.innerText")
        assert "quick 0.1.0 against quick 0.2.0" in text
        assert "+seed = 7" in text
        drawn = window.run("document.querySelectorAll('.strip svg').length")
        compared = compare(*sides(two.one, other)).lines
        assert drawn == sum(each.intervals is not None for each in compared) > 0
        unnamed = "[...document.querySelectorAll('svg')].filter(e => !e.ariaLabel).length"
        assert window.run(unnamed) == 0


def test_no_bundle_and_no_release_are_said_and_nothing_is_written(
    two: Two, bundle: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(BundleError, match="nowhere"):
        run(options(two.one, tmp_path / "nowhere", "--out", page))
    opened = Bundle.open(bundle)
    files = {e.name: opened.read(e.name) for e in opened.manifest.files if e.name != RELEASE}
    kept = tuple(entry for entry in opened.manifest.files if entry.name != RELEASE)
    write_bundle(bundle, tmp_path / "old.zip", replace(opened.manifest, files=kept), files)
    with pytest.raises(BundleError, match=r"expected release\.json in the bundle"):
        run(options(two.one, bundle, "--out", page))
    assert not page.exists()


def test_comparing_needs_no_torch() -> None:
    code = "import sys, export.compare; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
