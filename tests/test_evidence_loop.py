"""Field drift is planted, noticed, collected and trained on, and the new bundle is better on it."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import pipeline
from export.__main__ import main as export
from runtime.__main__ import main as fieldfit
from runtime.classifier import Classifier
from runtime.line.evidence import Evidence
from runtime.line.evidence_folder import Caps
from runtime.line.health import Health
from runtime.line.inspection import Inspector
from runtime.sources.frame import Frame
from tests.conftest import draw, draw_nothing
from train.__main__ import main as train

CLASSES = ("bad", "good")
PERIOD_S = 45.0
"""Between two parts: the caps of a day see a day of this line."""

RECIPE = """
name = "line"

[data]
source = "source"
target = "target"
{evidence}

[input]
size = [48, 48]
channels = 1

[source]
epochs = 1

[train]
freeze = ["conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"]
strategy = "feature-extraction"

[train.similarity]
images = 8

[calibration]
images = 16

[export]
version = "{version}"
ok = ["good"]
max_error_accepted = 0.05
forms = []
golden = 4
"""


def part(number: int) -> Image.Image:
    """A part as the camera was set up for it; odd ones are good."""
    return draw(number % 2, number)


def drifted(number: int) -> Image.Image:
    """The same by a failing lamp, which the camera makes up for with gain, and so with noise."""
    levels = np.asarray(part(number)) * 0.4
    noise = np.random.default_rng(number).normal(0, 40, levels.shape)
    return Image.fromarray(np.clip(levels + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


FRESH = range(5000, 5200)
"""Parts that nobody saw before."""


def accuracy(bundle: Path, look: Callable[[int], Image.Image]) -> float:
    with Classifier.open(bundle, threads=1) as classifier:
        answers = classifier([encoded(look(number)) for number in FRESH])
    right = [answer.label == CLASSES[n % 2] for n, answer in zip(FRESH, answers, strict=True)]
    return float(np.mean(right))


def release(version: str, evidence: str = "") -> Path:
    """Train and export the recipe; the bundle's zip."""
    Path("line.toml").write_text(RECIPE.format(version=version, evidence=evidence))
    assert train(["line.toml"]) == 0
    assert export(["line.toml"]) == 0
    return Path("build/line") / f"line-{version}.zip"


def watch(bundle: Path, frames: Iterable[tuple[str, Image.Image]], state: Path) -> list[str]:
    """What a line says of drift, window by window, while it inspects and keeps evidence."""
    now = 0.0
    said = []
    with Classifier.open(bundle, threads=1) as classifier:
        health = Health(classifier.bundle)
        inspector = Inspector(classifier, boot="b", checks=health)
        evidence = Evidence(
            state / "evidence", Caps(reserve=0), drifts=health.drifts, clock=lambda: now,
            draw=np.random.default_rng(0).random,
        )  # fmt: skip
        for name, image in frames:
            frame = Frame("cam", name, encoded(image), 1.7e9 + now, now)
            inspected = inspector.inspect(frame, 0.0)
            before = health.report
            for beside in (health, evidence):
                beside.judged(frame, inspected, inspected.finding)
            if health.report is not before and health.report is not None:
                said.append("drift" if health.report.drifted else "no drift")
            evidence._tasks.join()  # this line is faster than time
            now += PERIOD_S
        evidence.close()
    return said


def label(pack: Path, share: float) -> None:
    """Somebody fills in a part of the table that came with the pack."""
    with zipfile.ZipFile(pack) as archive:
        names = {r["image"]: r["frame"] for r in json.loads(archive.read("pack.json"))["records"]}
        rows = list(csv.DictReader(io.StringIO(archive.read("labels.csv").decode())))
    for row in rows[: int(share * len(rows))]:
        row["label"] = CLASSES[int(names[row["name"]]) % 2]
    with pack.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)


@pytest.mark.slow
def test_drift_is_noticed_collected_and_trained_on_and_the_new_bundle_is_better_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "TIMED_SECONDS", 0.2)
    draw_nothing(monkeypatch)
    for domain, numbers in (("source", range(160)), ("target", range(1000, 1200))):
        for number in numbers:
            folder = tmp_path / domain / CLASSES[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            part(number).save(folder / f"{number}.png")
    old = release("1.0.0")
    stream = [(str(n), part(n)) for n in range(2000, 2200)]
    stream += [(str(n), drifted(n)) for n in range(2200, 2800)]
    said = watch(old, stream, tmp_path / "state")
    assert said == ["no drift"] + ["drift"] * 3
    assert fieldfit(["collect", "--state", "state", "--out", "monday.zip", "--json"]) == 0
    reasons = json.loads(capsys.readouterr().out.splitlines()[-1])["reasons"]
    assert reasons["drifted"] > 100
    label(tmp_path / "monday.zip", 0.75)
    new = release("1.1.0", 'evidence = ["monday.zip"]')
    clean, dark = accuracy(old, part), accuracy(old, drifted)
    clean_after, dark_after = accuracy(new, part), accuracy(new, drifted)
    assert dark < 0.75 < clean
    assert dark_after > dark + 0.15
    assert clean_after > clean - 0.02
