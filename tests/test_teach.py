"""From a quantized graph to the plan of the training that teaches a network to bear it."""

from typing import Any

import numpy as np
import torch
from onnx import helper, numpy_helper
from torch import nn

from calibration import Emitted
from export.teach import plan_of
from train.quantization_aware import LayerQuantization


class Weighted(nn.Module):
    """A module with weights of its own that is no convolution and no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.own = Weighted()
        self.head = nn.Linear(4, 2)


def emitted(layers: dict[str, str], zero_point: Any) -> Emitted:
    """A graph in which each of ``layers`` reads an input that was rounded in steps of 0.5."""
    nodes = []
    for name, op in layers.items():
        rounding = [f"{name}_8", "scale", "zero"]
        nodes.append(helper.make_node("DequantizeLinear", rounding, [f"{name}_x"]))
        nodes.append(helper.make_node(op, [f"{name}_x", f"{name}_w"], [f"{name}_y"], name=name))
    values = {"scale": np.float32(0.5), "zero": zero_point}
    constants = [numpy_helper.from_array(np.asarray(v), name) for name, v in values.items()]
    graph = helper.make_graph(nodes, "quantized", [], [], constants)
    return Emitted(helper.make_model(graph), tuple(layers), {})


def test_a_plan_has_the_rounding_of_every_layer_that_training_can_round() -> None:
    layers = {"conv": "Conv", "own": "MatMul", "node_matmul_7": "MatMul", "head": "Gemm"}
    plan = plan_of(Net(), emitted(layers, np.uint8(3)))  # type: ignore[arg-type]
    how = LayerQuantization(scale=0.5, zero_point=3, low=0, high=255)
    assert plan == {"conv": how, "head": how}


def test_a_plan_keeps_to_the_dialect_s_integers_and_to_what_is_quantized() -> None:
    graph = emitted({"conv": "Conv", "head": "Gemm"}, np.int8(0))
    graph = Emitted(graph.model, ("conv",), {"head": "a matrix-vector product"})
    plan = plan_of(Net(), graph)  # type: ignore[arg-type]
    assert plan == {"conv": LayerQuantization(scale=0.5, zero_point=0, low=-128, high=127)}
