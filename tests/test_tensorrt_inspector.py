"""Kernels and precisions from the engine inspector's JSON, in the ways that versions write it."""

import json
from typing import Any

import pytest

from runtime.engines.tensorrt_inspector import convolution_precisions, parse_inspection
from runtime.engines.tensorrt_layers import node_precisions
from runtime.errors import EngineError


def tensors(key: str, *datatypes: str) -> list[dict[str, Any]]:
    return [{"Name": "t", "Dimensions": [1, 3, 8, 8], key: datatype} for datatype in datatypes]


# As trtexec --exportLayerInfo writes it (TensorRT 8 and 10): formats are sentences, weights have a
# type, names are joined by the record separator.
SENTENCES = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1",
            "LayerType": "Reformat",
            "Inputs": tensors("Format/Datatype", "Row major linear FP32"),
            "Outputs": tensors("Format/Datatype", "Row major Int8 format"),
            "Metadata": "",
        },
        {
            "Name": "conv1.weight + x_QuantizeLinear + conv1 + relu1",
            "LayerType": "CaskConvolution",
            "Inputs": tensors(
                "Format/Datatype", "Thirty-two wide channel vectorized row major Int8 format"
            ),
            "Outputs": tensors(
                "Format/Datatype", "Thirty-two wide channel vectorized row major Int8 format"
            ),
            "Weights": {"Type": "Int8", "Count": 131072},
            "Bias": {"Type": "Float", "Count": 256},
            "Metadata": "[ONNX Layer: x_QuantizeLinear]\x1e[ONNX Layer: /net/conv[1]]",
        },
        {
            "Name": "conv2",
            "LayerType": "CaskConvActPool",
            "Inputs": tensors(
                "Format/Datatype", "Channel major FP16 format where channel % 8 == 0"
            ),
            "Outputs": tensors("Format/Datatype", "Row major linear FP16 format"),
            "Weights": {"Type": "Half", "Count": 64},
            "Metadata": "[ONNX Layer: conv2]",
        },
        {
            "Name": "conv3",
            "LayerType": "CaskConvolution",
            "Inputs": tensors("Format/Datatype", "Row major Int8 format"),
            "Outputs": tensors("Format/Datatype", "Row major linear FP32"),
            "Weights": {"Type": "Float", "Count": 64},
            "Metadata": "[ONNX Layer: conv3]",
        },
    ],
    "Bindings": ["image", "logits", "features"],
}

# The compiler's kernels in TensorRT 10 and 11: types in lower case, data types are words.
WORDS = {
    "Layers": [
        {
            "Name": "conv1_myl0_4",
            "LayerType": "correlation",
            "Inputs": tensors("Format/Datatype", "Int8"),
            "Constants": tensors("Format/Datatype", "Int8", "Float"),
            "Outputs": tensors("Format/Datatype", "Float"),
            "Metadata": "[ONNX Layer: conv1]",
        },
        {
            "Name": "conv2_myl0_5",
            "LayerType": "conv",
            "Inputs": tensors("Datatype", "Half"),
            "Outputs": tensors("Datatype", "Half"),
            "Metadata": "[ONNX Layer: conv2]__suffix",
        },
        {
            "Name": "head_myl0_6",
            "LayerType": "gemm",
            "Inputs": tensors("DataType", "Float"),
            "Outputs": tensors("DataType", "Float"),
            "Metadata": "[ONNX Layer: head]",
        },
    ],
    "I/O Tensors": [
        {"Name": "image", "IOMode": "Input", "DataType": "UInt8"},
        {"Name": "logits", "IOMode": "Output", "DataType": "Float"},
    ],
}


def test_sentences_are_read() -> None:
    inspection = parse_inspection(json.dumps(SENTENCES))
    assert inspection.tensors == ("image", "logits", "features")
    reformat, conv1, *_ = inspection.layers
    assert (reformat.inputs, reformat.outputs, reformat.nodes) == (("Float",), ("Int8",), ())
    assert (conv1.inputs, conv1.constants) == (("Int8",), ("Int8",))
    assert conv1.nodes == ("x_QuantizeLinear", "/net/conv[1]")
    assert convolution_precisions(inspection) == {"INT8": 1, "FP16": 1, "unknown": 1}
    assert node_precisions(inspection.layers, ["/net/conv[1]", "conv2", "conv4"]) == {
        "/net/conv[1]": "INT8",
        "conv2": "FP16",
        "conv4": "unknown",
    }


def test_words_are_read() -> None:
    inspection = parse_inspection(json.dumps(WORDS))
    assert inspection.tensors == ("image", "logits")
    assert [layer.type for layer in inspection.layers] == ["correlation", "conv", "gemm"]
    assert convolution_precisions(inspection) == {"INT8": 1, "FP16": 1}
    nodes = ["conv1", "conv2", "head"]
    precisions = node_precisions(inspection.layers, nodes)
    assert list(precisions.values()) == ["INT8", "FP16", "FP32"]


def test_names_alone_tell_no_precision() -> None:
    inspection = parse_inspection('{"Layers": ["conv1 + relu1", "head"], "Bindings": ["image"]}')
    assert [layer.name for layer in inspection.layers] == ["conv1 + relu1", "head"]
    assert convolution_precisions(inspection) == {}


@pytest.mark.parametrize("text", ["", "[]", '{"Bindings": []}', '{"Layers": 1}'])
def test_what_is_no_inspection_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match="engine inspector: expected JSON with Layers, got: "):
        parse_inspection(text)
