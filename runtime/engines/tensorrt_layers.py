"""Which kernels a TensorRT engine is made of, and what they compute in, from the builder's log.

With detailed profiling the builder logs one verbose message, ``Layers:`` and a line for each
fused kernel with the data types it reads and writes. That needs no GPU, unlike the engine
inspector, so a workstation can prove that convolutions really are INT8 or FP16.
(Format as logged by TensorRT-RTX 1.7.)
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

UNKNOWN = "unknown"

_PRECISIONS = {"Int8": "INT8", "Half": "FP16", "BFloat16": "BF16", "Float": "FP32"}
_WIDEST_FIRST = ("FP32", "BF16", "FP16", "INT8")
_MULTIPLYING = ("correlation", "conv", "gemm", "matmul", "runtime_fusion")
"""Parts of the layer types that multiply: correlation, cask_correlation, conv, gemm, ..."""

# Cut at the keywords: dimensions and formats contain brackets and commas themselves.
_KEYWORDS = re.compile(r", (LayerType|Inputs|Constants|Outputs|TacticName|Metadata): ")
_DATATYPE = re.compile(r"Datatype: (\w+)")


class Layer(NamedTuple):
    """One kernel of a built engine; data types as TensorRT spells them (Int8, Half, Float)."""

    name: str
    type: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    """Names of the ONNX nodes that were fused into it."""


def parse_layers(message: str) -> tuple[Layer, ...]:
    """The kernels in a ``Layers:`` message, in the order they run."""
    # Not splitlines: TensorRT separates node names by \x1e, which that takes for a line's end.
    lines = message.split("\n")
    return tuple(_parse_layer(line) for line in lines if line.startswith("Name: "))


def _parse_layer(line: str) -> Layer:
    head, *rest = _KEYWORDS.split(line)
    fields = dict(zip(rest[::2], rest[1::2], strict=True))

    def datatypes(field: str) -> tuple[str, ...]:
        return tuple(_DATATYPE.findall(fields.get(field, "")))

    # A suffix may follow the bracket: "[ONNX Layer: conv]__gemm_from_conv1x1".
    nodes = fields.get("Metadata", "").split("[ONNX Layer: ")[1:]
    return Layer(
        name=head.removeprefix("Name: "),
        type=fields.get("LayerType", ""),
        inputs=datatypes("Inputs"),
        constants=datatypes("Constants"),
        outputs=datatypes("Outputs"),
        nodes=tuple(name.rpartition("]")[0] for name in nodes),
    )


def node_precisions(layers: Iterable[Layer], nodes: Iterable[str]) -> dict[str, str]:
    """What each of these ONNX nodes computes in: INT8, FP16, BF16, FP32 or unknown, by name.

    A kernel computes in the type of what it reads: an INT8 convolution reads Int8 activations and
    Int8 weights, and may write floats. Kernels that only pad or requantize for a convolution name
    it too, so those that multiply decide. If one node became several, the widest type counts.
    """
    kernels = [layer for layer in layers if layer.inputs]
    result = {}
    for node in nodes:
        naming = [layer for layer in kernels if node in layer.nodes]
        multiplying = [layer for layer in naming if any(w in layer.type for w in _MULTIPLYING)]
        found = {_precision(layer) for layer in multiplying or naming}
        result[node] = next((p for p in _WIDEST_FIRST if p in found), UNKNOWN)
    return result


def _precision(layer: Layer) -> str:
    if "Int8" in layer.inputs and ("Int8" in layer.constants or not layer.constants):
        return "INT8"
    floats = [_PRECISIONS[name] for name in layer.inputs if name in _PRECISIONS]
    return next((precision for precision in floats if precision != "INT8"), UNKNOWN)
