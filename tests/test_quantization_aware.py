"""Quantization-aware fine-tuning: what is rounded, what is won back, and what stays as it was."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from export.onnx_graph import to_onnx
from runtime.errors import DataError, ExportError
from runtime.metrics import sqnr_db
from runtime.recipe import ModelSettings, Schedule
from tests.tiny_training import CPU, SPEC, Seen, pictures
from train.checkpoint import CheckpointFacts
from train.features import predict
from train.history import History
from train.model import ImageClassifier
from train.quantization_aware import (
    LayerQuantization,
    Plan,
    forward_rounded,
    predict_rounded,
    quantize_aware,
    rounded_weight,
)

IMAGES = 48
LAYERS = ("backbone.0", "backbone.3", "backbone.6")
NONE = np.zeros(0, np.int64)
FACTS = CheckpointFacts(
    name="tiny", classes=("dark", "bright"), model=ModelSettings(), input=SPEC,
    recipe_sha256="", dataset_sha256="", rung="", temperature=1.0, verified=True, adaptation="",
    labels_used=0,
)  # fmt: skip


def network() -> ImageClassifier:
    """Three convolutions, one of them depthwise, BatchNorms that are not neutral, and a head."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 1.0)
            module.running_mean = torch.randn(module.num_features) * 0.2
            module.running_var = torch.rand(module.num_features) + 0.3
    model = ImageClassifier(backbone, 16, 2, SPEC)
    nn.init.normal_(model.head.weight)
    return model.eval()


def layers(model: ImageClassifier) -> nn.Sequential:
    assert isinstance(model.backbone, nn.Sequential)
    return model.backbone


def plan(levels: int) -> Plan:
    """Inputs on so many levels: the normalised image in [-2.5, 2.5], activations in [0, 6]."""
    half = levels // 2
    between = LayerQuantization(6 / (levels - 1), 0, 0, levels - 1)
    return {
        "backbone.0": LayerQuantization(2.5 / half, 0, -half, half - 1),
        "backbone.3": between,
        "backbone.6": between,
    }


def tune(
    folder: Path, levels: int = 8, seen: Seen | None = None, **changes: Any
) -> tuple[ImageClassifier, History]:
    pixels, _ = pictures(IMAGES)
    settings: dict[str, Any] = {
        "source": np.arange(16), "field": np.arange(16, IMAGES), "seed": 1, "steps": 60,
        "augment": ("flip-horizontal",),
        "schedule": schedule(3e-3), **changes,
    }  # fmt: skip
    return quantize_aware(
        network(), plan(levels), pixels=pixels, state_path=folder / "resume.safetensors",
        device=CPU, watch=(seen or Seen()).watcher(), **settings,
    )  # fmt: skip


def schedule(rate: float) -> Schedule:
    return Schedule(epochs=4, batch=8, learning_rate=rate, head_learning_rate=rate, patience=0)


def weights(model: ImageClassifier) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def reference(values: np.ndarray, scale: Any, zero_point: int, low: int, high: int) -> np.ndarray:
    """Quantize, then dequantize, as ONNX says it."""
    steps = np.clip(np.rint(values / scale) + zero_point, low, high) - zero_point
    return np.asarray(steps * scale, dtype=np.float32)


def test_weights_and_inputs_are_rounded_as_onnx_rounds_them() -> None:
    model = network()
    conv = layers(model)[6]
    assert isinstance(conv, nn.Conv2d)
    uneven = LayerQuantization(0.021, 3, 0, 255)
    seen: list[torch.Tensor] = []
    handle = conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.from_numpy(pictures(8)[0])
    with torch.no_grad():
        model(images)
        rounded, _ = forward_rounded(model, {"backbone.6": uneven}, images)
        handle.remove()
        weight = conv.weight.numpy()
        scales = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / np.float32(127)
        conv.weight.copy_(torch.from_numpy(reference(weight, scales, 0, -127, 127)))
        inputs = torch.from_numpy(reference(seen[0].numpy(), np.float32(0.021), 3, 0, 255))
        expected = model.head(layers(model)[6:](inputs))
    torch.testing.assert_close(rounded, expected, rtol=1e-5, atol=1e-5)
    assert (inputs - seen[0]).abs().max() > 0.005  # 6 saturates, at 252 steps


def test_weights_of_a_channel_that_is_dead_stay_zero() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weight[1] = 0.0
    rounded = rounded_weight(weight)
    assert torch.equal(rounded[1], weight[1])
    assert torch.equal(rounded.abs().amax(1), weight.abs().amax(1))


def test_rounding_before_a_batchnorm_is_rounding_what_it_is_folded_into() -> None:
    model, folded = network(), network()
    parts = layers(folded)
    for index in (0, 3, 6):
        conv, norm = parts[index], parts[index + 1]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        parts[index], parts[index + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    images = torch.from_numpy(pictures(8)[0])
    with torch.no_grad():
        one, other = (forward_rounded(m, plan(256), images)[0] for m in (model, folded))
        unrounded, _ = model(images)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert (one - unrounded).abs().max() > 1e-3


def test_tuning_wins_back_what_rounding_costs(tmp_path: Path) -> None:
    """On images that it did not learn from, field and source ones alike."""
    pixels = 255 - pictures(IMAGES)[0]  # others, of the same kind
    model, rows = network(), np.arange(IMAGES)
    wanted = predict(model, pixels, CPU)
    before = sqnr_db(wanted, predict_rounded(model, plan(8), pixels, rows, CPU))
    tuned, history = tune(tmp_path)
    after = sqnr_db(wanted, predict_rounded(tuned, plan(8), pixels, rows, CPU))
    assert after > before + 2.0
    assert history.kept_epoch > 0
    assert history.start_score is not None
    best = history.epochs[history.kept_epoch - 1].score
    assert best is not None
    assert best > history.start_score + 3.0


def test_where_nothing_can_be_won_the_start_is_kept_on_the_grid(tmp_path: Path) -> None:
    tuned, history = tune(tmp_path, 256, schedule=schedule(1.0), steps=4)
    assert history.kept_epoch == 0
    start, end = weights(network()), weights(tuned)
    for name, tensor in start.items():
        layer = name.removesuffix(".weight")
        expected = rounded_weight(tensor) if layer in LAYERS else tensor
        assert torch.equal(end[name], expected), name


def test_statistics_and_the_given_model_stay_and_no_hook_is_left(tmp_path: Path) -> None:
    model = network()
    given = weights(model)
    pixels, _ = pictures(IMAGES)
    tuned, _ = quantize_aware(
        model, plan(8), pixels=pixels, field=np.arange(IMAGES), source=NONE, seed=1, steps=8,
        augment=(), state_path=tmp_path / "resume.safetensors", device=CPU, watch=Seen().watcher(),
    )  # fmt: skip
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, given[name]), name
    for name, tensor in weights(tuned).items():
        assert torch.equal(tensor, given[name]) == ("running" in name or "tracked" in name), name
    assert list(weights(tuned)) == list(given)
    assert not any(module._forward_pre_hooks for module in tuned.modules())
    assert not tuned.training


def test_its_weights_are_exact_in_int8_after_export(tmp_path: Path) -> None:
    """Also those behind a BatchNorm, which the graph has folded; only then may biases stay."""
    tuned, _ = tune(tmp_path)
    graph = to_onnx(tuned, FACTS).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = {node.name: constants[node.input[1]] for node in graph.node if node.op_type == "Conv"}
    assert set(found) == set(LAYERS)
    for weight in found.values():
        steps = weight / (np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)


def interrupt(at: int) -> Callable[[int], None]:
    return lambda step: os.kill(os.getpid(), signal.SIGINT) if step == at else None


def test_the_same_arguments_give_the_same_weights_also_after_an_interruption(
    tmp_path: Path,
) -> None:
    whole, _ = tune(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "halves", seen=Seen(at_step=interrupt(20)))
    seen = Seen()
    halves, _ = tune(tmp_path / "halves", seen=seen)
    assert seen.resumed_at == 20
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(halves)[name]), name


def test_the_state_of_another_plan_is_not_gone_on_from(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, seen=Seen(at_step=interrupt(2)))
    seen = Seen()
    tune(tmp_path, 16, seen, steps=4)
    assert seen.resumed_at is None


def test_a_layer_that_the_network_does_not_have_is_named() -> None:
    images = torch.from_numpy(pictures(2)[0])
    for name, found in (("backbone.9.conv", "none"), ("backbone.1", "BatchNorm2d")):
        with pytest.raises(ExportError, match=f"{name}.*{found}"):
            forward_rounded(network(), {name: LayerQuantization(0.1, 0, -128, 127)}, images)


def test_one_field_image_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 field training images or more, got 1"):
        tune(tmp_path, field=np.array([3]))
