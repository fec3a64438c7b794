"""What guards a plan before it runs, for real; and the run itself on a stand-in, or on a GPU.

The stand-in (standin_tensorrt.py) proves our order of calls, sizes and addresses; it says nothing
about TensorRT. The last test does that, where there is a GPU.
"""

import ctypes
import functools
import gc
import hashlib
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.engines import cudart
from runtime.engines.engine import Outputs
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.engines.tensorrt_build import build
from runtime.engines.tensorrt_engine import (
    MAX_GRAPHS,
    Memory,
    TensorRTEngine,
    _graph_refusal,
)
from runtime.engines.tensorrt_inspector import parse_inspection
from runtime.engines.tensorrt_library import TensorRT, load_library
from runtime.errors import EngineError
from tests.standin_tensorrt import StandIn, install

HERE = Path(__file__).parent
SHAPE = (6, 5, 3)
MAX_BATCH = 6
DEVICE = cudart.probe()
VERSION = "10.3.0.26"
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


def refusal(plan: bytes, *, digest: str | None = None, memory: Memory = "pinned") -> EngineError:
    with pytest.raises(EngineError) as refused:
        TensorRTEngine(plan, sha256=digest or sha256(plan), form="int8", memory=memory)
    return refused.value


def test_a_plan_with_another_digest_is_refused() -> None:
    error = refusal(HEADER, digest="a" * 64)
    assert "expected sha256 aaaaaaaaaaaa…, got " in str(error)
    assert "build it again" in str(error)
    assert error.fault == "refused artifact"


def epcontext_model() -> bytes:
    """onnxruntime's wrapping of an engine: as much foreign code as the engine in it."""
    info = helper.make_tensor_value_info
    node = helper.make_node(
        "EPContext", ["image"], ["logits"], domain="com.microsoft", ep_cache_context=HEADER
    )
    graph = helper.make_graph(
        [node],
        "wrapped",
        [info("image", TensorProto.UINT8, ["N", *SHAPE])],
        [info("logits", TensorProto.FLOAT, ["N", 4])],
    )
    return bytes(helper.make_model(graph).SerializeToString())


NO_PLANS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "short": lambda: HEADER[:20],
    "garbage": lambda: bytes(range(256)),
    "an ONNX file": lambda: tiny_model(),
    "an EPContext file": epcontext_model,
}


@pytest.mark.parametrize("case", NO_PLANS)
def test_what_is_no_plan_is_refused(case: str) -> None:
    error = refusal(NO_PLANS[case]())
    assert str(error).startswith("expected a TensorRT plan, which starts with ftrt or vtrt")
    assert error.fault == "refused artifact"


@pytest.mark.skipif(not isinstance(DEVICE, str), reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_cudas() -> None:
    error = refusal(HEADER)
    assert str(error).startswith("tensorrt: no GPU: ")
    library = "missing library" if "no CUDA runtime library" in str(error) else "no device"
    assert error.fault == library


def test_without_cuda_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "_candidates", lambda: iter([]))
    monkeypatch.setattr(cudart, "_loaded", None)
    error = refusal(HEADER)
    assert str(error).startswith("tensorrt: no GPU: no CUDA runtime library")
    assert error.fault == "missing library"


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
        print(error.fault, error, sep="|")
"""

DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "whole": (lambda plan: plan, "."),
    "truncated": (lambda plan: plan[: len(plan) // 2], "plan.header.size == blobSize"),
    "flipped": (lambda plan: plan[:200] + bytes(b ^ 255 for b in plan[200:300]) + plan[300:], "."),
    "garbage": (lambda plan: bytes(range(256)) * 64, "incompatible serialization version"),
    "short": (lambda plan: plan[:3], "bufferSize"),
    "empty": (lambda plan: b"", "empty memory buffer"),
    "another version": (lambda plan: plan[:24] + bytes([1, 6, 0, 9]) + plan[28:], "."),
    "an ONNX file": (lambda plan: tiny_model(), "incompatible serialization version"),
    "an EPContext file": (lambda plan: epcontext_model(), "incompatible serialization version"),
}


@functools.cache
def rtx_plan() -> bytes:
    library = load_library("tensorrt-rtx")
    assert not isinstance(library, str)
    return build(
        tiny_model(), batch=(1, 1, 4), shape=SHAPE, library=library, target_sm=(8, 6), level=0
    ).plan


@pytest.mark.skipif(not isinstance(DEVICE, str), reason="a damaged plan must not reach a GPU")
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_plans_end_in_words_and_not_in_a_crash(case: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install fieldfit[dev]")
    damage, words = DAMAGE[case]
    plan = damage(rtx_plan())
    done = subprocess.run(
        [sys.executable, "-c", DESERIALIZE],
        input=plan,
        capture_output=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stderr.decode()
    (line,) = done.stdout.decode().splitlines()
    assert line.startswith("refused artifact|tensorrt-rtx: the plan was refused: ")
    assert words in line


# --- the run, on a stand-in


@pytest.fixture
def installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[StandIn, ctypes.CDLL]]:
    module, library = install(monkeypatch, tmp_path)
    yield module, library
    gc.collect()
    assert library.fakeLive() == 0  # whatever happened, nothing stays allocated
    assert not module.host_code_allowed  # a plan may carry code for the host
    if module.logger is not None:
        assert module.logger.sinks == []


@pytest.fixture
def trt(installed: tuple[StandIn, ctypes.CDLL]) -> StandIn:
    return installed[0]


@pytest.fixture
def cuda(installed: tuple[StandIn, ctypes.CDLL]) -> ctypes.CDLL:
    return installed[1]


@pytest.fixture(scope="module")
def reference() -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(tiny_model(), form="fp32", threads=1)


def stand_in_engine(*, memory: Memory = "pinned", graphs: bool = True) -> TensorRTEngine:
    library = load_library("tensorrt")
    assert not isinstance(library, str)
    built = build(tiny_model(), batch=(1, 1, MAX_BATCH), shape=SHAPE, library=library)
    return TensorRTEngine(
        built.plan, sha256=built.sha256, form="fp16", memory=memory, graphs=graphs
    )


def assert_close(got: Outputs, expected: Outputs) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("memory", ["pinned", "mapped"])
def test_a_plan_answers_like_its_graph(
    trt: StandIn, reference: OnnxRuntimeEngine, memory: Memory, graphs: bool
) -> None:
    with stand_in_engine(memory=memory, graphs=graphs) as engine:
        assert str(engine) == "tensorrt CUDA, fp16"
        assert (engine.version, engine.max_batch, engine.shape) == (VERSION, MAX_BATCH, SHAPE)
        kept = engine.infer(pictures(1, seed=9))
        for call, count in enumerate((1, 4, 4, 2, 4, 1, 1, 2, 2, 6, 3, 6, 4)):
            images = pictures(count, seed=call)
            assert_close(engine.infer(images), reference.infer(images))
        again = engine.infer(pictures(1, seed=9))
        np.testing.assert_array_equal(kept.logits, again.logits)  # later calls left it alone
        with pytest.raises(EngineError, match="with N <= 6, got 7"):
            engine.infer(pictures(7))
    with pytest.raises(EngineError, match="closed"):
        engine.infer(pictures(1))
    with pytest.raises(EngineError, match="closed"):
        engine.layer_information()
    engine.close()


def test_each_batch_size_that_comes_again_gets_a_graph(trt: StandIn, cuda: ctypes.CDLL) -> None:
    with stand_in_engine() as engine:
        launches = []
        for count in (1, 1, 1, 2, 1, 2, 2):
            engine.infer(pictures(count))
            launches.append(cuda.fakeLaunches())
        # The second call also tries the graph that it makes.
        assert launches == [0, 2, 3, 3, 4, 6, 7]
        assert engine.graph_refusal == ""


def test_only_so_many_graphs_are_kept(
    trt: StandIn, cuda: ctypes.CDLL, reference: OnnxRuntimeEngine
) -> None:
    with stand_in_engine() as engine:
        allocated = []
        for count in range(1, MAX_BATCH + 1):
            for call in range(3):
                images = pictures(count, seed=call)
                assert_close(engine.infer(images), reference.infer(images))
            allocated.append(cuda.fakeLive())
        assert cuda.fakeLaunches() == 3 * MAX_GRAPHS
        graphs = np.array(allocated) - allocated[0] + 1
        assert graphs.tolist() == [1, 2, 3, 4, 4, 4]  # nothing else is allocated on the way
        assert engine.graph_refusal == ""


FORBIDDEN: dict[str, tuple[str, str]] = {
    "FAKE_CUDA_CAPTURE_ERROR": ("900", "cudaStreamBeginCapture: CUDA error 900"),
    "FAKE_CUDA_INSTANTIATE_ERROR": ("2", "cudaGraphInstantiateWithFlags: CUDA error 2: out of me"),
    "fail_capture": ("", "the run failed: Error Code 1: Cuda Runtime (operation not permitted whe"),
    "empty_capture": ("", "a graph answers otherwise than what it was made from"),
}


@pytest.mark.parametrize("memory", ["pinned", "mapped"])
@pytest.mark.parametrize("case", FORBIDDEN)
def test_without_graphs_it_goes_on_and_says_so_once(
    trt: StandIn,
    cuda: ctypes.CDLL,
    reference: OnnxRuntimeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    case: str,
    memory: Memory,
) -> None:
    value, words = FORBIDDEN[case]
    with monkeypatch.context() as forbidding:
        if value:
            forbidding.setenv(case, value)
        else:
            forbidding.setattr(trt, case, True)
        with stand_in_engine(memory=memory) as engine, caplog.at_level(logging.WARNING):
            for call, count in enumerate((1, 1, 1, 2, 2, 1)):
                images = pictures(count, seed=call)
                assert_close(engine.infer(images), reference.infer(images))
            assert words in engine.graph_refusal
            (record,) = caplog.records
            assert record.getMessage().startswith(
                "tensorrt CUDA, fp16: goes on without CUDA graphs: "
            )
            tried = cuda.fakeLaunches()
            forbidding.undo()  # what failed once is not tried again
            for _ in range(3):
                engine.infer(pictures(2))
            assert cuda.fakeLaunches() == tried == (1 if case == "empty_capture" else 0)
            trt.fail_runs = True
            with pytest.raises(EngineError, match=r"the run failed: enqueueV3: Error Code 1$"):
                engine.infer(pictures(1))


def test_graphs_that_were_captured_outlive_one_that_cannot_be(
    trt: StandIn, cuda: ctypes.CDLL, reference: OnnxRuntimeEngine
) -> None:
    with stand_in_engine() as engine:
        for _ in range(2):
            engine.infer(pictures(1))
        trt.fail_capture = True
        for call, count in enumerate((2, 2, 1, 2)):
            images = pictures(count, seed=call)
            assert_close(engine.infer(images), reference.infer(images))
        assert cuda.fakeLaunches() == 3


def test_graphs_need_not_be_wanted(trt: StandIn, cuda: ctypes.CDLL) -> None:
    with stand_in_engine(graphs=False) as engine:
        for _ in range(3):
            engine.infer(pictures(1))
        assert engine.graph_refusal == "not asked for"
        assert cuda.fakeLaunches() == 0


def test_graphs_need_contexts_that_share_memory(
    trt: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "shares_memory", False)
    with stand_in_engine() as engine:
        engine.infer(pictures(1))
        assert engine.graph_refusal == "tensorrt 10.3.0.26 cannot share memory between contexts"


def test_graphs_are_not_for_tensorrt_rtx(trt: StandIn) -> None:
    rtx = TensorRT(trt, "tensorrt-rtx", "1.7.1.116")
    refusal = _graph_refusal(rtx, engine=None, wanted=True)
    assert refusal.startswith("tensorrt-rtx replaces its first kernels")


def test_a_context_is_told_a_shape_only_when_it_changes(trt: StandIn) -> None:
    with stand_in_engine(graphs=False) as engine:
        for count in (1, 1, 1, 2, 2, 1):
            engine.infer(pictures(count))
    assert trt.shapes_told == 3


def test_mapped_memory_is_one_piece_for_both_sides(trt: StandIn, cuda: ctypes.CDLL) -> None:
    live, copies = {}, {}
    memories: tuple[Memory, ...] = ("pinned", "mapped")
    for memory in memories:
        before = cuda.fakeCopies()
        with stand_in_engine(memory=memory, graphs=False) as engine:
            engine.infer(pictures(1))
            live[memory] = cuda.fakeLive()
            copies[memory] = cuda.fakeCopies() - before
    assert copies == {"pinned": 3, "mapped": 0}
    assert live == {"pinned": 7, "mapped": 4}  # a stream, and three tensors on each side


def test_mapped_memory_is_refused_where_the_gpu_cannot(
    trt: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_CAN_MAP", "0")
    error = refusal(trt.header + tiny_model(), memory="mapped")
    assert str(error) == (
        'tensorrt: CUDA device 0 cannot map the host\'s memory; use memory="pinned"'
    )
    assert trt.logger is None  # TensorRT was not touched


def test_whatever_allocation_fails_nothing_stays(
    trt: StandIn, cuda: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in_engine():
        needed = cuda.fakeLive()
    for room in range(needed):
        monkeypatch.setenv("FAKE_CUDA_ROOM", str(room))
        with pytest.raises(EngineError, match="CUDA error 2: out of memory"):
            stand_in_engine()
        gc.collect()
        assert cuda.fakeLive() == 0
        assert trt.logger.sinks == []
    # Room for the buffers but not for a graph: plain runs go on.
    monkeypatch.setenv("FAKE_CUDA_ROOM", str(needed))
    with stand_in_engine() as engine:
        for _ in range(3):
            assert np.isfinite(engine.infer(pictures(1)).logits).all()
        assert "out of memory" in engine.graph_refusal


def test_an_error_on_the_device_surfaces_where_it_is_waited_for(
    trt: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in_engine() as engine:
        monkeypatch.setenv("FAKE_CUDA_KERNEL_ERROR", "700")
        with pytest.raises(EngineError, match="cudaStreamSynchronize: CUDA error 700"):
            engine.infer(pictures(1))
        monkeypatch.delenv("FAKE_CUDA_KERNEL_ERROR")


def test_a_failed_run_gives_the_words_of_the_logger(trt: StandIn) -> None:
    with stand_in_engine() as engine:
        engine.infer(pictures(1))
        trt.fail_runs = True
        with pytest.raises(EngineError, match="the run failed: enqueueV3: Error Code 1"):
            engine.infer(pictures(2))
        trt.refuse_shapes = True
        with pytest.raises(EngineError, match="batch of 3: TensorRT gave no reason"):
            engine.infer(pictures(3))
        trt.refuse_shapes = trt.fail_runs = False
        assert engine.infer(pictures(3)).logits.shape == (3, 4)


def test_any_thread_may_call(
    trt: StandIn,
    cuda: ctypes.CDLL,
    reference: OnnxRuntimeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    plan = build(tiny_model(), batch=(1, 1, MAX_BATCH), shape=SHAPE)
    devices: list[int] = []
    answers: list[Outputs] = []
    images = [pictures(count, seed=count) for count in (1, 2, 1, 2, 1)]
    with TensorRTEngine(plan.plan, sha256=plan.sha256, form="fp16", device=1) as engine:

        def call(batch: npt.NDArray[np.uint8]) -> None:
            answers.append(engine.infer(batch))
            devices.append(cuda.fakeDevice())  # CUDA keeps it for each thread

        for batch in images:
            thread = threading.Thread(target=call, args=(batch,))
            thread.start()
            thread.join()
    assert devices == [1] * len(images)
    for batch, answer in zip(images, answers, strict=True):
        assert_close(answer, reference.infer(batch))


def test_nan_comes_through_for_the_self_test_to_see(trt: StandIn) -> None:
    trt.nan_outputs = True
    with stand_in_engine() as engine:
        for _ in range(3):
            assert np.isnan(engine.infer(pictures(1)).logits).all()
        assert engine.graph_refusal == ""


def test_a_plan_for_another_device_is_refused_in_tensorrts_words(trt: StandIn) -> None:
    trt.refuse_plan = "The engine plan file is generated on an incompatible device"
    error = refusal(trt.header + tiny_model())
    assert str(error) == f"tensorrt: the plan was refused: {trt.refuse_plan}"
    assert error.fault == "refused artifact"


def test_a_plan_that_is_damaged_inside_is_refused(trt: StandIn) -> None:
    error = refusal(trt.header + b"damaged")
    assert str(error).startswith("tensorrt: the plan was refused: Serialization assertion failed")
    assert error.fault == "refused artifact"


def test_without_a_context_the_reason_is_tensorrts(trt: StandIn) -> None:
    trt.refuse_context = "Requested amount of GPU memory could not be allocated"
    with pytest.raises(EngineError, match="tensorrt: no execution context: Requested amount of GP"):
        stand_in_engine()


def test_a_plan_with_other_tensors_is_refused(trt: StandIn) -> None:
    trt.third_tensor = "boxes"
    with pytest.raises(EngineError, match=r"logits and features, .* got features.*; boxes,") as it:
        stand_in_engine()
    assert it.value.fault == "refused artifact"


@pytest.mark.parametrize("version", [(10, 13, 3, 9), (10, 3, 0, 27)])
def test_a_plan_of_another_version_is_refused(trt: StandIn, version: tuple[int, ...]) -> None:
    error = refusal(b"ftrt" + bytes(20) + bytes(version))
    number = ".".join(map(str, version))
    assert str(error) == (
        f"the plan was built by tensorrt {number}, this is 10.3.0.26; build it again"
    )
    assert error.fault == "wrong version"
    assert trt.logger is None  # TensorRT was not touched


def test_a_real_plan_of_another_version_is_refused_by_its_header(cuda: ctypes.CDLL) -> None:
    rtx = pytest.importorskip(
        "tensorrt_rtx", reason="needs tensorrt-rtx: pip install fieldfit[dev]"
    )
    plan = rtx_plan()
    error = refusal(plan[:24] + bytes([1, 0, 0, 9]) + plan[28:])
    assert str(error) == (
        f"the plan was built by tensorrt-rtx 1.0.0.9, this is {rtx.__version__}; build it again"
    )
    assert error.fault == "wrong version"


def test_bindings_that_tell_three_numbers_are_compared_by_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "10.3.0")
    stand_in_engine().close()
    assert refusal(b"ftrt" + bytes(20) + bytes([10, 3, 1, 0])).fault == "wrong version"


def test_a_plan_of_the_other_flavour_needs_that_library(
    trt: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    plan = b"vtrt" + bytes(12) + (28).to_bytes(8, "little") + bytes([1, 7, 1, 116])
    error = refusal(plan)
    assert str(error).startswith("the plan needs tensorrt-rtx, which does not load: ")
    assert error.fault == "missing library"


@pytest.mark.parametrize("version", [VERSION, "11.4.0.106"])
def test_the_engine_tells_its_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    install(monkeypatch, tmp_path, version)
    with stand_in_engine() as engine:
        text = engine.layer_information()
    assert ("Bindings" in json.loads(text)) == version.startswith("10")
    inspection = parse_inspection(text)
    assert set(inspection.tensors) == {"image", "logits", "features"}
    assert [layer.name for layer in inspection.layers] == ["conv", ""]


# --- the run, for real


@pytest.mark.gpu
@pytest.mark.skipif(isinstance(DEVICE, str), reason=f"needs a GPU: {DEVICE}")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("memory", ["pinned", "mapped"])
def test_a_real_engine_answers_like_onnxruntime(
    reference: OnnxRuntimeEngine, memory: Memory, graphs: bool
) -> None:
    if isinstance(reason := load_library(), str):
        pytest.skip(f"needs TensorRT: {reason}")
    built = build(tiny_model(), batch=(1, 1, MAX_BATCH), shape=SHAPE)
    engine = TensorRTEngine(
        built.plan, sha256=built.sha256, form="fp32", memory=memory, graphs=graphs
    )
    with engine:
        for call, count in enumerate((1, 1, 1, 4, 4, 2, 4, 1, 2, 2)):
            images = pictures(count, seed=call)
            for got, expected in zip(engine.infer(images), reference.infer(images), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-2)  # TF32
        if graphs and engine.name == "tensorrt":
            assert engine.graph_refusal == ""
        assert parse_inspection(engine.layer_information()).layers
