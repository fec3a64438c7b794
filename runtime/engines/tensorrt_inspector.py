"""Which kernels run and in which precision, from the JSON of TensorRT's engine inspector.

It needs an engine, hence a GPU: a device reads back what it built. It knows the three ways in
which versions write it, and not how an engine is opened: ``TensorRTEngine.layer_information``
gives the text. What a build's log says without a GPU is read by tensorrt_layers.

Sources: TensorRT 10.16 developer guide, "Engine Inspector"; "Migrating IEngineInspector Usage from
TensorRT 10.x to 11.x"; layer files in NVIDIA/TensorRT#2418 and #4020.
"""

import re
from typing import Any, NamedTuple

import msgspec

from runtime.engines.tensorrt_layers import Layer, node_precisions
from runtime.errors import EngineError

# A sentence in TensorRT 8 and 10 ("Row major linear FP16 format"), a word in the others.
_DATATYPE = re.compile(r"\b(Int8|Half|FP16|BFloat16|BF16|Float|FP32)\b")
_SPELLING = {"FP16": "Half", "BF16": "BFloat16", "FP32": "Float"}

_Entry = dict[str, Any]


class Inspection(NamedTuple):
    """What the inspector says about an engine."""

    layers: tuple[Layer, ...]
    """Its kernels; only names if it was built without detailed profiling."""
    tensors: tuple[str, ...]
    """Names of its inputs and outputs."""


class _Document(msgspec.Struct):
    layers: list[str | _Entry] = msgspec.field(name="Layers")
    bindings: list[str] = msgspec.field(name="Bindings", default=[])
    """Until TensorRT 10."""
    io_tensors: list[_Entry] = msgspec.field(name="I/O Tensors", default=[])
    """From TensorRT 11."""


def parse_inspection(text: str) -> Inspection:
    """Read what ``get_engine_information`` gave as JSON.

    Raises EngineError if it is not that.
    """
    try:
        document = msgspec.json.decode(text, type=_Document)
    except msgspec.DecodeError as error:
        raise EngineError(f"engine inspector: expected JSON with Layers, got: {error}") from error
    return Inspection(
        layers=tuple(_layer(entry) for entry in document.layers),
        tensors=(*document.bindings, *(str(entry["Name"]) for entry in document.io_tensors)),
    )


def convolution_precisions(inspection: Inspection) -> dict[str, int]:
    """Number of convolution kernels by what they compute in: INT8, FP16, BF16, FP32 or unknown.

    (``node_precisions`` says it for each convolution of the ONNX graph.)
    """
    kernels = [
        layer._replace(nodes=(layer.name,))
        for layer in inspection.layers
        if "conv" in layer.type or "correlation" in layer.type
    ]
    counts: dict[str, int] = {}
    for precision in node_precisions(kernels, [kernel.name for kernel in kernels]).values():
        counts[precision] = counts.get(precision, 0) + 1
    return counts


def _layer(entry: str | _Entry) -> Layer:
    if isinstance(entry, str):
        return Layer(entry, "", (), (), (), ())
    weights = [{"Datatype": entry["Weights"]["Type"]}] if "Weights" in entry else []
    # The separator between names is a control character, and a suffix may follow a bracket.
    nodes = entry.get("Metadata", "").split("[ONNX Layer: ")[1:]
    return Layer(
        name=entry["Name"],
        type=entry.get("LayerType", "").lower(),  # CaskConvolution, or conv: as the log has it
        inputs=_datatypes(entry.get("Inputs", [])),
        constants=_datatypes(weights or entry.get("Constants", [])),
        outputs=_datatypes(entry.get("Outputs", [])),
        nodes=tuple(name.rpartition("]")[0] for name in nodes),
    )


def _datatypes(tensors: list[_Entry]) -> tuple[str, ...]:
    """Data types as the builder's log spells them; the key is Format/Datatype, or the last word."""
    found = []
    for tensor in tensors:
        words = " ".join(str(value) for key, value in tensor.items() if "datatype" in key.lower())
        if match := _DATATYPE.search(words):
            found.append(_SPELLING.get(match[1], match[1]))
    return tuple(found)
