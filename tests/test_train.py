"""The parts of training: the head's optimum, frozen statistics, caches, and resuming."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from runtime.dataset import Dataset, Example
from runtime.errors import DataError, RecipeError
from runtime.preprocess import InputSpec
from runtime.recipe import ModelSettings, TrainSettings, parse_recipe
from train import features as features_module
from train.checkpoint import CheckpointFacts, read_checkpoint, write_checkpoint
from train.device import Device
from train.features import cached_features, compute_features
from train.finetune import Epoch, Watcher, _augment, _rate, fine_tune
from train.head import fit_head
from train.model import ImageClassifier, build_model
from train.pixels import load_pixels
from train.record import training_key

CPU = Device("cpu", torch.float32, "test")
SPEC = InputSpec(size=(32, 32), channels=1)
FREEZE = ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4")


def tiny_task(count: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dark and bright noise: pixels, labels and weights."""
    random = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int64) % 2
    pixels = random.integers(0, 100, (count, 32, 32, 1), dtype=np.uint8)
    pixels[labels == 1] += 100
    return pixels, labels, np.ones(count, dtype=np.float32)


def test_the_head_finds_the_optimum_that_scikit_learn_finds() -> None:
    random = np.random.default_rng(1)
    x = random.normal(0, 1, (200, 12)).astype(np.float32)
    x /= np.sqrt(np.mean(np.square(x)))
    y = (x @ random.normal(0, 1, (12, 3)) + random.normal(0, 1, (200, 3))).argmax(1)
    sample = random.uniform(0.5, 2.0, 200).astype(np.float32)
    sample /= sample.mean()
    l2 = 1e-2
    weight, bias = fit_head(x, y.astype(np.int64), sample, classes=3, l2=l2, epochs=400)
    # scikit-learn minimises C * sum(loss) + 1/2 |w|²; ours is mean(loss) + l2 |w|².
    reference = LogisticRegression(C=1 / (2 * l2 * 200), tol=1e-8, max_iter=2000)
    reference.fit(x, y, sample_weight=sample)
    ours = x @ weight.T + bias
    theirs = x @ reference.coef_.T + reference.intercept_
    np.testing.assert_allclose(ours - ours.mean(1, keepdims=True),
                               theirs - theirs.mean(1, keepdims=True), atol=0.02)  # fmt: skip


def test_features_leave_the_frozen_backbone_as_it_was() -> None:
    """In train mode its BatchNorm statistics would drift though no weight is trained."""
    model = build_model(ModelSettings(), SPEC, 2)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    pixels, _, _ = tiny_task()
    alone = compute_features(model, pixels[:1], CPU)
    together = compute_features(model, pixels, CPU)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-4, atol=1e-5)


def test_features_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(ModelSettings(), SPEC, 2)
    pixels, _, _ = tiny_task(8)
    calls = []
    real = features_module.compute_features

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(features_module, "compute_features", counted)

    def load(images: str = "a") -> np.ndarray:
        return cached_features(model, pixels, images, tmp_path, CPU)

    first = load()
    np.testing.assert_array_equal(first, load())
    assert len(calls) == 1
    load("other images")
    assert len(calls) == 2
    with torch.no_grad():
        next(model.backbone.parameters()).add_(0.01)
    load()
    assert len(calls) == 3, "other weights must not find the old features"
    for file in tmp_path.glob("features-*.npy"):
        file.write_bytes(b"damaged")
    load()
    assert len(calls) == 4, "a damaged cache is computed again"


class Watched:
    """Collects what a run reports; can interrupt it at a step."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.epochs: list[Epoch] = []
        self.resumed_at: int | None = None
        self.interrupt_at = interrupt_at

    def watcher(self) -> Watcher:
        return Watcher(self._step, self.epochs.append, self._resumed)

    def _step(self, step: int, steps: int, loss: float, rate: float) -> None:
        self.steps.append(step)
        if step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    def _resumed(self, step: int, steps: int) -> None:
        self.resumed_at = step


def tune(
    folder: Path, watched: Watched, key: str = "k", *, poison: bool = False, **changes: Any
) -> ImageClassifier:
    torch.manual_seed(0)
    pixels, labels, weights = tiny_task()
    if poison:
        weights[5] = np.inf
    settings = TrainSettings(**{"epochs": 2, "batch": 6, "freeze": FREEZE, **changes})
    model = build_model(ModelSettings(), SPEC, 2)
    fine_tune(
        model, pixels, np.arange(len(labels)), labels, weights, settings=settings, seed=3, key=key,
        state_path=folder / "resume.safetensors", device=CPU,
        validate=lambda model: float(model.head.weight.detach().abs().sum()),
        watch=watched.watcher(),
    )  # fmt: skip
    return model


def test_fine_tuning_learns_and_keeps_statistics_and_frozen_weights(tmp_path: Path) -> None:
    start = build_model(ModelSettings(), SPEC, 2).state_dict()
    watched = Watched()
    model = tune(tmp_path, watched, learning_rate=1e-3, head_learning_rate=1e-2, epochs=3)
    pixels, labels, _ = tiny_task()
    logits, _ = model(torch.from_numpy(pixels))
    assert (logits.argmax(1).numpy() == labels).mean() > 0.9
    assert [e.epoch for e in watched.epochs] == [1, 2, 3]
    for name, tensor in model.state_dict().items():
        frozen = any(name.startswith(f"backbone.{module}.") for module in FREEZE)
        if "running" in name or "tracked" in name or frozen:
            assert torch.equal(tensor, start[name]), name


@pytest.mark.parametrize("at", [2, 4, 5])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, at: int) -> None:
    whole = tune(tmp_path / "whole", Watched())
    first = Watched(interrupt_at=at)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "parts", first)
    second = Watched()
    resumed = tune(tmp_path / "parts", second)
    assert second.resumed_at == at
    assert first.steps + second.steps == list(range(1, 9))
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_a_state_of_another_run_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, Watched(interrupt_at=3))
    other = Watched()
    tune(tmp_path, other, key="another recipe")
    assert other.resumed_at is None
    (tmp_path / "resume.safetensors").write_bytes(b"\x00" * 100)
    damaged = Watched()
    tune(tmp_path, damaged)
    assert damaged.resumed_at is None


def test_the_rate_warms_up_and_decays() -> None:
    rates = [_rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert np.argmax(rates) in (9, 10)
    assert rates[-1] < 0.01


def test_augmentation_moves_pixels_and_invents_none() -> None:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8))
    turned = _augment(images, ("flip-horizontal", "flip-vertical", "rotate-90"), 0, 0)
    assert turned.dtype == torch.uint8
    assert not torch.equal(turned, images)
    for one, other in zip(images, turned, strict=True):
        assert sorted(one.flatten().tolist()) == sorted(other.flatten().tolist())
    again = _augment(images, ("flip-horizontal", "flip-vertical", "rotate-90"), 0, 0)
    assert torch.equal(turned, again), "the same seed and step give the same pictures"
    oblong = images[:, :4]
    assert _augment(oblong, ("rotate-90",), 0, 0).shape == oblong.shape


def test_pixels_are_decoded_once_and_survive_a_damaged_cache(tmp_path: Path, pictures: Any) -> None:
    files = sorted(pictures(tmp_path / "d", {"a": 3, "b": 3}).rglob("*.png"))
    examples = [
        Example(path=str(f), sha256=f"{i:064x}", domain="source") for i, f in enumerate(files)
    ]
    cache = tmp_path / "cache"
    first = load_pixels(examples, SPEC, cache)
    assert first.shape == (6, 32, 32, 1)
    for file in files:
        file.unlink()  # a second decoding would now fail
    np.testing.assert_array_equal(load_pixels(examples, SPEC, cache), first)
    with pytest.raises(DataError, match=r"0000\.png"):
        load_pixels(examples, InputSpec(size=(16, 16), channels=1), cache)
    assert len(list(cache.iterdir())) == 1, "a failed decoding leaves nothing"


def test_a_checkpoint_comes_back_as_it_went(tmp_path: Path) -> None:
    model = build_model(ModelSettings(), SPEC, 2)
    facts = CheckpointFacts(
        name="t", classes=("a", "b"), model=ModelSettings(), input=SPEC, recipe_sha256="0" * 64,
        dataset_sha256="1" * 64, rung="test", temperature=1.5,
    )  # fmt: skip
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, model, facts)
    loaded, read = read_checkpoint(path)
    assert read == facts
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(DataError, match="no checkpoint; run `make train`"):
        read_checkpoint(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged"):
        read_checkpoint(path)


def test_a_loss_scaler_survives_its_record() -> None:
    """Half precision on older GPUs: the interval must come back as the integer it was."""
    import msgspec

    from train.finetune import _State

    scaler = torch.amp.GradScaler("cpu", enabled=True)
    state = _State(key="k", scaler=scaler.state_dict())
    back = msgspec.json.decode(msgspec.json.encode(state), type=_State)
    assert back.scaler == scaler.state_dict()
    assert isinstance(back.scaler["growth_interval"], int)


def test_a_diverging_run_stops_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"diverged at step \d+ of 8 .*lower it"):
        tune(tmp_path, Watched(), poison=True)


def test_other_weights_in_the_same_file_are_another_run(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    dataset = Dataset(classes=("a", "b"), examples=())
    text = f'name = "t"\n[data]\nsource = "s"\n[model]\nweights = "{file}"\n'
    recipe = parse_recipe(text, "t.toml")
    first = training_key(recipe, dataset)
    assert training_key(recipe, dataset) == first
    file.write_bytes(b"two")
    assert training_key(recipe, dataset) != first
