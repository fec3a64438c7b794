"""The seam, the contract that every engine keeps, and what each onnxruntime engine refuses.

The contract suite runs on every engine that this machine can open; the others are skipped with
the reason why they do not open. A new engine joins with one line in ``BACKENDS``.
"""

import contextlib
import functools
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.engines import cudart
from runtime.engines.engine import Engine, Outputs, UInt8, input_shape
from runtime.engines.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.engines.onnxruntime_tensorrt_engine import (
    OnnxRuntimeTensorRTEngine,
    caching,
    engine_folder,
    profile,
)
from runtime.engines.tensorrt_build import build
from runtime.engines.tensorrt_engine import TensorRTEngine
from runtime.engines.tensorrt_library import Flavour, load_library
from runtime.errors import EngineError
from tests import standin_tensorrt

SHAPE = HEIGHT, WIDTH, CHANNELS = 6, 5, 3
LARGEST = 7
"""Batch of the engines that must know it when they are built."""


def tiny_model(
    *, input_name: str = "image", size: tuple[int | str, int] = (HEIGHT, WIDTH)
) -> onnx.ModelProto:
    """Cast, Transpose, Mul, Add, GlobalAveragePool, Flatten, Gemm: the contract without a CNN."""
    random = np.random.default_rng(0)
    constants = {
        "scale": np.array(1 / 128, np.float32),
        "shift": np.array(-1, np.float32),
        "weight": random.normal(size=(4, CHANNELS)).astype(np.float32),
        "bias": random.normal(size=4).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", [input_name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["planes", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["normalised"]),
        helper.make_node("GlobalAveragePool", ["normalised"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"], transB=1),
    ]
    shape = ["N", *size, CHANNELS]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(input_name, TensorProto.UINT8, shape)],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", CHANNELS]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


MODEL = bytes(tiny_model().SerializeToString())


def pictures(count: int, seed: int = 1) -> UInt8:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def reference(images: UInt8) -> Outputs:
    """What the graph means, in NumPy and float64."""
    initializers = {t.name: numpy_helper.to_array(t) for t in tiny_model().graph.initializer}
    features = (images.astype(np.float64) / 128 - 1).mean(axis=(1, 2))
    logits = features @ initializers["weight"].T + initializers["bias"]
    return Outputs(logits.astype(np.float32), features.astype(np.float32))


# --- the engines


def _tensorrt(flavour: Flavour) -> Engine:
    library = load_library(flavour)
    if isinstance(library, str):
        raise EngineError(library, "missing library")
    if isinstance(found := cudart.probe(), str):
        raise EngineError(f"{flavour}: no GPU: {found}", "no device")
    plan, sha256 = _plan(flavour)
    return TensorRTEngine(plan, sha256=sha256, form="fp32")


@functools.cache
def _plan(flavour: Flavour) -> tuple[bytes, str]:
    library = load_library(flavour)
    assert not isinstance(library, str)
    built = build(MODEL, batch=(1, 1, LARGEST), shape=SHAPE, library=library)
    return built.plan, built.sha256


def _stand_in() -> Engine:
    built = build(MODEL, batch=(1, 1, LARGEST), shape=SHAPE)
    return TensorRTEngine(built.plan, sha256=built.sha256, form="fp32")


BACKENDS: dict[str, Callable[[], Engine]] = {
    "onnxruntime CPU": lambda: OnnxRuntimeEngine(MODEL, form="fp32", threads=1),
    "onnxruntime CUDA": lambda: OnnxRuntimeCudaEngine(MODEL, form="fp32"),
    "onnxruntime TensorRT": lambda: OnnxRuntimeTensorRTEngine(
        MODEL, form="fp32", shape=SHAPE, batch=(1, 1, LARGEST)
    ),
    "tensorrt": lambda: _tensorrt("tensorrt"),
    "tensorrt-rtx": lambda: _tensorrt("tensorrt-rtx"),
    "stand-in for TensorRT": _stand_in,
}
PREPARE: dict[str, Callable[[pytest.MonkeyPatch, Path], object]] = {
    "stand-in for TensorRT": standin_tensorrt.install,
}
NOT_HERE = ("missing library", "wrong version", "no device")
"""Faults of the machine. An engine that does not open for another reason is broken."""

Open = Callable[[], Engine]


@pytest.fixture(params=BACKENDS)
def open_engine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Open]:
    """Open one more engine of one backend; all are closed in the end.

    Tests call it, for then pytest says once for each backend why it is skipped, not once a test.
    """
    name = request.param
    if name in PREPARE:
        PREPARE[name](monkeypatch, tmp_path)
    with contextlib.ExitStack() as stack:

        def open_one() -> Engine:
            try:
                return stack.enter_context(BACKENDS[name]())
            except EngineError as error:
                if error.fault in NOT_HERE and name != "onnxruntime CPU":
                    pytest.skip(f"does not open here: {error}")
                raise

        yield open_one


def tolerance(engine: Engine) -> float:
    return 1e-5 if engine.provider == "cpu" else 1e-2  # GPUs multiply in TF32


# --- the contract


def test_answers_are_those_of_numpy_whatever_the_batch(open_engine: Open) -> None:
    engine = open_engine()
    for count in (1, 2, LARGEST, 2, 1):
        images = pictures(count, seed=count)
        got, expected = engine.infer(images), reference(images)
        np.testing.assert_allclose(got.features, expected.features, atol=tolerance(engine))
        np.testing.assert_allclose(got.logits, expected.logits, atol=tolerance(engine))
        assert got.logits.dtype == got.features.dtype == np.float32
        assert (got.logits.shape, got.features.shape) == ((count, 4), (count, CHANNELS))


def test_the_same_images_give_the_same_bits(open_engine: Open) -> None:
    engine = open_engine()
    first = engine.infer(pictures(3))
    engine.infer(pictures(5, seed=9))
    for one, other in zip(first, engine.infer(pictures(3)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_answers_are_the_callers_to_keep_and_to_change(open_engine: Open) -> None:
    engine = open_engine()
    kept = engine.infer(pictures(2))
    before = [output.copy() for output in kept]
    for seed in range(3):
        engine.infer(pictures(2, seed=seed))
    for output, copy in zip(kept, before, strict=True):
        np.testing.assert_array_equal(output, copy)  # later calls left it alone
        output[...] = 7.0
    for output, copy in zip(engine.infer(pictures(2)), before, strict=True):
        np.testing.assert_array_equal(output, copy)  # and changing it changed nothing
    assert not np.shares_memory(kept.logits, kept.features)


def test_images_are_only_read(open_engine: Open) -> None:
    engine = open_engine()
    images = pictures(2)
    images.flags.writeable = False
    engine.infer(images)
    np.testing.assert_array_equal(images, pictures(2))


def test_images_may_change_after_the_call(open_engine: Open) -> None:
    engine = open_engine()
    images = pictures(1)
    answer = engine.infer(images)
    images[...] = 0
    np.testing.assert_allclose(answer.logits, reference(pictures(1)).logits, atol=tolerance(engine))
    np.testing.assert_allclose(
        engine.infer(images).logits, reference(images).logits, atol=tolerance(engine)
    )


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (pictures(1)[0], "got [6, 5, 3]; add the batch axis"),
        (pictures(1).astype(np.float32), "got float32; pass the bytes that preprocess returns"),
        (pictures(1)[:, :4], "got [1, 4, 5, 3]"),
        (pictures(1).transpose(0, 2, 1, 3), "got [1, 5, 6, 3]"),
        (pictures(4)[::2], "in C order"),
        (pictures(0), "got no image"),
        (pictures(1).tolist(), "got list"),
        (np.zeros((), np.uint8), "got []"),
    ],
    ids=["no batch", "float", "height", "order", "strides", "empty", "list", "scalar"],
)
def test_wrong_images_are_refused_in_words(open_engine: Open, images: UInt8, words: str) -> None:
    engine = open_engine()
    with pytest.raises(EngineError) as refusal:
        engine.infer(images)
    assert "expected a uint8 array [N, 6, 5, 3]" in str(refusal.value)
    assert words in str(refusal.value)
    engine.infer(pictures(1))  # and nothing is broken by it


def test_a_batch_above_the_limit_is_refused(open_engine: Open) -> None:
    engine = open_engine()
    if engine.max_batch is None:
        engine.infer(pictures(10 * LARGEST))
        return
    with pytest.raises(EngineError, match=f"with N <= {LARGEST}, got {LARGEST + 1}; pass smaller"):
        engine.infer(pictures(LARGEST + 1))


def test_an_equal_dtype_that_is_another_object_passes(open_engine: Open) -> None:
    engine = open_engine()
    other = pictures(1).view(np.dtype(np.uint8, metadata={"from": "a file"}))
    np.testing.assert_array_equal(engine.infer(other).logits, engine.infer(pictures(1)).logits)


def test_a_closed_engine_refuses(open_engine: Open) -> None:
    engine = open_engine()
    with engine as entered:
        entered.infer(pictures(1))
    engine.close()
    with pytest.raises(EngineError, match="closed; open it again"):
        engine.infer(pictures(1))


def test_engines_of_one_kind_leave_each_other_alone(open_engine: Open) -> None:
    one, other = open_engine(), open_engine()
    expected = one.infer(pictures(2))
    other.infer(pictures(3, seed=5))
    other.close()
    np.testing.assert_array_equal(one.infer(pictures(2)).logits, expected.logits)


def test_engines_run_in_threads_each_in_its_own(open_engine: Open) -> None:
    """Opened here and used there, which is what a service does."""
    wrong: list[str] = []

    def work(engine: Engine, seed: int) -> None:
        images = pictures(2, seed=seed)
        expected = reference(images).logits
        answers = [engine.infer(images).logits for _ in range(20)]
        right = [np.allclose(answer, expected, atol=tolerance(engine)) for answer in answers]
        if not all(right):
            wrong.append(f"{right.count(False)} answers of thread {seed}")

    threads = [threading.Thread(target=work, args=(open_engine(), seed)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_engine_says_what_it_is(open_engine: Open) -> None:
    engine = open_engine()
    assert str(engine).startswith(f"{engine.name} ")
    assert str(engine).endswith(", fp32")
    assert engine.provider in ("cpu", "cuda", "tensorrt")
    assert engine.version.split(".")[0].isdigit()
    assert (engine.shape, engine.form) == (SHAPE, "fp32")


# --- the seam itself


class Echo(Engine):
    """Answers at once, so that only the seam is left."""

    def __init__(self) -> None:
        super().__init__(
            name="echo", version="1", provider="cpu", form="fp32", shape=SHAPE, max_batch=2
        )
        self.answer = Outputs(np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32))

    def _infer(self, images: UInt8) -> Outputs:
        return self.answer


def test_on_the_fast_path_the_seam_calls_nothing_of_its_own() -> None:
    """What it costs in microseconds is for the benchmarks to say."""
    engine, images = Echo(), pictures(1)
    called: list[str] = []

    def record(frame: Any, event: str, _: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    sys.setprofile(record)
    try:
        engine.infer(images)
    finally:
        sys.setprofile(None)
    assert called == ["infer", "_infer"]


def test_an_answer_passes_the_seam_uncopied() -> None:
    engine = Echo()
    assert engine.infer(pictures(1)) is engine.answer


GOOD: tuple[Any, ...] = ("image", "uint8", [None, 6, 5, 3])
LOGITS: tuple[Any, ...] = ("logits", "float32", [None, 4])
FEATURES: tuple[Any, ...] = ("features", "float32", [None, 9])


def test_a_graph_that_keeps_the_contract_has_a_picture_shape() -> None:
    assert input_shape("fp32", [GOOD], [FEATURES, LOGITS]) == (6, 5, 3)


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        (
            [("pixels", *GOOD[1:])],
            [LOGITS, FEATURES],
            r"one input image, .* got pixels, uint8 \[\?",
        ),
        ([("image", "float32", GOOD[2])], [LOGITS, FEATURES], "got image, float32"),
        ([GOOD, ("mask", *GOOD[1:])], [LOGITS, FEATURES], "; mask, uint8"),
        ([("image", "uint8", [None, None, 5, 3])], [LOGITS, FEATURES], "only the batch axis may"),
        ([GOOD], [LOGITS], "expected outputs logits and features"),
        ([GOOD], [LOGITS, ("features", "float16", [None, 9])], "features, float16"),
    ],
    ids=["name", "dtype", "two inputs", "dynamic height", "one output", "half"],
)
def test_a_graph_that_breaks_the_contract_is_refused(
    inputs: list[Any], outputs: list[Any], words: str
) -> None:
    with pytest.raises(EngineError, match=words) as refusal:
        input_shape("fp32", inputs, outputs)
    assert refusal.value.fault == "refused artifact"


# --- onnxruntime on the CPU


def test_the_library_s_own_graphs_are_checked_for_the_contract() -> None:
    for other, words in (
        (tiny_model(input_name="pixels"), r"got pixels, uint8 \[\?, 6, 5, 3\]"),
        (tiny_model(size=("H", WIDTH)), "only the batch axis may be dynamic"),
    ):
        with pytest.raises(EngineError, match=words):
            OnnxRuntimeEngine(other.SerializeToString(), form="fp32", threads=1)


def test_a_run_that_fails_does_not_begin_anew_on_the_cpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """onnxruntime's Python would print, make a CPU session and answer from that."""
    from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

    class Failing:
        def __init__(self, session: Any) -> None:
            self._session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def run(self, *_: object) -> None:
            raise EPFail("CUDA failure 700: an illegal memory access")

    engine = OnnxRuntimeEngine(MODEL, form="fp32", threads=1)
    engine._session._sess = Failing(engine._session._sess)
    with pytest.raises(EngineError, match="the run failed: CUDA failure 700"):
        engine.infer(pictures(1))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"not a model",
        lambda data: bytes(range(256)) * 4,
        lambda data: data.replace(b"GlobalAveragePool", b"GlobalAverageFool"),
        lambda data: data.replace(b"weight", b"height", 1),
    ],
    ids=["empty", "truncated", "text", "bytes", "unknown operator", "renamed"],
)
def test_a_damaged_model_is_one_line(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(EngineError) as refusal:
        OnnxRuntimeEngine(damage(MODEL), form="fp32", threads=1)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("onnxruntime CPU, fp32: cannot load the model of")
    assert refusal.value.fault == "refused artifact"


def quantized_model() -> onnx.ModelProto:
    """``tiny_model`` with a quantized convolution, of which the last channel is nearly dead."""
    model = tiny_model()
    channels: dict[str, Any] = {
        "act": np.array(0.02, np.float32),
        "out": np.array(0.05, np.float32),
        "zero": np.array(0, np.int8),
        "integers": np.full((CHANNELS, CHANNELS, 1, 1), 100, np.int8),
        "scales": np.array([1e-3, 1e-3, 1e-10], np.float32),
        "zeros": np.zeros(CHANNELS, np.int8),
        "biases": np.array([0.5, -0.5, 2.0], np.float32),
    }
    node = helper.make_node
    quantized = [
        node("QuantizeLinear", ["normalised", "act", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "act", "zero"], ["dq"]),
        node("DequantizeLinear", ["integers", "scales", "zeros"], ["kernel"], axis=0),
        node("Conv", ["dq", "kernel", "biases"], ["convolved"]),
        node("QuantizeLinear", ["convolved", "out", "zero"], ["q1"]),
        node("DequantizeLinear", ["q1", "out", "zero"], ["dq1"]),
    ]
    rest = list(model.graph.node)
    rest[4].input[0] = "dq1"
    nodes = [*rest[:4], *quantized, *rest[4:]]
    tensors = [numpy_helper.from_array(value, name) for name, value in channels.items()]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    onnx.checker.check_model(model, full_check=True)
    return model


def test_a_nearly_dead_channel_keeps_its_bias() -> None:
    """onnxruntime's optimizer, left on, answers 0 here where 2 is right."""
    engine = OnnxRuntimeEngine(quantized_model().SerializeToString(), form="int8", threads=1)
    np.testing.assert_allclose(engine.infer(pictures(3)).features[:, 2], 2.0, atol=0.05)


def test_a_graph_with_compiled_code_is_refused() -> None:
    model = tiny_model()
    model.graph.node[4].op_type = "EPContext"
    model.graph.node[4].domain = "com.microsoft"
    with pytest.raises(EngineError, match=r"EPContext\), which is executable code") as refusal:
        OnnxRuntimeEngine(model.SerializeToString(), form="fp32")
    assert refusal.value.fault == "refused artifact"


@pytest.mark.parametrize(
    "open_one",
    [
        lambda: OnnxRuntimeEngine(MODEL, form="fp32"),
        lambda: OnnxRuntimeCudaEngine(MODEL, form="fp32"),
        lambda: OnnxRuntimeTensorRTEngine(MODEL, form="fp32", shape=SHAPE),
    ],
    ids=["CPU", "CUDA", "TensorRT"],
)
def test_a_hidden_library_is_missing(open_one: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    words = "onnxruntime cannot be imported: .*; pip install onnxruntime"
    with pytest.raises(EngineError, match=words) as refusal:
        open_one()
    assert refusal.value.fault == "missing library"


# --- onnxruntime on a GPU: what keeps it from being the CPU in silence

GPU_BUILD = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
GPU = cudart.Device(0, (8, 7), True, 4 << 30, 8 << 30, "12.6", "12.6")
ON_GPU: dict[str, Open] = {
    "CUDA": lambda: OnnxRuntimeCudaEngine(MODEL, form="fp32"),
    "TensorRT": lambda: OnnxRuntimeTensorRTEngine(MODEL, form="fp32", shape=SHAPE),
}
needs_gpu_build = pytest.mark.skipif(
    not GPU_BUILD,
    reason="needs an onnxruntime built for GPUs: run these tests where onnxruntime-gpu is",
)
needs_no_gpu = pytest.mark.skipif(not isinstance(cudart.probe(), str), reason="there is a GPU")


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime lists GPU providers, which it also does where none of them opens."""
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)


def test_cuda_runs_no_quantized_graph() -> None:
    quantized = quantized_model().SerializeToString()
    with pytest.raises(EngineError, match=r"fp32 or fp16, got int8: .* no INT8") as refusal:
        OnnxRuntimeCudaEngine(quantized, form="int8")
    assert refusal.value.fault == "refused artifact"


@pytest.mark.skipif(GPU_BUILD, reason="this onnxruntime is built for GPUs")
@pytest.mark.parametrize("name", ON_GPU)
def test_an_onnxruntime_for_the_cpu_is_a_missing_library(name: str) -> None:
    words = rf"onnxruntime {name}: expected an onnxruntime with \w+ExecutionProvider, got one with"
    with pytest.raises(EngineError, match=words) as refusal:
        ON_GPU[name]()
    assert refusal.value.fault == "missing library"


@needs_no_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_a_listed_provider_without_a_gpu_is_refused_before_it_is_tried(
    name: str, listed: None, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match=f"^onnxruntime {name}: ") as refusal:
        ON_GPU[name]()
    assert refusal.value.fault in ("no device", "missing library")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ON_GPU)
def test_without_the_cuda_runtime_a_library_is_missing(
    name: str, listed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudart, "_candidates", lambda: iter(()))
    monkeypatch.setattr(cudart, "_loaded", None)
    with pytest.raises(EngineError, match=f"{name}: no CUDA runtime library") as refusal:
        ON_GPU[name]()
    assert refusal.value.fault == "missing library"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA says that there is a GPU."""
    monkeypatch.setattr(cudart, "load", lambda: None)
    monkeypatch.setattr(cudart, "probe", lambda device: GPU)


@pytest.mark.skipif(GPU_BUILD, reason="this onnxruntime is built for GPUs")
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
@pytest.mark.parametrize("name", ON_GPU)
def test_a_listed_provider_that_does_not_open_is_never_the_cpu(
    name: str, listed: None, gpu: None
) -> None:
    with pytest.raises(EngineError, match=f"onnxruntime {name}") as refusal:
        ON_GPU[name]()
    assert "CPU" not in str(refusal.value).partition(":")[0]


@needs_no_gpu
@needs_gpu_build
@pytest.mark.parametrize("name", ON_GPU)
def test_onnxruntime_gpu_names_the_library_that_it_lacks(name: str, gpu: None) -> None:
    with pytest.raises(EngineError, match=rf"^onnxruntime {name}: lib\w+\.so\S*: ") as refusal:
        ON_GPU[name]()
    assert refusal.value.fault == "missing library"
    assert "\n" not in str(refusal.value)


@needs_gpu_build
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tensorrt", [*profile(SHAPE, (1, 1, 2)), *caching(Path("x")), "trt_max_workspace_size"]),
        ("cuda", ["cudnn_conv_algo_search", "arena_extend_strategy", "HEURISTIC"]),
    ],
    ids=["TensorRT", "CUDA"],
)
def test_onnxruntime_gpu_knows_the_options(name: str, options: list[str]) -> None:
    folder = Path(onnxruntime.__file__).parent / "capi"
    library = (folder / f"libonnxruntime_providers_{name}.so").read_bytes()
    assert [option for option in options if option.encode() not in library] == []


def test_the_profile_names_the_input_and_its_sides() -> None:
    assert profile((160, 120, 1), (1, 2, 16)) == {
        "trt_profile_min_shapes": "image:1x160x120x1",
        "trt_profile_opt_shapes": "image:2x160x120x1",
        "trt_profile_max_shapes": "image:16x160x120x1",
    }


def test_each_model_has_a_private_folder_of_engines(tmp_path: Path) -> None:
    """onnxruntime would take the engine of another model with the same graph."""
    first = engine_folder(tmp_path / "cache", MODEL, (1, 1, 16))
    assert engine_folder(tmp_path / "cache", MODEL, (1, 1, 16)) == first
    assert stat.S_IMODE(first.stat().st_mode) == 0o700
    others = [
        engine_folder(tmp_path / "cache", MODEL + b" ", (1, 1, 16)),
        engine_folder(tmp_path / "cache", MODEL, (1, 1, 8)),
    ]
    assert len({first, *others}) == 3


def test_a_folder_of_engines_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = engine_folder(tmp_path, MODEL, (1, 1, 16))
    folder.chmod(0o777)
    with pytest.raises(EngineError, match="only its owner may write to, got mode d") as refusal:
        engine_folder(tmp_path, MODEL, (1, 1, 16))
    assert refusal.value.fault == "refused artifact"


def test_a_cache_that_is_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(EngineError, match=r"no folder for engines: .*; choose another cache"):
        engine_folder(tmp_path / "cache", MODEL, (1, 1, 16))
