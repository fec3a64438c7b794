"""The whole climb on small noisy pictures: what must be refused is, what helps is kept, and why."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from runtime.recipe import Strategy, load_recipe
from tests.conftest import draw_nothing
from train.__main__ import main as train
from train.checkpoint import read_checkpoint
from train.record import Rung, Training

ROOT = Path(__file__).resolve().parent.parent
RUNGS: tuple[Strategy, ...] = ("feature-extraction", "coral", "fine-tuning", "adversarial")

RECIPE = """
name = "{name}"
[data]
{data}
[data.splits]
train = 0.5
validation = 0.3
test = 0.2
[input]
size = [48, 48]
channels = 1
[source]
epochs = 1
{source}
[train]
strategy = "{strategy}"
freeze = ["conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"]
[train.fine_tuning]
epochs = 2
min_steps = 8
batch = 32
[train.adversarial]
epochs = 2
batch = 32
min_images = 40
hidden = 16
[train.similarity]
images = 8
"""


def stripes(class_index: int, number: int, *, shade: float = 0.0) -> Image.Image:
    """Faint stripes of one of two widths in noise: some pictures are hard to tell.

    ``shade`` darkens and tilts the light, which a model of clean pictures has not seen.
    """
    random = np.random.default_rng([class_index, number])
    at = np.arange(48) * (class_index + 1) * 6 * np.pi / 48 + random.uniform(0, 2 * np.pi)
    levels = 128 + 10 * np.sin(at) + random.normal(0, 36, (48, 48))
    tilt = np.linspace(-1, 1, 48)[:, None] * 90 * shade
    return Image.fromarray(np.clip(levels * (1 - 0.6 * shade) + tilt, 0, 255).astype(np.uint8))


def write(folder: Path, counts: dict[str, int], first: int, shade: float = 0.0) -> Path:
    for index, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(first, first + count):
            stripes(index, number, shade=shade).save(folder / name / f"{number:04}.png")
    return folder


Climb = Callable[..., Training]


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``source``, ``field`` (shaded) and ``dark`` (more so), and a cache for all runs."""
    folder = tmp_path_factory.mktemp("domains")
    write(folder / "source", {"wide": 130, "fine": 130}, 0)
    write(folder / "field", {"wide": 120, "fine": 120}, 1000, shade=0.9)
    write(folder / "dark", {"wide": 120, "fine": 120}, 1000, shade=1.1)
    (folder / "cache").mkdir()
    return folder


@pytest.fixture
def climb(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Climb:
    """Run the command in ``tmp_path`` with these lines of ``[data]``; the record it leaves.

    With 140 images of each domain; where it is asked whether something is proven, with all.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "cache").symlink_to(domains / "cache")

    def run(
        data: str, strategy: str = "auto", *, name: str = "t", has_source: bool = True,
        source: str = "", change: tuple[str, str] = ("", ""), drawn: bool = False,
        limit: int = 140,
    ) -> Training:  # fmt: skip
        if has_source:
            data = f'source = "{domains / "source"}"\n{data}'
        data = f"{data}\nlimit = {limit}"
        text = RECIPE.format(name=name, data=data, strategy=strategy, source=source)
        text = text.replace(*change) if change[0] else text
        (tmp_path / f"{name}.toml").write_text(text)
        with monkeypatch.context() as patch:
            if not drawn:
                draw_nothing(patch)
            assert train([str(tmp_path / f"{name}.toml")]) == 0
        path = tmp_path / "build" / name / "train" / "training.json"
        return msgspec.json.decode(path.read_bytes(), type=Training)

    return run


def named(training: Training, name: str) -> Rung:
    return next(rung for rung in training.rungs if rung.name == name)


def listed(folder: Path, target: Path, labels: str) -> str:
    """A CSV of ``target`` in which labels are shuffled, swapped, or missing."""
    files = sorted(target.rglob("*.png"))
    names = [file.parent.name if labels != "missing" else "" for file in files]
    if labels == "shuffled":
        names = list(np.random.default_rng(8).permutation(names))
    if labels == "swapped":
        names = [{"wide": "fine", "fine": "wide"}[name] for name in names]
    rows = zip(map(str, files), names, strict=True)
    with (folder / "listed.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label"), *rows])
    return f'target = "{folder / "listed.csv"}"'


def test_a_real_shift_is_adapted_to_and_the_record_says_how(
    domains: Path, tmp_path: Path, climb: Climb
) -> None:
    training = climb(f'target = "{domains / "field"}"', drawn=True, limit=0)
    folder = tmp_path / "build" / "t" / "train"
    first, kept = training.rungs[0], next(rung for rung in training.rungs if rung.kept)
    assert first.name == "as is"
    assert kept.rung >= 1
    assert training.verified
    assert kept.verdict is not None
    assert kept.verdict.gain is not None
    assert kept.verdict.gain.low > 0
    assert kept.scores["target-test"].metric("auc") > first.scores["target-test"].metric("auc")
    assert all(rung.reason for rung in training.rungs)
    assert all(rung.similarity is not None for rung in training.rungs)
    assert training.labels_used == 120
    assert training.labels_held_out == 72
    _, facts = read_checkpoint(folder / "checkpoint.safetensors")
    assert (facts.rung, facts.verified, facts.labels_used) == (kept.name, True, 120)
    for name in ("similarity.md", "ladder.png", "robustness.png", "curves.png"):
        assert (folder / name).stat().st_size > 500, name
    assert "verified" in (folder / "similarity.md").read_text()
    assert not list(folder.glob("re*-*.safetensors")), "states of a finished run go"
    assert not list(folder.glob("rung-*.safetensors"))


def test_the_checkpoint_answers_at_the_threshold_that_was_judged(
    domains: Path, tmp_path: Path, climb: Climb
) -> None:
    import torch

    from runtime import metrics
    from runtime.dataset import read_dataset
    from train.device import Device
    from train.material import Material

    training = climb(f'target = "{domains / "field"}"', "feature-extraction", limit=0)
    folder = tmp_path / "build" / "t" / "train"
    model, _ = read_checkpoint(folder / "checkpoint.safetensors")
    dataset = read_dataset(folder / "images.json")
    recipe = load_recipe(tmp_path / "t.toml")
    material = Material(recipe, dataset, Device("cpu", torch.float32, "test"), folder, "k")
    rows = material.rows("target", "test")
    with torch.inference_mode():
        logits, _ = model(torch.from_numpy(np.array(material.pixels[rows])))
    kept = next(rung for rung in training.rungs if rung.kept)
    accuracy = metrics.accuracy(logits.numpy().argmax(1), material.labels[rows])
    assert accuracy == pytest.approx(kept.scores["target-test"].accuracy, abs=0.021)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", RUNGS)
def test_a_target_that_is_the_source_needs_no_rung(
    domains: Path, climb: Climb, strategy: Strategy
) -> None:
    training = climb(f'target = "{domains / "source"}"', strategy, limit=0)
    assert training.rung == "as is"
    tried = [rung for rung in training.rungs if rung.rung]
    assert tried, "the rung was tried"
    assert not any(rung.passed for rung in tried), [rung.reason for rung in tried]


def test_a_target_that_is_the_source_ends_the_ladder_at_once(domains: Path, climb: Climb) -> None:
    training = climb(f'target = "{domains / "source"}"', limit=0)
    assert [rung.name for rung in training.rungs] == ["as is"]
    assert "within 0.03 of the source's" in training.ended
    assert training.reason == "adaptation was not needed"
    assert training.verified


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "coral"])
def test_labels_that_say_nothing_move_nothing(
    domains: Path, tmp_path: Path, climb: Climb, strategy: str
) -> None:
    training = climb(listed(tmp_path, domains / "field", "shuffled"), strategy, limit=0)
    tried = [rung for rung in training.rungs if rung.name != "as is"]
    assert tried
    assert not any(rung.passed for rung in tried), [(r.name, r.reason) for r in tried if r.passed]
    assert training.rung == "as is"
    assert "nothing that was tried was proven better" in training.reason


def test_without_field_labels_the_result_is_unverified(
    domains: Path, tmp_path: Path, climb: Climb, capsys: pytest.CaptureFixture[str]
) -> None:
    training = climb(listed(tmp_path, domains / "field", "missing"))
    assert not training.verified
    assert training.labels_used == training.labels_held_out == 0
    assert not {rung.rung for rung in training.rungs} & {2}, "nothing to fine-tune on"
    skipped = {skip.name: skip.reason for skip in training.skipped}
    assert skipped["feature extraction"] == "needs 20 labelled field training images, got 0"
    _, facts = read_checkpoint(tmp_path / "build/t/train/checkpoint.safetensors")
    assert not facts.verified
    assert "UNVERIFIED" in (tmp_path / "build/t/train/similarity.md").read_text()
    assert "UNVERIFIED" in capsys.readouterr().err


def test_prior_matching_moves_the_threshold_where_rates_are_far_off(
    domains: Path, tmp_path: Path, climb: Climb
) -> None:
    training = climb(listed(tmp_path, domains / "dark", "missing"), "as-is")
    first = training.rungs[0]
    rates = first.similarity.predicted_rates["target"] if first.similarity else ()
    assert max(rates) > 0.75, "the shade makes nearly everything one class"
    matched = named(training, "prior matching")
    assert matched.passed, matched.reason
    assert "predicted class rates were off" in matched.reason
    assert matched.similarity is not None
    assert max(matched.similarity.predicted_rates["target"]) < 0.7
    assert matched.scores["source-test"].auc == pytest.approx(first.scores["source-test"].auc)
    assert training.labels_used == 0
    assert not training.verified


@pytest.mark.slow
def test_a_brought_model_is_adapted_without_source_images(
    domains: Path, tmp_path: Path, climb: Climb
) -> None:
    """LwF stands in for replay, and the record says what could not be measured."""
    climb("", "as-is", name="first")
    shutil.copy(tmp_path / "build/first/train/checkpoint.safetensors", tmp_path / "m.safetensors")
    training = climb(
        f'target = "{domains / "field"}"', name="second", has_source=False,
        source='checkpoint = "m.safetensors"',
    )  # fmt: skip
    assert "as is of first" in training.source.origin
    assert set(training.rungs[0].scores) == {"target-validation", "target-test"}
    tuned = [rung for rung in training.rungs if rung.rung == 2]
    assert tuned
    assert tuned[0].details.against_forgetting == "lwf"
    assert "no source images" in tuned[0].reason
    assert {skip.name: skip.reason for skip in training.skipped}["adversarial"] == (
        "needs source images"
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lwf", "l2-sp"])
def test_other_ways_against_forgetting(domains: Path, climb: Climb, way: str) -> None:
    table = "[train.fine_tuning]\nepochs = "
    change = f"{table}2", f'{table}1\nagainst_forgetting = "{way}"'
    training = climb(f'target = "{domains / "field"}"', "fine-tuning", change=change)
    rung = next(rung for rung in training.rungs if rung.rung == 2)
    assert rung.details.against_forgetting == way
    assert rung.details.history is not None
    parts = rung.details.history.epochs[-1].parts
    assert ("distance" in parts) == (way == "l2-sp")
    assert ("kept answers" in parts) == (way == "lwf")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dann", "cdan", "mcc"])
def test_the_adversarial_rung_by_name(domains: Path, climb: Climb, method: str) -> None:
    table = "[train.adversarial]\nepochs = "
    training = climb(
        f'target = "{domains / "field"}"\nlabels = 30', "adversarial",
        change=(f"{table}2", f'{table}1\nmethod = "{method}"'),
    )  # fmt: skip
    rung = named(training, f"adversarial ({method})")
    assert rung.details.history is not None
    parts = rung.details.history.epochs[-1].parts
    assert ("discriminator accuracy" in parts) == (method != "mcc")
    assert training.labels_used == 30


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fine-tuning", "adversarial"])
def test_a_network_that_forgot_is_moved_back_towards_the_source_model(
    domains: Path, tmp_path: Path, climb: Climb, strategy: str
) -> None:
    """In this field the classes have each other's names: who learns it forgets the source."""
    training = climb(listed(tmp_path, domains / "field", "swapped"), strategy)
    trained = [rung for rung in training.rungs if rung.details.history is not None]
    assert [rung.details.interpolation for rung in trained[:2]] == [1.0, 0.75]
    for rung in trained[:-1]:
        assert rung.verdict is not None
        assert not all(c.passed for c in rung.verdict.checks if c.name.startswith("source"))


def test_the_source_model_is_trained_once_for_every_label_budget(
    domains: Path, tmp_path: Path, climb: Climb, capsys: pytest.CaptureFixture[str]
) -> None:
    climb(f'target = "{domains / "field"}"\nlabels = 30', "feature-extraction")
    capsys.readouterr()
    training = climb(f'target = "{domains / "field"}"\nlabels = 40', "feature-extraction")
    assert "trained before" in capsys.readouterr().err
    assert training.labels_used == 40


def test_a_simulated_field_comes_from_the_source(climb: Climb) -> None:
    training = climb('target = "simulated"', "feature-extraction")
    assert training.images["target-test"] == training.images["source-test"]
    assert training.images["target-train"] == pytest.approx(training.images["source-train"], abs=2)


def command(*words: str, folder: Path) -> "subprocess.Popen[str]":
    """``python -m WORDS`` in a process of its own, with one thread each for what it starts."""
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=folder, text=True, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def record(folder: Path) -> Training:
    path = folder / "build" / "t" / "train" / "training.json"
    return msgspec.json.decode(path.read_bytes(), type=Training)


@pytest.mark.slow
def test_two_processes_climb_as_one(domains: Path, tmp_path: Path, climb: Climb) -> None:
    alone = climb(f'target = "{domains / "field"}"', "fine-tuning")
    together = tmp_path / "together"
    (together / "build").mkdir(parents=True)
    shutil.copy(tmp_path / "t.toml", together)
    process = command(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train", "t.toml",
        folder=together,
    )  # fmt: skip
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("the ladder ended") == 1, "one process speaks for all"
    training = record(together)
    assert training.processes == 2
    assert [rung.name for rung in training.rungs] == [rung.name for rung in alone.rungs]
    for one, two in zip(alone.rungs, training.rungs, strict=True):
        for view, scores in one.scores.items():
            assert two.scores[view].metric("auc") == pytest.approx(scores.metric("auc"), abs=0.03)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    domains: Path, tmp_path: Path, climb: Climb
) -> None:
    """kill -9 after the fine-tuned network was finished, while the adversarial rung trains."""
    data = f'target = "{domains / "field"}"'
    longer = "[train.adversarial]\nepochs = 2", "[train.adversarial]\nepochs = 3\npatience = 0"
    gap = "[train.similarity]", "[train.gate]\nstop_gap = 0.0\n[train.similarity]"
    # The field stays below the source: the ladder goes up to the last rung.
    text = climb(data, "as-is", change=longer).name
    path = tmp_path / f"{text}.toml"
    path.write_text(path.read_text().replace('strategy = "as-is"', "").replace(*gap))
    process = command("train", path.name, folder=tmp_path)
    state = tmp_path / "build" / "t" / "train" / "rung-fine-tuning.safetensors"
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("adversarial: epoch 1:"):
            break
    process.kill()
    process.communicate()
    kept = state.read_bytes()
    assert train([str(path)]) == 0
    resumed = record(tmp_path)
    assert [rung.rung for rung in resumed.rungs][-1] == 3
    tuned = next(rung for rung in resumed.rungs if rung.rung == 2)
    shutil.rmtree(tmp_path / "build" / "t")
    assert train([str(path)]) == 0
    whole = record(tmp_path)
    assert kept, "the finished rung was on disk when the process died"
    assert resumed.rung == whole.rung
    assert resumed.checkpoint_sha256 == whole.checkpoint_sha256
    for one, two in zip(resumed.rungs, whole.rungs, strict=True):
        assert one.scores == two.scores
    assert tuned.scores == next(rung for rung in whole.rungs if rung.rung == 2).scores
