"""Real engines from TensorRT-RTX's builder, which needs no GPU, and the readers that need nothing.

What only full TensorRT has, weakly typed networks and timing caches, is asked of a stand-in, which
proves our calls and no more. Skipped where tensorrt_rtx is not installed: the real builds. Never
skipped: headers and layers.
"""

import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.onnx_pb import ModelProto, NodeProto

from export.float16 import to_float16
from runtime.engines import cudart, tensorrt_build
from runtime.engines.tensorrt_build import (
    WORKSPACE,
    build,
    check_version,
    conv_precisions,
    preflight,
    workspace_for,
)
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
from tests import standin_tensorrt
from tests.standin_tensorrt import StandIn

SHAPE = (32, 32, 3)
AMPERE, ADA, BLACKWELL = (8, 6), (8, 9), (12, 0)
MIB = 1 << 20


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


def with_operator(model: ModelProto, operator: str, other: str, name: str) -> ModelProto:
    """A copy in which the first node of ``operator`` is of another one, and named so."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    node = next(node for node in changed.graph.node if node.op_type == operator)
    node.op_type, node.name = other, name
    return changed


def quick_build(model: ModelProto, rtx: TensorRT, **settings: Any) -> tensorrt_build.Built:
    data = model.SerializeToString()
    usual: dict[str, Any] = {"batch": (1, 1, 4), "shape": SHAPE, "target_sm": AMPERE, "level": 0}
    return build(data, library=rtx, **(usual | settings))


@pytest.mark.parametrize("target", [AMPERE, ADA, BLACKWELL], ids=["SM86", "SM89", "SM120"])
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
    rtx: TensorRT, quantized: bool, half: bool, stem: str, others: str, target: tuple[int, int]
) -> None:
    model = Network(quantized=quantized).model()
    built = quick_build(to_float16(model) if half else model, rtx, target_sm=target)
    names = [node.name for node in model.graph.node if node.op_type == "Conv"]
    precisions = conv_precisions(built)
    assert list(precisions) == names
    assert len(names) == 11
    assert precisions.pop(names[0]) == stem
    assert set(precisions.values()) == {others}
    assert plan_header(built.plan) == PlanHeader("tensorrt-rtx", rtx.version, len(built.plan))
    assert (built.typing, built.attempts, built.timing_cache) == ("strong", (), b"")
    assert (built.workspace_bytes, built.batch) == (WORKSPACE, (1, 1, 4))


def test_engines_carry_no_host_code_and_no_plugins(rtx: TensorRT, fp32: ModelProto) -> None:
    configs = []
    real: Any = rtx.module.Builder

    class Builder(real):  # type: ignore[misc]
        def create_builder_config(self) -> Any:
            configs.append(real.create_builder_config(self))
            return configs[-1]

    watched = types.SimpleNamespace(**vars(rtx.module) | {"Builder": Builder})
    quick_build(fp32, rtx._replace(module=watched))
    (config,) = configs
    untouched = rtx.module.Builder(logger(rtx)).create_builder_config()
    assert config.flags == untouched.flags
    assert not config.get_flag(rtx.module.BuilderFlag.VERSION_COMPATIBLE)
    assert config.plugins_to_serialize == []


def test_progress_grows_and_names_the_phase(rtx: TensorRT, fp32: ModelProto) -> None:
    events: list[tuple[float, str]] = []
    quick_build(fp32, rtx, progress=lambda share, phase: events.append((share, phase)))
    shares = [share for share, _ in events]
    assert len(events) > 10
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1
    assert all(phase for _, phase in events)


def test_a_build_can_be_cancelled(rtx: TensorRT, fp32: ModelProto) -> None:
    told: list[float] = []

    def once(share: float, phase: str) -> bool:
        told.append(share)
        return len(told) != 5

    with pytest.raises(EngineError, match="the build was cancelled") as refusal:
        quick_build(fp32, rtx, progress=once)
    assert refusal.value.fault == "not wanted"
    assert len(told) == 5
    quick_build(fp32, rtx)


def test_what_progress_raises_comes_through(rtx: TensorRT, fp32: ModelProto) -> None:
    def interrupt(share: float, phase: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick_build(fp32, rtx, progress=interrupt)


INTERRUPTED = """
import signal, sys
from runtime.engines.tensorrt_build import build
from runtime.engines.tensorrt_library import load_library, logger

def wait_for_the_signal(*_):
    if not told:
        told.append("building")
        print("building", flush=True)
        sys.stdin.readline()

class Ear:
    errors = []
    layers = property(fset=wait_for_the_signal)

def attempt(progress):
    return build(model, batch=(1, 1, 4), shape=(32, 32, 3), library=library, target_sm=(8, 6),
                 level=0, progress=progress)

path, where = sys.argv[1:]
told = []
library = load_library("tensorrt-rtx")
with open(path, "rb") as file:
    model = file.read()
if where == "logger":
    logger(library).sinks.append(Ear())
try:
    attempt(wait_for_the_signal if where == "progress" else None)
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print("interrupted,", len(attempt(None).plan) > 0)
"""


@pytest.mark.parametrize("where", ["progress", "logger"])
def test_ctrl_c_ends_the_build_and_leaves_the_builder_usable(
    rtx: TensorRT, fp32: ModelProto, tmp_path: Path, where: str
) -> None:
    path = tmp_path / "fp32.onnx"
    path.write_bytes(fp32.SerializeToString())
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", INTERRUPTED, str(path), where]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("go on\n", timeout=60)
    assert (out, err, process.returncode) == ("interrupted, True\n", "", 0)


def test_a_node_that_cannot_be_built_is_named(rtx: TensorRT, fp32: ModelProto) -> None:
    strange = with_operator(fp32, "GlobalAveragePool", "GlobalLpPool3", "the_pool")
    with pytest.raises(EngineError, match="GlobalLpPool3 node the_pool") as refusal:
        quick_build(strange, rtx)
    assert refusal.value.fault == "not built"


def test_preflight_names_each_node_that_cannot_be_built(rtx: TensorRT, fp32: ModelProto) -> None:
    strange = with_operator(fp32, "GlobalAveragePool", "GlobalLpPool3", "the_pool")
    strange = with_operator(strange, "Flatten", "Flatter", "the_flattening")
    pool, flattening = preflight(strange.SerializeToString(), rtx)
    assert pool.startswith("GlobalLpPool3 node the_pool: ")
    assert flattening.startswith("Flatter node the_flattening: ")
    for number in range(2):
        strange = with_operator(strange, "Clip", "Clipper", f"clip {number}")
    with pytest.raises(EngineError, match=r"node clip 0.*; and 1 more$"):
        quick_build(strange, rtx)
    (asymmetric, *_) = preflight(Network(quantized=True, zero_point=3).model().SerializeToString())
    assert "Non-zero zero point is not supported" in asymmetric
    assert preflight(fp32.SerializeToString(), rtx) == ()
    assert preflight(b"", rtx) == ("not an ONNX file",)


def test_an_engine_inside_the_onnx_file_is_refused(rtx: TensorRT, fp32: ModelProto) -> None:
    smuggled = with_operator(fp32, "GlobalAveragePool", "EPContext", "engine")
    smuggled.graph.node[-2].domain = "com.microsoft"
    with pytest.raises(EngineError, match=r"EPContext.*from elsewhere") as refusal:
        quick_build(smuggled, rtx)
    assert refusal.value.fault == "refused artifact"


def test_an_asymmetric_graph_is_refused_with_the_reason(rtx: TensorRT) -> None:
    with pytest.raises(EngineError, match="Non-zero zero point is not supported"):
        quick_build(Network(quantized=True, zero_point=3).model(), rtx)


@pytest.mark.parametrize("data", [b"", b"not onnx", b"\x08\x0a\xff\xff"])
def test_damaged_onnx_is_refused(rtx: TensorRT, data: bytes) -> None:
    with pytest.raises(EngineError, match="cannot read the ONNX graph") as refusal:
        build(data, batch=(1, 1, 1), shape=SHAPE, library=rtx, target_sm=AMPERE)
    assert "\n" not in str(refusal.value)
    assert refusal.value.fault == "refused artifact"


@pytest.mark.parametrize(
    ("settings", "words", "fault"),
    [
        ({"shape": (32, 32, 1)}, r"one input, image \[N, 32, 32, 1\]", "refused artifact"),
        ({"batch": (2, 1, 4)}, "smallest <= usual <= largest", "not built"),
        ({"target_sm": (8, 7)}, "expected one of SM75.*got SM87", "no device"),
        ({"typing": "weak"}, "always strongly typed", "wrong version"),
    ],
)
def test_wrong_settings_are_refused(
    rtx: TensorRT, fp32: ModelProto, settings: dict[str, Any], words: str, fault: str
) -> None:
    with pytest.raises(EngineError, match=words) as refusal:
        quick_build(fp32, rtx, **settings)
    assert refusal.value.fault == fault


def test_a_refusal_carries_the_words_of_the_logger(rtx: TensorRT, fp32: ModelProto) -> None:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(fp32)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(EngineError, match="image has static dimensions that don't match"):
        quick_build(fixed, rtx)


def test_want_of_memory_names_what_was_allowed_and_the_way_out(
    rtx: TensorRT, fp32: ModelProto
) -> None:
    words = "no tactics.*workspace.*were allowed 1 bytes.*batches of up to 4: .*add swap"
    with pytest.raises(EngineError, match=words) as refusal:
        quick_build(fp32, rtx, workspace_bytes=1)
    assert refusal.value.fault == "not built"


@pytest.mark.skipif(not isinstance(cudart.probe(), str), reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_cudas(rtx: TensorRT, fp32: ModelProto) -> None:
    with pytest.raises(EngineError, match="tensorrt-rtx: no GPU to build for: ") as refusal:
        quick_build(fp32, rtx, target_sm=None)
    assert refusal.value.fault == "no device"


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
    words = "expected TensorRT or TensorRT-RTX, got neither"
    with pytest.raises(EngineError, match=words) as refusal:
        build(b"", batch=(1, 1, 1), shape=SHAPE)
    assert refusal.value.fault == "missing library"


def test_a_broken_library_is_a_reason(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert load_library("tensorrt") == "tensorrt: libnvinfer.so.10: cannot open"


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[standin_tensorrt.BuilderConfig]:
    """Builder configurations of the stand-in, as they were when the build ended."""
    made = []
    create = standin_tensorrt.Builder.create_builder_config

    def record(builder: standin_tensorrt.Builder) -> standin_tensorrt.BuilderConfig:
        made.append(create(builder))
        return made[-1]

    monkeypatch.setattr(standin_tensorrt.Builder, "create_builder_config", record)
    return made


def stand_in(
    monkeypatch: pytest.MonkeyPatch, folder: Path, version: str = standin_tensorrt.VERSION
) -> tuple[StandIn, TensorRT]:
    module, _ = standin_tensorrt.install(monkeypatch, folder, version)
    library = load_library("tensorrt")
    assert isinstance(library, TensorRT), library
    return module, library


def device_build(model: ModelProto, library: TensorRT, **settings: Any) -> tensorrt_build.Built:
    return quick_build(model, library, **{"target_sm": None} | settings)


@pytest.mark.parametrize("version", ["10.3.0.26", "11.4.1.1"])
def test_full_tensorrt_builds_strongly_typed_and_sets_no_flag(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configs: list[Any], version: str
) -> None:
    _, library = stand_in(monkeypatch, tmp_path, version)
    built = device_build(to_float16(Network(quantized=True).model()), library)
    assert (built.typing, built.attempts) == ("strong", ())
    assert [config.flags for config in configs] == [set()]
    assert plan_header(built.plan) == PlanHeader("tensorrt", version, None)


def test_a_quantized_graph_that_strong_typing_refuses_is_built_weakly_typed_on_10(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    configs: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, library = stand_in(monkeypatch, tmp_path)
    module.refuse_strong_dequantize = True
    told: list[float] = []
    model = Network(quantized=True).model()
    built = device_build(model, library, progress=lambda share, phase: told.append(share))
    assert built.typing == "weak"
    (attempt,) = built.attempts
    assert attempt.startswith("strongly typed: no engine: ")
    assert "Could not infer output types for operation: dequantize" in attempt
    assert f"tensorrt 10.3.0.26: {attempt}; trying a weakly typed network" in caplog.messages
    assert [config.flags for config in configs] == [
        set(),
        {module.BuilderFlag.INT8, module.BuilderFlag.FP16},
    ]
    assert told == sorted(told)


def test_strong_typing_can_be_insisted_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, library = stand_in(monkeypatch, tmp_path)
    module.refuse_strong_dequantize = True
    model = Network(quantized=True).model()
    with pytest.raises(EngineError, match=r"strongly typed: .*dequantize$"):
        device_build(model, library, typing="strong")
    assert device_build(model, library, typing="weak").attempts == ()


def test_a_graph_that_both_rungs_refuse_names_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, library = stand_in(monkeypatch, tmp_path)
    module.unsupported = "Clip"
    words = "strongly typed: cannot.*: Clip node /net/Clip.*; weakly typed: .*: Clip node /net/Clip"
    with pytest.raises(EngineError, match=words):
        device_build(Network(quantized=True).model(), library)
    with pytest.raises(EngineError, match="strongly typed") as refusal:
        device_build(Network(quantized=False).model(), library)
    assert "weakly" not in str(refusal.value)
    assert module.builds == 0


def test_on_11_there_is_no_second_rung_and_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, library = stand_in(monkeypatch, tmp_path, "11.4.1.1")
    module.refuse_strong_dequantize = True
    with pytest.raises(EngineError, match=r"dequantize \(tensorrt 11.4.1.1 has no weakly typed"):
        device_build(Network(quantized=True).model(), library)


def test_want_of_memory_is_not_tried_again_weakly_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configs: list[Any]
) -> None:
    module, library = stand_in(monkeypatch, tmp_path)
    module.needs_workspace = 64 * MIB
    model = Network(quantized=True).model()
    with pytest.raises(EngineError, match=r"OutOfMemory.*allowed 1,048,576 bytes.*workspace_bytes"):
        device_build(model, library, workspace_bytes=MIB)
    assert len(configs) == 1
    assert device_build(model, library, workspace_bytes=64 * MIB).workspace_bytes == 64 * MIB


def test_a_timing_cache_is_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, library = stand_in(monkeypatch, tmp_path)
    model = Network(quantized=False).model()
    first = device_build(model, library)
    again = device_build(model, library, timing_cache=first.timing_cache)
    assert first.timing_cache == again.timing_cache != b""
    assert module.timed == 1


def test_a_damaged_timing_cache_is_dropped_with_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, library = stand_in(monkeypatch, tmp_path)
    built = device_build(Network(quantized=False).model(), library, timing_cache=b"garbage")
    assert built.timing_cache.startswith(b"timings of 10.3")
    assert module.timed == 1
    (line,) = caplog.messages
    assert line.startswith("tensorrt 10.3.0.26: the timing cache of 7 bytes is damaged")
    assert line.endswith("dropped (the timing cache is damaged or of another version)")


def test_scratch_memory_follows_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configs: list[Any]
) -> None:
    _, library = stand_in(monkeypatch, tmp_path)
    device = cudart.probe()
    assert isinstance(device, cudart.Device)
    built = device_build(Network(quantized=False).model(), library)
    assert built.workspace_bytes == configs[0].workspace == workspace_for(device)[0]


@pytest.mark.parametrize(
    ("integrated", "free", "size", "words"),
    [
        (
            True,
            2000,
            500,
            "2,000 MiB of memory that CPU and GPU share are free, .* in 4 may be used",
        ),
        (True, 60_000, 1024, "60,000 MiB .*, and that is the most"),
        (True, 300, 256, "300 MiB .*, and that is the least"),
        (False, 1000, 500, "1,000 MiB of GPU memory are free, of which one part in 2 may be used"),
        (False, 8192, 1024, "8,192 MiB of GPU memory .*, and that is the most"),
    ],
)
def test_scratch_memory_is_a_bounded_share(
    integrated: bool, free: int, size: int, words: str
) -> None:
    device = cudart.Device(
        ordinal=0,
        compute_capability=(8, 7),
        integrated=integrated,
        free_bytes=free * MIB,
        total_bytes=2 * free * MIB,
        runtime_version="12.6",
        driver_version="12.6",
    )
    allowed, reason = workspace_for(device)
    assert allowed == size * MIB
    assert re.search(f"up to {size:,} MiB of scratch memory: {words}$", reason)


def library_of(version: str, *names: str, flavour: Any = "tensorrt") -> TensorRT:
    return TensorRT(types.SimpleNamespace(**dict.fromkeys(names)), flavour, version)


@pytest.mark.parametrize(
    ("library", "words"),
    [
        (library_of("8.5.2.2", "Builder"), "expected TensorRT 8.6 or newer.*got 8.5.2.2"),
        (library_of("11.4.0.106"), "only runs engines .the lean or dispatch runtime"),
    ],
)
def test_a_library_that_cannot_build_is_refused_before_it_is_touched(
    library: TensorRT, words: str
) -> None:
    with pytest.raises(EngineError, match=words) as refusal:
        build(b"", batch=(1, 1, 1), shape=SHAPE, library=library)
    assert refusal.value.fault == "wrong version"
    with pytest.raises(EngineError, match=words):
        preflight(b"", library)


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.3.0.26", "11.4.1.1"])
def test_newer_ones_may_build(version: str) -> None:
    assert check_version(library_of(version, "Builder")) == ""
    assert check_version(library_of("1.7.1.116", "Builder", flavour="tensorrt-rtx")) == ""


@pytest.mark.parametrize(("version", "lines"), [("10.2.0.19", 1), ("10.3.0.26", 0)])
def test_an_untested_version_says_so(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    version: str,
    lines: int,
) -> None:
    _, library = stand_in(monkeypatch, tmp_path, version)
    device_build(Network(quantized=False).model(), library)
    assert len([line for line in caplog.messages if "untested" in line]) == lines


def test_preflight_of_full_tensorrt_asks_cuda_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, library = stand_in(monkeypatch, tmp_path)
    module.unsupported = "Gemm"
    model = Network(quantized=False).model().SerializeToString()
    (gemm,) = preflight(model, library)
    assert gemm.startswith("Gemm node /net/Gemm")
    monkeypatch.setenv("FAKE_CUDA_ERROR", "100")
    with pytest.raises(EngineError, match="no GPU to build for") as refusal:
        preflight(model, library)
    assert refusal.value.fault == "no device"


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
    with pytest.raises(EngineError, match=words) as refusal:
        plan_header(plan)
    assert refusal.value.fault == "refused artifact"


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
