"""The seam and onnxruntime behind it, on a tiny real graph with a numpy reference."""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.engines.engine import Engine, Outputs, UInt8
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import EngineError

HEIGHT, WIDTH, CHANNELS = 6, 5, 3


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


@pytest.fixture(scope="module")
def model() -> bytes:
    return bytes(tiny_model().SerializeToString())


@pytest.fixture
def engine(model: bytes) -> Engine:
    return OnnxRuntimeEngine(model, form="fp32", threads=1)


def pictures(count: int) -> UInt8:
    random = np.random.default_rng(1)
    return random.integers(0, 256, (count, HEIGHT, WIDTH, CHANNELS), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_onnxruntime_answers_like_numpy(engine: Engine, count: int) -> None:
    images = pictures(count)
    logits, features = engine.infer(images)
    initializers = {t.name: numpy_helper.to_array(t) for t in tiny_model().graph.initializer}
    expected = (images.astype(np.float64) / 128 - 1).mean(axis=(1, 2))
    np.testing.assert_allclose(features, expected, atol=1e-6)
    np.testing.assert_allclose(
        logits, expected @ initializers["weight"].T + initializers["bias"], atol=1e-5
    )
    assert logits.dtype == features.dtype == np.float32


def test_an_engine_says_what_it_is(engine: Engine) -> None:
    assert str(engine) == "onnxruntime CPU, fp32"
    assert (engine.name, engine.provider, engine.form) == ("onnxruntime", "cpu", "fp32")
    assert engine.shape == (HEIGHT, WIDTH, CHANNELS)


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
)
def test_wrong_images_are_refused_in_words(engine: Engine, images: UInt8, words: str) -> None:
    with pytest.raises(EngineError) as refusal:
        engine.infer(images)
    assert "expected a uint8 array [N, 6, 5, 3]" in str(refusal.value)
    assert words in str(refusal.value)


def test_an_equal_dtype_that_is_another_object_passes(engine: Engine) -> None:
    other = pictures(1).view(np.dtype(np.uint8, metadata={"from": "a file"}))
    np.testing.assert_array_equal(engine.infer(other).logits, engine.infer(pictures(1)).logits)


class Echo(Engine):
    """Answers at once, so that only the seam's own time is left."""

    def __init__(self) -> None:
        super().__init__(
            name="echo",
            version="1",
            provider="cpu",
            form="fp32",
            shape=(HEIGHT, WIDTH, CHANNELS),
            max_batch=2,
        )
        self.answer = Outputs(np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32))

    def _infer(self, images: UInt8) -> Outputs:
        return self.answer


def test_a_batch_above_the_limit_is_refused() -> None:
    with pytest.raises(EngineError, match=r"with N <= 2, got 3"):
        Echo().infer(pictures(3))


def test_the_seam_costs_a_few_microseconds() -> None:
    engine, images = Echo(), pictures(1)
    rounds = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            engine.infer(images)
        rounds.append((time.perf_counter() - start) / 500)
    assert min(rounds) < 5e-6


def test_a_closed_engine_refuses(engine: Engine) -> None:
    with engine:
        engine.infer(pictures(1))
    engine.close()
    with pytest.raises(EngineError, match="closed; open it again"):
        engine.infer(pictures(1))


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
def test_a_damaged_model_is_one_line(model: bytes, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(EngineError) as refusal:
        OnnxRuntimeEngine(damage(model), form="fp32", threads=1)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("onnxruntime CPU, fp32: cannot load the model of")


def test_a_nearly_dead_channel_keeps_its_bias() -> None:
    """onnxruntime's optimizer, left on, answers 0 here where 2 is right."""
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
    engine = OnnxRuntimeEngine(model.SerializeToString(), form="int8", threads=1)
    np.testing.assert_allclose(engine.infer(pictures(3)).features[:, 2], 2.0, atol=0.05)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (tiny_model(input_name="pixels"), r"one input image, uint8 \[N, H, W, C\], got \[\('pix"),
        (tiny_model(size=("H", WIDTH)), "only the batch axis may be dynamic"),
    ],
    ids=["input name", "dynamic height"],
)
def test_a_graph_that_breaks_the_contract_is_refused(other: onnx.ModelProto, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        OnnxRuntimeEngine(other.SerializeToString(), form="fp32", threads=1)


def test_a_graph_with_compiled_code_is_refused() -> None:
    model = tiny_model()
    model.graph.node[4].op_type = "EPContext"
    model.graph.node[4].domain = "com.microsoft"
    with pytest.raises(EngineError, match="EPContext nodes, which carry compiled code"):
        OnnxRuntimeEngine(model.SerializeToString(), form="fp32")


def test_cuda_is_refused_with_the_reason(model: bytes) -> None:
    import onnxruntime

    with pytest.raises(EngineError, match="no INT8 convolution kernels"):
        OnnxRuntimeEngine(model, form="int8", provider="cuda")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(EngineError, match="install an onnxruntime built for CUDA"):
            OnnxRuntimeEngine(model, form="fp16", provider="cuda")


def test_without_onnxruntime_the_module_still_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError):
        OnnxRuntimeEngine(b"", form="fp32")
