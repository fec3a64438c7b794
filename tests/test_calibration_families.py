"""Real networks through export and both dialects: what onnxruntime and TensorRT-RTX make of them.

Their weights are random. A random network is chaotic, it multiplies every error; BatchNorm with a
bias of one keeps most units open and brings back what a trained network has: errors that add up.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import timm
import torch
import torchvision
from torch import nn

from calibration import onnxruntime_dialect, tensorrt_dialect
from calibration.graph import ATTENTION, Graph
from calibration.kernels import check_kernels
from calibration.quantize import Emitted
from calibration.table import Table
from export.onnx_graph import to_onnx
from export.parity import check_batches
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.engines.tensorrt_build import build
from runtime.engines.tensorrt_layers import node_precisions
from runtime.metrics import sqnr_db
from runtime.preprocess import InputSpec, UInt8
from runtime.recipe import ModelSettings
from tests.calibration_graphs import make_table
from tests.test_calibration_dialects import run
from train.checkpoint import CheckpointFacts
from train.model import ImageClassifier, build_model

pytestmark = pytest.mark.slow

SPEC = InputSpec(size=(64, 64), channels=3)
CLASSES = ("a", "b", "c", "d")


class Family(NamedTuple):
    """What is expected of one network."""

    floats: frozenset[str]
    """Operators that compute in float on onnxruntime, whatever stands between them."""
    conversions: int
    """Most QuantizeLinear and DequantizeLinear nodes there, each."""
    least_db: float
    """SQNR of the features that both dialects reach, 3 dB below what was measured."""


HEAD = {"GlobalAveragePool", "Flatten", "Gemm"}
NORM = {"LayerNormalization", "Gelu", "Add", "Mul"}

FAMILIES = {
    "resnet18": Family(frozenset(HEAD), 1, 12.5),
    "mobilenetv2_050": Family(frozenset(HEAD), 1, 8.0),
    "mobilenetv3_small_050": Family(frozenset({"HardSigmoid", "Mul", "Gemm"}), 2, 20.0),
    "efficientnet_lite0": Family(frozenset(HEAD), 1, 5.0),
    "efficientnet_b0": Family(frozenset(HEAD | {"Sigmoid", "Mul"}), 2, 8.0),
    "regnetx_002": Family(frozenset(HEAD), 1, 15.0),
    "regnety_002": Family(frozenset(HEAD), 1, 15.0),
    "shufflenet_v2_x0_5": Family(frozenset({"ReduceMean", "Gemm"}), 1, 8.0),
    "convnext_atto": Family(frozenset(HEAD | NORM), 60, 25.0),
    "convnext_atto, linear layers": Family(frozenset(HEAD | NORM | {"BiasGelu"}), 60, 25.0),
}
VIT = "vit_tiny_patch16_224"
"""Two of its blocks are enough to see what becomes of them."""

BOTH = pytest.mark.parametrize("dialect", [tensorrt_dialect, onnxruntime_dialect])


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    """One family after the other: each is exported and measured once, and then forgotten."""
    return str(request.param)


def _shufflenet() -> tuple[nn.Module, int]:
    backbone = torchvision.models.shufflenet_v2_x0_5(weights=None)
    backbone.fc = nn.Identity()
    return backbone, 1024


def _timm(architecture: str, width: int, **changes: Any) -> tuple[nn.Module, int]:
    return timm.create_model(architecture, num_classes=0, **changes), width


def network(name: str) -> ImageClassifier:
    torch.manual_seed(0)
    made: dict[str, Callable[[], tuple[nn.Module, int]]] = {
        "shufflenet_v2_x0_5": _shufflenet,
        "convnext_atto, linear layers": functools.partial(
            _timm, "convnext_atto", 320, conv_mlp=False
        ),
        VIT: functools.partial(_timm, VIT, 192, img_size=SPEC.size[0], depth=2),
    }
    if name in made:
        backbone, width = made[name]()
        model = ImageClassifier(backbone, width, len(CLASSES), SPEC).eval()
    else:
        settings = ModelSettings(architecture=name, weights="random")
        model = build_model(settings, SPEC, len(CLASSES))
    nn.init.normal_(model.head.weight, std=0.1)
    for label, parameter in model.named_parameters():
        if label.endswith(".gamma"):  # ConvNeXt begins with blocks that do next to nothing
            nn.init.normal_(parameter, 0.3, 0.1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [module.register_forward_pre_hook(_take_statistics) for module in norms]
    with torch.no_grad():
        model(torch.from_numpy(draw(32, seed=0)))
    for hook in hooks:
        hook.remove()
    return model


def _take_statistics(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    assert isinstance(norm, nn.BatchNorm2d)
    nn.init.constant_(norm.weight, 0.5)
    nn.init.constant_(norm.bias, 1.0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
    norm.running_var.fill_(inputs[0].var((0, 2, 3)).mean())


def draw(count: int, *, seed: int) -> UInt8:
    """Smooth random pictures ``[count, H, W, 3]``."""
    random, (height, width) = np.random.default_rng(seed), SPEC.size
    rough = random.uniform(0, 255, (count, height // 8, width // 8, 3))
    smooth = rough.repeat(8, axis=1).repeat(8, axis=2)
    noise = random.normal(0, 10, (count, height, width, 3))
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


@functools.lru_cache(1)
def made(name: str) -> tuple[ImageClassifier, onnx.ModelProto]:
    """The network, and its graph."""
    model = network(name)
    facts = CheckpointFacts(
        name=name.split(",")[0],
        classes=CLASSES,
        model=ModelSettings(architecture=name, weights="random"),
        input=SPEC,
        recipe_sha256="0" * 64,
        dataset_sha256="0" * 64,
        rung="source",
        temperature=1.0,
        verified=False,
        adaptation="random weights",
        labels_used=0,
    )
    return model, to_onnx(model, facts)


def exported(name: str) -> onnx.ModelProto:
    return made(name)[1]


@functools.lru_cache(1)
def table(name: str) -> Table:
    return make_table(exported(name), draw(24, seed=1))


@functools.lru_cache(1)
def on_onnxruntime(name: str) -> Emitted:
    return onnxruntime_dialect.emit(exported(name), table(name))


@functools.lru_cache(1)
def on_tensorrt(name: str) -> Emitted:
    return tensorrt_dialect.emit(exported(name), table(name))


def check_graph(name: str) -> None:
    """It answers as the network does, whatever the batch."""
    model, graph = made(name)
    images = draw(5, seed=3)
    with torch.inference_mode():
        expected, features = model(torch.from_numpy(images))
    with OnnxRuntimeEngine(graph.SerializeToString(), form="fp32") as engine:
        check_batches(engine, images)
        outputs = engine.infer(images)
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(outputs.features, features, rtol=1e-3, atol=1e-4)


def test_the_graph_of_a_real_network_is_the_network_at_any_batch(name: str) -> None:
    """Widened heads, attention over channels, shuffled ones, channels-last blocks."""
    check_graph(name)


def test_every_layer_of_a_real_network_is_an_integer_kernel(name: str) -> None:
    graph, emitted, family = Graph(exported(name)), on_onnxruntime(name), FAMILIES[name]
    (classifier,) = {layer.name for layer in graph.layers()} - set(emitted.quantized)
    assert emitted.kept_float[classifier] == (
        "it makes an output of the model; quantized if asked for"
    )
    counts = check_kernels(emitted)
    moving = {"Transpose", "Reshape", "Split", "Shape", "Squeeze", "Range", "Unsqueeze", "Gather"}
    floats = {op for op in counts if "Q" not in op and "Linear" not in op and op != "NhwcMaxPool"}
    assert floats - moving - {"MatMulIntegerToFloat"} <= family.floats
    assert counts.get("DequantizeLinear", 0) <= family.conversions
    assert counts.get("QuantizeLinear", 0) <= family.conversions - 1
    float_ops = {graph.nodes[node].op_type for node in emitted.kept_float}
    assert float_ops <= family.floats | {"HardSwish", "Transpose"}
    assert all(emitted.kept_float.values())
    with_classifier = onnxruntime_dialect.emit(exported(name), table(name), classifier=True)
    assert with_classifier.quantized == (*emitted.quantized, classifier)
    check_kernels(with_classifier)


def test_the_first_kernel_reads_bytes(name: str) -> None:
    nodes = on_onnxruntime(name).model.graph.node
    # ConvNeXt's export reads the batch size from the image as well.
    reader = {tensor: node for node in nodes if node.op_type != "Shape" for tensor in node.input}
    tensor, seen = "image", list[str]()
    while not seen or seen[-1] != "Conv":
        seen.append(reader[tensor].op_type)
        tensor = reader[tensor].output[0]
    assert seen == ["Transpose", "DequantizeLinear", "Conv"]


@BOTH
def test_a_real_network_keeps_its_meaning(name: str, dialect: object) -> None:
    images = draw(16, seed=2)
    emitted = (on_onnxruntime if dialect is onnxruntime_dialect else on_tensorrt)(name)
    reference = run(exported(name), images)
    assert sqnr_db(reference, run(emitted.model, images)) > FAMILIES[name].least_db


def test_tensorrt_runs_every_intended_layer_of_a_real_network_in_int8(name: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph, emitted = Graph(exported(name)), on_tensorrt(name)
    reasons = collections.Counter(
        reason.partition(" channels")[2] or reason for reason in emitted.kept_float.values()
    )
    assert set(reasons) <= {
        " per group; INT8 wants 16 or more",
        "one output pixel: a matrix-vector product",
    }
    layers = {layer.name for layer in graph.layers()}
    assert layers == set(emitted.quantized) | set(emitted.kept_float)
    built = build(
        emitted.model.SerializeToString(),
        batch=(1, 1, 8),
        shape=SPEC.shape,
        target_sm=(8, 6),
        level=0,
    )
    precisions = node_precisions(built.layers, emitted.quantized)
    assert set(precisions.values()) == {"INT8"}


def test_the_graph_of_a_vision_transformer_is_the_network_at_any_batch() -> None:
    check_graph(VIT)


@BOTH
def test_a_vision_transformer_stays_float_with_the_reason(dialect: object) -> None:
    model = exported(VIT)
    emit = dialect.emit  # type: ignore[attr-defined]
    emitted = emit(model, table(VIT))
    assert emitted.quantized == ()
    graph = Graph(model)
    assert len(graph.attention()) == 2
    (first,) = graph.convs()
    assert emitted.kept_float[first.name] == ATTENTION
    images = draw(4, seed=2)
    np.testing.assert_allclose(run(emitted.model, images), run(model, images), atol=1e-3)
