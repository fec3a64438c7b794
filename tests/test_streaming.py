"""Images, features and activations on disk: computed once, read in parts, never all in memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.dataset import Example
from runtime.errors import DataError
from runtime.preprocess import InputSpec
from runtime.recipe import ModelSettings
from tests.tiny_training import CPU, SPEC, pictures
from train import features as features_module
from train import pixels as pixels_module
from train.features import cached_features, compute_features, predict
from train.model import ImageClassifier, build_model
from train.pixels import load_pixels, write_rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model() -> ImageClassifier:
    return build_model(ModelSettings(), SPEC, 2)


def test_features_leave_the_frozen_backbone_as_it_was() -> None:
    """In train mode its BatchNorm statistics would drift though no weight is trained."""
    model = build_model(ModelSettings(), SPEC, 2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    pixels, _ = pictures(24)
    alone = compute_features(model, pixels[:1], CPU)
    together = compute_features(model, pixels, CPU)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-4, atol=1e-5)


def test_rows_are_answered_in_the_order_they_are_asked_in(model: ImageClassifier) -> None:
    pixels, _ = pictures(24)
    rows = np.array([20, 3, 3, 11])
    np.testing.assert_allclose(
        compute_features(model, pixels, CPU, rows=rows),
        compute_features(model, pixels, CPU)[rows], rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    assert predict(model, pixels, CPU, rows=rows).shape == (4, 2)


def test_features_are_computed_once_and_kept_as_a_memory_map_in_half_precision(
    model: ImageClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, _ = pictures(8)
    calls: list[int] = []
    real = features_module._forward

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(features_module, "_forward", counted)

    def load(images: str = "a", model: ImageClassifier = model) -> np.ndarray:
        return cached_features(model, pixels, images, tmp_path, CPU)

    first = load()
    assert isinstance(first, np.memmap)
    assert first.dtype == np.float16
    exact = np.concatenate([features for _, features in real(model, pixels, CPU, None)])
    np.testing.assert_allclose(first, exact, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(first, load())
    assert len(calls) == 1
    load("other images")
    assert len(calls) == 2
    other = build_model(ModelSettings(), SPEC, 2)
    with torch.no_grad():
        next(other.backbone.parameters()).add_(0.01)
    load(model=other)
    assert len(calls) == 3, "other weights must not find the old features"
    for file in tmp_path.glob("features-*.npy"):
        file.write_bytes(b"damaged")
    load()
    assert len(calls) == 4, "a damaged cache is computed again"


def test_features_beyond_half_precision_are_kept_in_single(tmp_path: Path) -> None:
    model = build_model(ModelSettings(), SPEC, 2)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if name in ("bn2.weight", "bn2.bias"):
                parameter.mul_(1e6)
        model.backbone.bn2.act = torch.nn.ReLU()  # type: ignore[union-attr]
    pixels, _ = pictures(8)
    kept = cached_features(model, pixels, "a", tmp_path, CPU)
    assert kept.dtype == np.float32
    np.testing.assert_allclose(kept, compute_features(model, pixels, CPU), rtol=1e-5)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_network_whose_features_are_no_numbers_is_refused(tmp_path: Path) -> None:
    model = build_model(ModelSettings(), SPEC, 2)
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="not finite numbers: its weights are damaged"):
        cached_features(model, pictures(8)[0], "a", tmp_path, CPU)
    assert not list(tmp_path.iterdir())


def test_pixels_are_decoded_once_in_order_and_survive_a_damaged_cache(
    tmp_path: Path, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels_module, "AHEAD", 2)
    files = sorted(pictures(tmp_path / "d", {"a": 3, "b": 3}).rglob("*.png"))
    examples = [
        Example(path=str(f), sha256=f"{i:064x}", domain="source") for i, f in enumerate(files)
    ]
    cache = tmp_path / "cache"
    first = np.array(load_pixels(examples, SPEC, cache))
    assert first.shape == (6, 32, 32, 1)
    alone = [load_pixels([example], SPEC, tmp_path / "alone")[0] for example in examples]
    np.testing.assert_array_equal(first, alone)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:500])
    np.testing.assert_array_equal(load_pixels(examples, SPEC, cache), first)
    for picture in files:
        picture.unlink()  # another decoding would now fail
    np.testing.assert_array_equal(load_pixels(examples, SPEC, cache), first)
    with pytest.raises(DataError, match=r"0000\.png"):
        load_pixels(examples, InputSpec(size=(16, 16), channels=1), cache)
    assert len(list(cache.iterdir())) == 1, "a failed decoding leaves nothing"


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    def parts() -> Any:
        raise AssertionError("nothing is to be computed")
        yield

    with pytest.raises(DataError, match=r"GiB are needed for 1,000,000,000 .* make room"):
        write_rows(tmp_path / "a.npy", (10**9, 10**6), np.dtype(np.float16), parts(), "features")
    assert not list(tmp_path.iterdir())


USE = """
import sys, threading, time
from pathlib import Path
import numpy as np, torch
from runtime.preprocess import InputSpec
from runtime.recipe import FineTuningSettings, ModelSettings, TrainSettings
from tests.tiny_training import CPU, Seen
from train import stages
from train.features import cached_features, predict
from train.finetune import Group, fine_tune
from train.model import build_model
from train.objective import SOURCE, TaskLoss
from train.pixels import write_rows

folder, count = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
stages.WORTH = 0
SIZE = 64
model = build_model(
    ModelSettings(architecture="mobilenetv3_small_050", weights="random"),
    InputSpec(size=(SIZE, SIZE), channels=1), 2,
)

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.003)

def images():
    for number in range(count):
        yield np.random.default_rng(number).integers(0, 256, (1, SIZE, SIZE, 1), np.uint8)

def use(pixels, rows, name):
    cached_features(model, pixels, name, folder, CPU)
    predict(model, pixels, CPU, rows=rows)
    fine_tune(
        TaskLoss(model),
        [Group("s", SOURCE, rows, rows % 2, np.ones(len(rows), np.float32), None, 16)],
        pixels=pixels, images_sha256=name, cache=folder,
        schedule=FineTuningSettings(epochs=1), min_steps=1, tune=("conv_head",), seed=0, key=name,
        train=TrainSettings(augment=()), state_path=folder / "state", device=CPU, validate=None,
        watch=Seen().watcher(),
    )

shape = count, SIZE, SIZE, 1
pixels = write_rows(folder / "p.npy", shape, np.dtype(np.uint8), images(), "images")
use(pixels, np.arange(64), "warm up")
peak = before = anonymous()
threading.Thread(target=watch, daemon=True).start()
use(pixels, np.arange(count), "all")
print(before, peak)
"""


@pytest.mark.slow
def test_ten_times_the_images_take_no_more_memory(tmp_path: Path) -> None:
    """Peaks of anonymous memory over what a first small run leaves behind: pages of mapped files
    do not count, they can be given back."""

    def growth(count: int) -> int:
        folder = tmp_path / str(count)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", USE, str(folder), str(count)], cwd=ROOT, check=True,
            # Large blocks go back to the system at once, so that the peak is what is in use.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
        before, most = map(int, done.stdout.split())
        return most - before

    few, many = growth(200), growth(2000)
    # 1,800 images more are 7.0 MiB of pixels, 3.5 MiB of features in float16 and 7.0 in float32;
    # what an allocator keeps for itself has been seen to differ by 2.6 MiB.
    assert many - few < 4 * 1024, f"KiB: {few} for 200 images, {many} for 2,000"
