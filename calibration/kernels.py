"""Prove, without timing, that onnxruntime runs a quantized graph with 8-bit kernels.

It does not know how the graph was made. Fusion depends on small matters of form; a convolution
that misses it still answers right, several times slower, so nothing but this count would tell.
"""

import collections
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime

from calibration.quantize import Emitted
from runtime.errors import ExportError

CONV_KERNELS = ("QLinearConv",)
FLOAT_LAYERS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
MATRIX_KERNELS = ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat")


def count_kernels(model: onnx.ModelProto) -> Mapping[str, int]:
    """How often each operator occurs after onnxruntime's CPU optimisations, most frequent first.

    Raises ExportError if onnxruntime refuses the model.
    """
    nodes = optimized(model).graph.node
    return dict(collections.Counter(node.op_type for node in nodes).most_common())


def check_kernels(emitted: Emitted) -> Mapping[str, int]:
    """count_kernels of the model, in which every quantized layer must run as an 8-bit kernel.

    Raises ExportError that names those that do not.
    """
    nodes = optimized(emitted.model).graph.node
    counts = collections.Counter(node.op_type for node in nodes)
    quantized = [node for node in emitted.model.graph.node if node.name in emitted.quantized]
    convs = sum(node.op_type == "Conv" for node in quantized)
    for kind, expected, kernels in (
        ("convolutions", convs, CONV_KERNELS),
        ("matrix products", len(quantized) - convs, MATRIX_KERNELS),
    ):
        got = sum(counts[kernel] for kernel in kernels)
        if got != expected:
            floats = {node.name for node in nodes if node.op_type in FLOAT_LAYERS}
            missed = [name for name in emitted.quantized if name in floats]
            names = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
            raise ExportError(
                f"expected {expected} {kind} to run as {' or '.join(kernels)}, got {got}"
                + (f"; still float: {names}" if missed else "")
                + f"; onnxruntime {onnxruntime.__version__} does not fuse this graph, "
                "release without int8-cpu or use another version"
            )
    return dict(counts.most_common())


def optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` as onnxruntime's CPU provider would run it.

    Raises ExportError if onnxruntime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the result is for this machine only
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # pybind raises classes of its own, none of them public
            raise ExportError(f"onnxruntime refuses the model: {error}") from error
        return onnx.load(path)
