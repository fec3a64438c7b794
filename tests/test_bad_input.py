"""What users get wrong: one clear line, exit code 1, and nothing half-written."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from export.__main__ import main as export
from train.__main__ import main as train

ROOT = Path(__file__).resolve().parent.parent
QUICK = ROOT / "train" / "recipes" / "quick.toml"
Pictures = Callable[..., Path]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(folder: Path, **lines: str) -> Path:
    """A small recipe over ``source`` and ``target`` folders; ``lines`` replace tables."""
    tables = {
        "data": 'source = "source"\ntarget = "target"',
        "input": "size = [32, 32]\nchannels = 1",
        "model": 'architecture = "test_resnet"\nweights = "random"',
        "train": 'strategy = "feature-extraction"',
        "source": "epochs = 1",
        "train.head": "epochs = 5",
        **lines,
    }
    text = 'name = "bad"\n' + "".join(f"[{name}]\n{body}\n" for name, body in tables.items())
    path = folder / "bad.toml"
    path.write_text(text)
    return path


def fails(
    command: Callable[[list[str]], int], path: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """The last line of stderr of a command that must fail with exit code 1."""
    assert command([str(path)]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def nothing_half_written(folder: Path) -> None:
    """No checkpoint or bundle, and no temporary file anywhere below."""
    for path in (folder / "build").rglob("*") if (folder / "build").exists() else []:
        assert not path.name.startswith("."), path
        assert path.name not in ("checkpoint.safetensors", "training.json", "bundle"), path


def spoil(index: int) -> Callable[[Path], None]:
    """Damage one image of the source in one of several ways."""

    def act(folder: Path) -> None:
        file = sorted((folder / "source").rglob("*.png"))[0]
        if index == 0:
            file.write_bytes(b"")
        elif index == 1:
            file.write_bytes(b"garbage")
        elif index == 2:
            file.write_bytes(file.read_bytes()[:80])
        else:
            wide = Image.new("1", (70_000, 2_000))
            wide.save(file)

    return act


@pytest.mark.parametrize("index", range(4), ids=["empty", "garbage", "truncated", "giant"])
def test_too_many_unreadable_images(
    here: Path, pictures: Pictures, capsys: pytest.CaptureFixture[str], index: int
) -> None:
    for domain in ("source", "target"):
        pictures(here / domain, {"bad": 8, "good": 8}, first=100 * (domain == "target"))
    spoil(index)(here)
    line = fails(train, recipe(here), capsys)
    assert "0000.png" in line
    nothing_half_written(here)


def test_one_unreadable_image_of_many_is_set_aside(
    here: Path, pictures: Pictures, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(here / "source", {"bad": 60, "good": 60})
    spoil(2)(here)
    assert train([str(recipe(here, data='source = "source"'))]) == 0
    error = capsys.readouterr().err
    assert "set aside: " in error
    assert "0000.png" in error
    assert "0000.png" in (here / "build/bad/train/images.json").read_text()


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (None, {"a": 8, "b": 8}, "source"),
        ({}, {"a": 8, "b": 8}, "source"),
        ({"a": 8, "b": 8}, None, "target"),
        ({"a": 8, "b": 8}, {}, "target"),
        ({"a": 8}, {"a": 8}, "two or more classes"),
        ({"good": 8, "bad": 8}, {"good": 8, "baad": 8}, "did you mean 'bad'?"),
    ],
)
def test_domains_that_cannot_be_used(
    here: Path,
    pictures: Pictures,
    capsys: pytest.CaptureFixture[str],
    source: dict[str, int] | None,
    target: dict[str, int] | None,
    message: str,
) -> None:
    for name, counts in (("source", source), ("target", target)):
        if counts is not None:
            (here / name).mkdir()
            pictures(here / name, counts, first=100 * (name == "target"))
    assert message in fails(train, recipe(here), capsys)
    nothing_half_written(here)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"source": "epocs = 3"}, "[source]: unknown key 'epocs'; did you mean 'epochs'?"),
        ({"source": "epochs = 0"}, "[source.epochs]"),
        ({"train": "epochs = 3"}, "[train]: unknown key 'epochs'; it belongs to [source]"),
        ({"trian": "epochs = 3"}, "did you mean 'train'?"),
        ({"train": 'strategy = "fine-tunning"'}, "fine-tuning"),
        ({"model": 'architecture = "efficientnet_lite"'}, "did you mean"),
        ({"input": "size = [32, 32]\nchannels = 2"}, "channels"),
        ({"train": "epochs = "}, "not valid TOML"),
        ({"train.head": "l2 = []"}, "one or more finite strengths"),
        ({"export": 'forms = ["fp16", "fp16"]'}, "each form once"),
    ],
)
def test_recipes_that_cannot_be_used(
    here: Path,
    pictures: Pictures,
    capsys: pytest.CaptureFixture[str],
    lines: dict[str, str],
    message: str,
) -> None:
    pictures(here / "source", {"a": 8, "b": 8})
    data = {"data": 'source = "source"'}
    assert message in fails(train, recipe(here, **{**data, **lines}), capsys)
    nothing_half_written(here)


def test_a_missing_recipe_lists_those_that_are_there(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe(here)
    line = fails(train, here / "none.toml", capsys)
    assert "no such recipe" in line
    assert "bad.toml" in line


def test_weights_of_another_architecture(
    here: Path, pictures: Pictures, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(here / "source", {"a": 8, "b": 8})
    save_file(timm.create_model("resnet18").state_dict(), here / "resnet.safetensors")
    path = recipe(here, data='source = "source"', model='weights = "resnet.safetensors"')
    assert "not the weights of efficientnet_lite0" in fails(train, path, capsys)
    nothing_half_written(here)


def test_export_before_training_or_with_another_recipe(
    here: Path, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "run `python -m train RECIPE` first" in fails(export, QUICK, capsys)
    shutil.copytree(quick / "build/quick/train", here / "build/quick/train")
    other = here / "other.toml"
    other.write_text(QUICK.read_text().replace("[48, 48]", "[96, 96]"))
    assert "trained with another [input]" in fails(export, other, capsys)
    other.write_text(QUICK.read_text().replace("epochs = 1", "epochs = 2", 1))
    assert "[source], [train] or fieldfit changed since training" in fails(export, other, capsys)
    images = here / "build/quick/train/images.json"
    listed = images.read_text()
    images.write_text(listed.replace('"split": "test"', '"split": "train"', 1))
    assert "splits changed since training" in fails(export, QUICK, capsys)
    images.write_text(listed)
    checkpoint = here / "build/quick/train/checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert "damaged" in fails(export, QUICK, capsys)
    assert not (here / "build/quick/bundle").exists()


def run(arguments: list[str], folder: Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip


def limit_files(size: int) -> Callable[[], None]:
    """Files may not grow beyond ``size`` bytes: a full disk without needing one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("room", "size"), [("train", 100_000), ("train", 1_000_000), ("export", 1_600_000)]
)
def test_a_full_disk(small: Path, tmp_path: Path, room: str, size: int) -> None:
    """While decoding, while writing the checkpoint, and while writing the zip."""
    if room == "export":
        shutil.copytree(small / "build/small/train", tmp_path / "build/small/train")
    done = run([room, str(small / "small.toml")], tmp_path, preexec_fn=limit_files(size))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "the file may not grow so large here" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "build/small/bundle").exists()
    assert not (tmp_path / "build/small/train/training.json").exists() or room == "export"
    assert not list((tmp_path / "build").rglob(".*")), "temporary files are removed"


def interrupt(room: str, recipe: Path, after: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in the recipe's folder and press Ctrl-C once ``after`` has been said."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", room, str(recipe)],
        cwd=recipe.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stderr is not None
    heard = []
    for line in process.stderr:
        heard.append(line)
        if after in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=120)
    return subprocess.CompletedProcess([], process.returncode, "", "".join(heard) + rest)


def test_ctrl_c_while_fine_tuning_and_the_same_command_again(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    longer = ("[train.fine_tuning]\nepochs = 1", "[train.fine_tuning]\nepochs = 15\npatience = 0")
    path.write_text((small / "small.toml").read_text().replace(*longer))
    done = interrupt("train", path, "fine-tuning: epoch 1:")
    assert done.returncode == 130, done.stderr
    assert "the same command goes on from here" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    nothing_half_written(tmp_path)
    assert (tmp_path / "build/small/train/resume-fine-tuning.safetensors").exists()
    again = run(["train", str(path)], tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stderr


@pytest.mark.parametrize(
    ("room", "after"),
    [("train", "images"), ("train", "training on"), ("export", "fp16: passed")],
)
def test_ctrl_c_at_other_stages(small: Path, tmp_path: Path, room: str, after: str) -> None:
    if room == "export":
        shutil.copytree(small / "build", tmp_path / "build")
    path = Path(shutil.copy(small / "small.toml", tmp_path))
    done = interrupt(room, path, after)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "build/small/bundle").exists()
    assert not list((tmp_path / "build").rglob(".*")), "temporary files are removed"
