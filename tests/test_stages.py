"""Kept activations of frozen stages: the same training, or refused with the reason."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.preprocess import InputSpec
from runtime.recipe import Augmentation, ModelSettings, TrainSettings
from tests.tiny_training import CPU, FREEZE, Seen, groups, network, pictures, train
from train import stages as stages_module
from train.cut import activations, find_cut, skipping
from train.model import build_model
from train.objective import TaskLoss
from train.optimize import choose_trained
from train.stages import Plan, plan_stages

FLIPS: tuple[Augmentation, ...] = ("flip-horizontal", "flip-vertical")


@pytest.fixture(autouse=True)
def short_trainings_may_keep(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Except where it is asked whether it pays."""
    if "does_not_pay" not in request.node.name:
        monkeypatch.setattr(stages_module, "WORTH", 0)


def plan(cache: Path, **changes: Any) -> Plan:
    model = network()
    settings = TrainSettings(**{"freeze": FREEZE, "augment": FLIPS, **changes.pop("train", {})})
    choose_trained(model, settings.freeze, changes.pop("tune", ()))
    pixels, _ = pictures(12)
    return plan_stages(
        model, pixels, np.arange(3, 12),
        **{
            "train": settings, "draws": 1000, "images_sha256": "pictures", "cache": cache,
            "device": CPU, **changes,
        },
    )  # fmt: skip


@pytest.mark.parametrize("augment", [FLIPS, (*FLIPS, "rotate-90")])
def test_training_from_kept_activations_is_the_same_training(
    tmp_path: Path, augment: tuple[Augmentation, ...]
) -> None:
    """Also what pulls weights back to their start still finds those of the frozen stages.

    At a low rate: a high one makes much of the last bits that float16 rounds away.
    """

    def run(folder: Path, cache_frozen: bool) -> tuple[dict[str, Tensor], Seen, tuple[str, ...]]:
        seen = Seen()
        objective, history = train(
            folder, seen, make=lambda m: TaskLoss(m, keep_answers=0.5, l2_sp=0.01),
            schedule={"epochs": 3, "learning_rate": 2e-5},
            settings={"cache_frozen": cache_frozen, "augment": augment},
        )  # fmt: skip
        return objective.model.state_dict(), seen, history.notes

    plain, without, _ = run(tmp_path / "plain", False)
    kept, with_it, notes = run(tmp_path / "kept", True)
    assert any("up to blocks.4 are computed once" in note for note in notes), notes
    assert np.ptp(without.losses) > 0.05, "the losses say something"
    np.testing.assert_allclose(with_it.losses, without.losses, rtol=2e-3)
    start = network().state_dict()
    moved = [n for n in plain if not torch.equal(plain[n], start[n])]
    far = torch.cat([(plain[n] - start[n]).flatten() for n in moved]).norm()
    apart = torch.cat([(plain[n] - kept[n]).flatten() for n in moved]).norm()
    assert apart < 0.03 * far
    assert plain.keys() == kept.keys()


def test_kept_activations_are_those_of_each_picture(tmp_path: Path) -> None:
    made = plan(tmp_path).stages
    assert made is not None
    model = network()
    choose_trained(model, FREEZE, ())
    pixels, _ = pictures(12)
    rows, moves = np.array([11, 3, 7]), np.array([[0, 0], [1, 0], [1, 1]])
    images = pixels[rows].copy()
    images[1], images[2] = images[1][:, ::-1], images[2][::-1, ::-1]
    expected = activations(model, torch.from_numpy(images), made.cut, CPU).numpy()
    got = made.read(rows, moves)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def test_activations_are_computed_once_for_each_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    real = activations

    def counted(*arguments: Any) -> torch.Tensor:
        passes.append(len(arguments[1]))
        return real(*arguments)

    monkeypatch.setattr(stages_module, "activations", counted)

    def computed(**changes: Any) -> int:
        passes.clear()
        assert plan(tmp_path, **changes).stages is not None
        return sum(passes[1:])  # the first pass asks for the shape

    assert computed() == 9 * 4
    assert computed(draws=1) == 0, "what is there is used however few draws there are"
    assert computed(images_sha256="others") == 9 * 4
    assert computed(train={"augment": FLIPS[:1]}) == 9 * 2
    assert computed(train={"freeze": FREEZE[:3]}) == 9 * 4
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:200])
    assert computed() == 9 * 4, "a damaged file is computed again"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train": {"cache_frozen": False}}, "cache_frozen is off"),
        ({"train": {"degrade": 0.5}}, "degrade makes a new picture each time"),
        ({"train": {"freeze": ()}}, "the first stage is not frozen"),
        ({"train": {"freeze": ("blocks.1",)}}, "the first stage is not frozen"),
        ({"draws": 71}, "71 draws of 36 pictures are too few"),
        ({"train": {"freeze": ()}, "tune": ("conv_stem",)}, "the first stage is not frozen"),
    ],
)
def test_what_cannot_be_kept_or_does_not_pay_is_not_and_says_why(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    refused = plan(tmp_path / "cache", **changes)
    assert refused.stages is None
    assert why in refused.reason
    assert not list(tmp_path.glob("cache/*"))


def test_a_disk_that_would_be_half_full_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "DISK_SHARE", 0.0)
    refused = plan(tmp_path)
    assert refused.stages is None
    assert "GiB are free" in refused.reason


@pytest.mark.parametrize(
    ("architecture", "freeze", "boundary"),
    [
        ("efficientnet_lite0", ("conv_stem", "bn1"), "bn1"),
        ("efficientnet_lite0", ("conv_stem", "bn1", "blocks.0", "blocks.2"), "blocks.0"),
        ("resnet18", ("conv1", "bn1", "layer1", "layer2.0"), "layer2.0"),
        ("convnext_atto", ("stem", "stages.0"), "stages.0"),
        # Within a residual block two tensors are alive: the cut falls back to before it.
        ("resnet18", ("conv1", "bn1", "layer1", "layer2.0.conv1"), "layer1"),
        ("vit_tiny_patch16_224", ("patch_embed", "blocks.0"), None),
    ],
)
def test_a_network_is_cut_where_the_rest_answers_as_the_whole(
    architecture: str, freeze: tuple[str, ...], boundary: str | None
) -> None:
    torch.manual_seed(0)
    spec = InputSpec(size=(64, 64), channels=1)
    model = build_model(ModelSettings(architecture=architecture, weights="random"), spec, 2)
    choose_trained(model, freeze, ())
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 1), np.uint8))
    cut, why = find_cut(model, images, CPU)
    if boundary is None:
        assert cut is None
        assert "cannot be cut" in why
        return
    assert cut is not None
    assert cut.boundary == boundary
    maps = activations(model, images, cut, CPU).permute(0, 3, 1, 2)
    with torch.inference_mode():
        whole = model.extract(images)
        with skipping(model, cut):
            rest = model.extract(maps)
        again = model.extract(images)
    torch.testing.assert_close(rest, whole, rtol=1e-3, atol=1e-4)
    assert torch.equal(again, whole), "nothing of the cut stays behind"


def test_an_interrupted_training_goes_on_from_kept_activations(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    keep: dict[str, Any] = {"settings": {"cache_frozen": True, "augment": FLIPS}}
    whole, _ = train(tmp_path / "whole", **keep)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", Seen(interrupt), **keep)
    resumed, history = train(tmp_path / "parts", **keep)
    assert "computed once" in history.notes[0]
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_the_groups_of_a_training_decide_which_images_are_kept(tmp_path: Path) -> None:
    data = [g._replace(rows=g.rows[::2], labels=g.labels[::2], teacher=None,
                       weights=g.weights[::2]) for g in groups(24)]  # fmt: skip
    train(tmp_path, data=data, settings={"cache_frozen": True, "augment": ()})
    (file,) = (tmp_path / "cache").glob("stages-*.npy")
    assert len(np.load(file, mmap_mode="r")) == 12
