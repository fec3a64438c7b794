"""Real engines from TensorRT-RTX's builder, which needs no GPU, and the readers that need nothing.

Skipped where tensorrt_rtx is not installed: the build itself. Never skipped: headers and layers.
"""

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.onnx_pb import ModelProto, NodeProto

from export.float16 import to_float16
from runtime.engines import cudart, tensorrt_build
from runtime.engines.tensorrt_build import build, conv_precisions
from runtime.engines.tensorrt_layers import node_precisions, parse_layers
from runtime.engines.tensorrt_library import (
    PlanHeader,
    TensorRT,
    listening,
    load_library,
    logger,
    plan_header,
)
from runtime.errors import EngineError

SHAPE = (32, 32, 3)
AMPERE = (8, 6)


class Network:
    """An inverted-residual network like MobileNetV2's, written node by node without torch."""

    def __init__(self, *, quantized: bool, zero_point: int = 0) -> None:
        self.random = np.random.default_rng(0)
        self.quantized, self.zero_point = quantized, zero_point
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}
        node = self.node
        x = node("Cast", "image", to=TensorProto.FLOAT)
        x = node("Transpose", x, perm=[0, 3, 1, 2])
        x = node("Mul", x, self.constant(np.array(1 / 128, np.float32)))
        x = node("Add", x, self.constant(np.array(-1, np.float32)))
        x = self.conv(x, 3, 16, size=3, stride=2, quantized=False)
        for stride, narrow, wide in ((1, 16, 16), (2, 16, 24), (1, 24, 24)):
            inside = self.conv(x, narrow, 4 * narrow)
            inside = self.conv(inside, 4 * narrow, 4 * narrow, 3, stride, groups=4 * narrow)
            inside = self.conv(inside, 4 * narrow, wide, clip=False)
            x = node("Add", inside, self.qdq(x)) if (stride, narrow) == (1, wide) else inside
        x = self.conv(x, 24, 64)
        x = node("GlobalAveragePool", x)
        node("Flatten", x, output="features")
        weight = self.constant(self.normal(4, 64))
        node("Gemm", "features", weight, output="logits", transB=1)

    def node(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"t{len(self.nodes)}"
        name = f"/net/{kind}[{len(self.nodes)}]"  # brackets and slashes, as exporters write them
        self.nodes.append(helper.make_node(kind, inputs, [output], name, **attributes))
        return output

    def constant(self, value: npt.NDArray[Any]) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def normal(self, *shape: int) -> npt.NDArray[np.float32]:
        fan_in = int(np.prod(shape[1:]))
        values = self.random.normal(size=shape) * np.sqrt(2 / fan_in)
        return np.asarray(values, np.float32)

    def qdq(self, x: str) -> str:
        if not self.quantized:
            return x
        scale = self.constant(np.array(0.05, np.float32))
        zero = self.constant(np.array(self.zero_point, np.int8))
        return self.node(
            "DequantizeLinear", self.node("QuantizeLinear", x, scale, zero), scale, zero
        )

    def conv(
        self,
        x: str,
        narrow: int,
        wide: int,
        size: int = 1,
        stride: int = 1,
        groups: int = 1,
        clip: bool = True,
        quantized: bool = True,
    ) -> str:
        weight = self.normal(wide, narrow // groups, size, size)
        if quantized and self.quantized:
            scale = np.abs(weight).reshape(wide, -1).max(axis=1) / 127
            integers = np.rint(weight / scale[:, None, None, None]).astype(np.int8)
            weight_name = self.node(
                "DequantizeLinear",
                self.constant(integers),
                self.constant(scale.astype(np.float32)),
                self.constant(np.zeros(wide, np.int8)),
                axis=0,
            )
            x = self.qdq(x)
        else:
            weight_name = self.constant(weight)
        bias = self.constant(self.normal(wide, 4)[:, 0].copy())
        pads = [size // 2] * 4
        strides = [stride, stride]
        x = self.node("Conv", x, weight_name, bias, group=groups, pads=pads, strides=strides)
        if not clip:
            return x
        low, high = np.array(0, np.float32), np.array(6, np.float32)
        return self.node("Clip", x, self.constant(low), self.constant(high))

    def model(self) -> ModelProto:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "net",
            [info("image", TensorProto.UINT8, ["N", *SHAPE])],
            [
                info("features", TensorProto.FLOAT, ["N", 64]),
                info("logits", TensorProto.FLOAT, ["N", 4]),
            ],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install fieldfit[dev]")
    library = load_library("tensorrt-rtx")
    assert isinstance(library, TensorRT), library
    return library


@pytest.fixture(scope="module")
def fp32() -> ModelProto:
    return Network(quantized=False).model()


def quick_build(model: ModelProto, rtx: TensorRT, **settings: Any) -> tensorrt_build.Built:
    data = model.SerializeToString()
    usual: dict[str, Any] = {"batch": (1, 1, 4), "shape": SHAPE, "target_sm": AMPERE, "level": 0}
    return build(data, library=rtx, **(usual | settings))


@pytest.mark.parametrize(
    ("quantized", "half", "stem", "others"),
    [
        (False, False, "FP32", "FP32"),
        (False, True, "FP16", "FP16"),
        (True, False, "FP32", "INT8"),
        (True, True, "FP16", "INT8"),
    ],
    ids=["fp32", "fp16", "int8", "int8-fp16"],
)
def test_every_convolution_runs_in_the_type_of_the_file(
    rtx: TensorRT, quantized: bool, half: bool, stem: str, others: str
) -> None:
    model = Network(quantized=quantized).model()
    built = quick_build(to_float16(model) if half else model, rtx)
    names = [node.name for node in model.graph.node if node.op_type == "Conv"]
    precisions = conv_precisions(built)
    assert list(precisions) == names
    assert len(names) == 11
    assert precisions.pop(names[0]) == stem
    assert set(precisions.values()) == {others}
    assert plan_header(built.plan) == PlanHeader("tensorrt-rtx", rtx.version, len(built.plan))


def test_progress_grows_and_names_the_phase(rtx: TensorRT, fp32: ModelProto) -> None:
    events: list[tuple[float, str]] = []
    quick_build(fp32, rtx, progress=lambda share, phase: events.append((share, phase)))
    shares = [share for share, _ in events]
    assert len(events) > 10
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1
    assert all(phase for _, phase in events)


def test_a_build_can_be_cancelled(rtx: TensorRT, fp32: ModelProto) -> None:
    with pytest.raises(EngineError, match="the build was cancelled"):
        quick_build(fp32, rtx, progress=lambda share, phase: share < 0.05)
    quick_build(fp32, rtx)


def test_what_progress_raises_comes_through(rtx: TensorRT, fp32: ModelProto) -> None:
    def interrupt(share: float, phase: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick_build(fp32, rtx, progress=interrupt)


def test_a_node_that_cannot_be_built_is_named(rtx: TensorRT, fp32: ModelProto) -> None:
    strange = onnx.ModelProto()
    strange.CopyFrom(fp32)
    node = next(n for n in strange.graph.node if n.op_type == "GlobalAveragePool")
    node.op_type, node.name = "GlobalLpPool3", "the_pool"
    with pytest.raises(EngineError, match="GlobalLpPool3 node the_pool"):
        quick_build(strange, rtx)


def test_an_asymmetric_graph_is_refused_with_the_reason(rtx: TensorRT) -> None:
    with pytest.raises(EngineError, match="Non-zero zero point is not supported"):
        quick_build(Network(quantized=True, zero_point=3).model(), rtx)


@pytest.mark.parametrize("data", [b"", b"not onnx", b"\x08\x0a\xff\xff"])
def test_damaged_onnx_is_refused(rtx: TensorRT, data: bytes) -> None:
    with pytest.raises(EngineError, match="cannot read the ONNX graph") as refusal:
        build(data, batch=(1, 1, 1), shape=SHAPE, library=rtx, target_sm=AMPERE)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shape": (32, 32, 1)}, r"one input, image \[N, 32, 32, 1\]"),
        ({"batch": (2, 1, 4)}, "smallest <= usual <= largest"),
        ({"target_sm": (8, 7)}, "expected one of SM75.*got SM87"),
        ({"strongly_typed": False}, "always strongly typed"),
    ],
)
def test_wrong_settings_are_refused(
    rtx: TensorRT, fp32: ModelProto, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        quick_build(fp32, rtx, **settings)


def test_a_refusal_carries_the_words_of_the_logger(rtx: TensorRT, fp32: ModelProto) -> None:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(fp32)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(EngineError, match="image has static dimensions that don't match"):
        quick_build(fixed, rtx)
    with pytest.raises(EngineError, match="no tactics to implement the operation within workspace"):
        quick_build(fp32, rtx, workspace_bytes=1)


@pytest.mark.skipif(not isinstance(cudart.probe(), str), reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_cudas(rtx: TensorRT, fp32: ModelProto) -> None:
    with pytest.raises(EngineError, match="tensorrt-rtx: no GPU to build for: "):
        quick_build(fp32, rtx, target_sm=None)


def test_only_rtx_builds_for_another_gpu(rtx: TensorRT) -> None:
    other = TensorRT(rtx.module, "tensorrt", "10.3.0")
    with pytest.raises(EngineError, match="install tensorrt-rtx-cu13 to build for another"):
        build(b"", batch=(1, 1, 1), shape=SHAPE, library=other, target_sm=AMPERE)


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    for flavour in (None, "tensorrt", "tensorrt-rtx"):
        reason = load_library(flavour)
        assert isinstance(reason, str)
        assert "tensorrt" in reason
    with pytest.raises(EngineError, match="expected TensorRT or TensorRT-RTX, got neither"):
        build(b"", batch=(1, 1, 1), shape=SHAPE)


def test_a_broken_library_is_a_reason(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert load_library("tensorrt") == "tensorrt: libnvinfer.so.10: cannot open"


def test_there_is_one_logger_and_ears_come_and_go(rtx: TensorRT) -> None:
    with listening(rtx) as heard, listening(rtx) as other:
        severity = rtx.module.ILogger.Severity
        logger(rtx).log(severity.ERROR, "first\n  line")
        logger(rtx).log(severity.WARNING, "not an error")
        assert logger(rtx) is logger(rtx)
    logger(rtx).log(severity.ERROR, "nobody listens")
    assert heard.reason() == other.reason() == "first line"
    assert heard.reason() == "TensorRT gave no reason"


def rtx_header(size: int) -> bytes:
    return b"vtrt" + bytes(12) + size.to_bytes(8, "little") + bytes([1, 7, 1, 116])


@pytest.mark.parametrize(
    ("plan", "header"),
    [
        (rtx_header(28), PlanHeader("tensorrt-rtx", "1.7.1.116", 28)),
        (b"ftrt" + bytes(20) + bytes([10, 3, 0, 26]), PlanHeader("tensorrt", "10.3.0.26", None)),
    ],
)
def test_a_plan_header_is_read_without_tensorrt(plan: bytes, header: PlanHeader) -> None:
    assert plan_header(plan) == header


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (b"", "got 0 bytes"),
        (b"vtrt", "got 4 bytes"),
        (b"\x08\x0a" * 100, r"that start with b'\\x08\\n\\x08\\n'"),
        (rtx_header(29), "expected 29 bytes, got 28; build the engine again"),
        (rtx_header(28) + b"tail", "expected 28 bytes, got 32"),
    ],
)
def test_what_is_no_plan_is_refused(plan: bytes, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        plan_header(plan)


# From logs of TensorRT-RTX 1.7, shortened: a shape kernel, a kernel that pads for a depthwise
# convolution, an INT8 convolution that writes floats, a 1x1 convolution that became a GEMM.
LAYERS = """Layers:
Name: shapes, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Name: pad, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,32,80,80], Datatype: Float, Format: (NHWC) Channel major format }], Constants: [], Outputs: [ { Name: y, Dimensions: [-1,128,80,80], Datatype: Int8, Format: (NHWC) Channel major format }], TacticName: __myl_Pad, StreamId: 0, Metadata: [ONNX Layer: x_QuantizeLinear][ONNX Layer: conv1]
Name: conv1_myl0_4, LayerType: correlation, Inputs: [ { Name: y, Dimensions: [-1,128,80,80], Datatype: Int8, Format: (NHWC) Channel major format }], Constants: [ { Name: w, Dimensions: [32,4,3,3], Datatype: Int8, Format: (Linear) }, { Name: s, Dimensions: [1], Datatype: Float, Format: (Linear) }], Outputs: [ { Name: z, Dimensions: [-1,32,80,80], Datatype: Float, Format: (Linear) }], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: conv1]\x1e[ONNX Layer: /a/x_Dequantize[1]]
Name: __mye33, LayerType: gemm, Inputs: [ { Name: z, Dimensions: [-1], Datatype: Half, Format: (Linear) }], Constants: [ { Name: w, Dimensions: [1], Datatype: Half, Format: (Linear) }], Outputs: [ { Name: o, Dimensions: [-1], Datatype: Half, Format: (Linear) }], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: conv2]__gemm_from_conv1x1
"""  # noqa: E501, W291


def test_layers_are_read_from_the_log() -> None:
    shapes, pad, conv, gemm = parse_layers(LAYERS)
    assert shapes.inputs == shapes.nodes == ()
    assert (pad.type, pad.inputs, pad.outputs) == ("kgen", ("Float",), ("Int8",))
    assert conv.constants == ("Int8", "Float")
    assert conv.nodes == ("conv1", "/a/x_Dequantize[1]")
    assert gemm.nodes == ("conv2",)
    precisions = node_precisions([shapes, pad, conv, gemm], ["conv1", "conv2", "conv3"])
    assert precisions == {"conv1": "INT8", "conv2": "FP16", "conv3": "unknown"}
