"""What guards a plan before it runs, for real; and the run itself on a stand-in, or on a GPU.

The stand-in has the methods of TensorRT that the engine calls, onnxruntime behind them, and a
libcudart whose device memory is the host's. It proves our order of calls, sizes and addresses; it
says nothing about TensorRT. The last test does that, where there is a GPU.
"""

import ctypes
import gc
import hashlib
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.engines import cudart, tensorrt_library
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.engines.tensorrt_build import build
from runtime.engines.tensorrt_engine import TensorRTEngine
from runtime.engines.tensorrt_library import load_library
from runtime.errors import EngineError

HERE = Path(__file__).parent
SHAPE = (6, 5, 3)
MAX_BATCH = 4
DEVICE = cudart.probe()
HEADER = b"ftrt" + bytes(20) + bytes([10, 3, 0, 26])


def tiny_model() -> bytes:
    random = np.random.default_rng(0)
    node = helper.make_node
    constants = {
        "scale": np.array(1 / 128, np.float32),
        "shift": np.array(-1, np.float32),
        "kernel": random.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "weight": random.normal(size=(4, 8)).astype(np.float32),
    }
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
            node("Mul", ["planes", "scale"], ["scaled"]),
            node("Add", ["scaled", "shift"], ["normalised"]),
            node("Conv", ["normalised", "kernel"], ["convolved"], name="conv"),
            node("Relu", ["convolved"], ["positive"]),
            node("GlobalAveragePool", ["positive"], ["pooled"]),
            node("Flatten", ["pooled"], ["features"]),
            node("Gemm", ["features", "weight"], ["logits"], transB=1),
        ],
        "tiny",
        [info("image", TensorProto.UINT8, ["N", *SHAPE])],
        [
            info("features", TensorProto.FLOAT, ["N", 8]),
            info("logits", TensorProto.FLOAT, ["N", 4]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def sha256(plan: bytes) -> str:
    return hashlib.sha256(plan).hexdigest()


def pictures(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


# --- before TensorRT is touched


def test_a_plan_with_another_digest_is_refused() -> None:
    with pytest.raises(EngineError, match=r"expected sha256 aaaaaaaaaaaa…, got .*build it again"):
        TensorRTEngine(HEADER, sha256="a" * 64, form="int8")


@pytest.mark.parametrize("plan", [b"", b"onnx", HEADER[:20]])
def test_what_is_no_plan_is_refused(plan: bytes) -> None:
    with pytest.raises(EngineError, match="expected a TensorRT plan"):
        TensorRTEngine(plan, sha256=sha256(plan), form="int8")


@pytest.mark.skipif(not isinstance(DEVICE, str), reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_cudas() -> None:
    with pytest.raises(EngineError, match="tensorrt: no GPU: "):
        TensorRTEngine(HEADER, sha256=sha256(HEADER), form="int8")


# --- TensorRT's own answer to damaged plans, each in a process of its own: it might crash

DESERIALIZE = """
import sys
from runtime.engines.tensorrt_engine import _deserialize
from runtime.engines.tensorrt_library import listening, load_library
from runtime.errors import EngineError
library = load_library("tensorrt-rtx")
with listening(library) as heard:
    try:
        _deserialize(library, sys.stdin.buffer.read(), heard)
    except EngineError as error:
        print(error)
"""

DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "whole": (lambda plan: plan, "."),
    "truncated": (lambda plan: plan[: len(plan) // 2], "plan.header.size == blobSize"),
    "flipped": (lambda plan: plan[:200] + bytes(b ^ 255 for b in plan[200:300]) + plan[300:], "."),
    "garbage": (lambda plan: bytes(range(256)) * 64, "incompatible serialization version"),
    "short": (lambda plan: plan[:3], "bufferSize"),
    "empty": (lambda plan: b"", "empty memory buffer"),
}


@pytest.mark.skipif(not isinstance(DEVICE, str), reason="a damaged plan must not reach a GPU")
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_plans_end_in_words_and_not_in_a_crash(case: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install fieldfit[dev]")
    damage, words = DAMAGE[case]
    plan = build(tiny_model(), batch=(1, 1, 4), shape=SHAPE, target_sm=(8, 6), level=0).plan
    done = subprocess.run(
        [sys.executable, "-c", DESERIALIZE],
        input=damage(plan),
        capture_output=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stderr.decode()
    (line,) = done.stdout.decode().splitlines()
    assert line.startswith("tensorrt-rtx: the plan was refused: ")
    assert words in line


# --- the run, on a stand-in


class StandInContext:
    def __init__(self, engine: "StandInEngine") -> None:
        self.engine, self.addresses, self.shape = engine, dict[str, int](), (0, *SHAPE)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape  # type: ignore[assignment]
        return name == "image" and not self.engine.trt.refuse_shapes

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in ("image", "logits", "features")

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.trt.fail_runs:
            self.engine.trt.say("enqueueV3: Error Code 1")
            return False
        size = int(np.prod(self.shape))
        raw = ctypes.string_at(self.addresses["image"], size)
        images = np.frombuffer(raw, np.uint8).reshape(self.shape)
        outputs = self.engine.session.run(["logits", "features"], {"image": images})
        for name, values in zip(("logits", "features"), outputs, strict=True):
            ctypes.memmove(self.addresses[name], values.tobytes(), values.nbytes)
        return bool(stream)


class StandInEngine:
    num_io_tensors = 3

    def __init__(self, trt: Any, model: bytes) -> None:
        self.trt = trt
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def get_tensor_name(self, index: int) -> str:
        return ("features", "image", self.trt.third_tensor)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return "uint8" if name == "image" else "float"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {"image": (-1, *SHAPE), "logits": (-1, 4), "features": (-1, 8)}[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(count, *SHAPE) for count in (1, 1, MAX_BATCH)]

    def create_execution_context(self) -> StandInContext:
        return StandInContext(self)


class StandIn(types.ModuleType):
    """A module ``tensorrt`` 10.3 that takes a header and an ONNX file for a plan."""

    __version__ = "10.3.0"
    DataType = types.SimpleNamespace(UINT8="uint8", FLOAT="float")

    class ILogger:
        Severity = types.SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    def __init__(self) -> None:
        super().__init__("tensorrt")
        self.third_tensor = "logits"
        self.refuse_shapes = self.fail_runs = False
        self.logger: Any = None

    def say(self, words: str) -> None:
        self.logger.log(1, words)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        self.logger = logger
        return types.SimpleNamespace(deserialize_cuda_engine=self.deserialize)

    def deserialize(self, plan: bytes) -> StandInEngine | None:
        if plan.endswith(b"another device"):
            self.say("The engine plan file is generated on an incompatible device")
            return None
        return StandInEngine(self, plan[len(HEADER) :])


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler: the stand-in for libcudart is compiled")
    path = tmp_path / "libcudart.so.12"
    source = HERE / "fake_cudart.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source], check=True)
    monkeypatch.setattr(cudart, "_candidates", lambda: iter([str(path)]))
    monkeypatch.setattr(cudart, "_loaded", None)
    return ctypes.CDLL(str(path))


@pytest.fixture
def trt(cuda: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.delitem(tensorrt_library._loggers, "tensorrt", raising=False)
    yield module
    gc.collect()
    assert cuda.fakeLive() == 0  # whatever happened, nothing stays allocated
    if module.logger is not None:
        assert module.logger.sinks == []


def stand_in_engine() -> TensorRTEngine:
    plan = HEADER + tiny_model()
    return TensorRTEngine(plan, sha256=sha256(plan), form="fp16")


def test_a_plan_answers_like_its_graph(trt: StandIn) -> None:
    reference = OnnxRuntimeEngine(tiny_model(), form="fp32", threads=1)
    with stand_in_engine() as engine:
        assert str(engine) == "tensorrt CUDA, fp16"
        assert (engine.version, engine.max_batch, engine.shape) == ("10.3.0", MAX_BATCH, SHAPE)
        kept = engine.infer(pictures(1, seed=9))
        for count in (1, 4, 4, 2):
            images = pictures(count, seed=count)
            for got, expected in zip(engine.infer(images), reference.infer(images), strict=True):
                np.testing.assert_allclose(got, expected, atol=1e-5)
        again = engine.infer(pictures(1, seed=9))
        np.testing.assert_array_equal(kept.logits, again.logits)  # later calls left it alone
        with pytest.raises(EngineError, match="with N <= 4, got 5"):
            engine.infer(pictures(5))
    with pytest.raises(EngineError, match="closed"):
        engine.infer(pictures(1))


def test_a_failed_run_gives_the_words_of_the_logger(trt: StandIn) -> None:
    with stand_in_engine() as engine:
        trt.fail_runs = True
        with pytest.raises(EngineError, match="the run failed: enqueueV3: Error Code 1"):
            engine.infer(pictures(1))
        trt.refuse_shapes = True
        with pytest.raises(EngineError, match="batch of 2: TensorRT gave no reason"):
            engine.infer(pictures(2))
        trt.refuse_shapes = trt.fail_runs = False
        assert engine.infer(pictures(2)).logits.shape == (2, 4)


def test_a_plan_for_another_device_is_refused_in_tensorrts_words(trt: StandIn) -> None:
    plan = HEADER + b"another device"
    with pytest.raises(EngineError, match="refused: The engine plan file is generated on an inc"):
        TensorRTEngine(plan, sha256=sha256(plan), form="fp16")


def test_a_plan_with_other_tensors_is_refused(trt: StandIn) -> None:
    trt.third_tensor = "boxes"
    with pytest.raises(EngineError, match="logits and features, got boxes, features, image"):
        stand_in_engine()


def test_a_plan_of_another_version_is_refused(trt: StandIn) -> None:
    plan = b"ftrt" + bytes(20) + bytes([10, 13, 3, 9])
    with pytest.raises(EngineError, match=r"built by tensorrt 10\.13\.3\.9, this is 10\.3\.0"):
        TensorRTEngine(plan, sha256=sha256(plan), form="fp16")


def test_a_plan_of_the_other_flavour_needs_that_library(
    trt: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    plan = b"vtrt" + bytes(12) + (28).to_bytes(8, "little") + bytes([1, 7, 1, 116])
    with pytest.raises(EngineError, match="needs tensorrt-rtx, which does not load"):
        TensorRTEngine(plan, sha256=sha256(plan), form="fp16")


# --- the run, for real


@pytest.mark.gpu
@pytest.mark.skipif(isinstance(DEVICE, str), reason=f"needs a GPU: {DEVICE}")
def test_a_real_engine_answers_like_onnxruntime() -> None:
    if isinstance(reason := load_library(), str):
        pytest.skip(f"needs TensorRT: {reason}")
    model = tiny_model()
    built = build(model, batch=(1, 1, MAX_BATCH), shape=SHAPE)
    reference = OnnxRuntimeEngine(model, form="fp32", threads=1)
    with TensorRTEngine(built.plan, sha256=built.sha256, form="fp32") as engine:
        for count in (1, 4, 2):
            images = pictures(count, seed=count)
            for got, expected in zip(engine.infer(images), reference.infer(images), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-2)  # TF32
