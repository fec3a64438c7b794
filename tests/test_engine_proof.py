"""Export's proof that TensorRT builds an artifact: real engines for three GPUs that are not here.

What it does where there is a GPU is asked of a stand-in for TensorRT and CUDA.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
from onnx.onnx_pb import ModelProto

from export import engines
from export.engines import EngineProof, prove_engine
from export.float16 import to_float16
from runtime.engines import cudart
from tests import standin_tensorrt
from tests.test_tensorrt_build import SHAPE, Network, with_operator

WITHOUT_A_GPU = pytest.mark.skipif(
    not isinstance(cudart.probe(), str), reason="this machine has a GPU"
)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, *SHAPE), np.uint8)


def logits_of(model: ModelProto) -> Any:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["logits"], {"image": IMAGES})[0]


def convolutions(model: ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type == "Conv"]


def prove(model: ModelProto, form: str, intended: list[str], **settings: Any) -> EngineProof:
    usual = {"images": IMAGES, "logits": np.zeros((len(IMAGES), 4), np.float32)}
    return prove_engine(
        model.SerializeToString(), form, intended, min_agreement=0.99, **(usual | settings)
    )


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install fieldfit[dev]")


@WITHOUT_A_GPU
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("form", "quantized", "half", "precisions", "summary"),
    [
        ("fp16", False, True, {"FP16": 11}, "11/11 FP16"),
        ("int8", True, False, {"FP32": 1, "INT8": 10}, "10/11 INT8"),
        ("int8-fp16", True, True, {"FP16": 1, "INT8": 10}, "10/11 INT8"),
    ],
)
def test_each_form_is_built_for_each_generation_of_gpu_in_its_precision(
    form: str, quantized: bool, half: bool, precisions: dict[str, int], summary: str
) -> None:
    model = Network(quantized=quantized).model()
    intended = convolutions(model)[1 if quantized else 0 :]
    told: list[tuple[float, str]] = []
    proof = prove(
        to_float16(model) if half else model,
        form,
        intended,
        progress=lambda share, phase: told.append((share, phase)),
    )
    assert proof.passed
    assert proof.built
    assert [build.target for build in proof.builds] == ["8.6", "8.9", "12.0"]
    assert all(build.precisions == precisions for build in proof.builds)
    assert all(build.plan_bytes > 0 for build in proof.builds)
    assert proof.reason == f"built by tensorrt-rtx {proof.version} for SM 8.6, 8.9 and 12.0"
    assert proof.summary == summary
    assert proof.gpu_reason == cudart.probe()
    assert msgspec.json.decode(msgspec.json.encode(proof), type=EngineProof) == proof
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert 0.9 < shares[-1] <= 1
    assert list(dict.fromkeys(phase.split(":")[0] for _, phase in told)) == [
        "SM 8.6",
        "SM 8.9",
        "SM 12.0",
    ]


@pytest.mark.usefixtures("rtx")
def test_a_convolution_in_another_precision_ends_the_proof() -> None:
    model = Network(quantized=False).model()
    names = convolutions(model)
    proof = prove(model, "int8", names)
    assert not proof.passed
    assert proof.reason == f"SM 8.6: 11 of 11 convolutions are not INT8: {names[0]} is FP32"
    assert [build.precisions for build in proof.builds] == [{"FP32": 11}]
    assert (proof.summary, proof.targets) == ("0/11 INT8", "SM 8.6")


@pytest.mark.usefixtures("rtx")
def test_a_graph_that_cannot_be_built_names_the_gpu_and_the_node() -> None:
    strange = with_operator(Network(quantized=False).model(), "Flatten", "Flatter", "the_node")
    proof = prove(strange, "fp16", [])
    assert not proof.passed
    assert not proof.built
    assert proof.reason.startswith("SM 8.6: tensorrt-rtx ")
    assert "Flatter node the_node" in proof.reason
    assert proof.summary == "not built"


@WITHOUT_A_GPU
def test_without_tensorrt_rtx_the_proof_says_so_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    proof = prove(Network(quantized=False).model(), "fp16", [])
    assert proof.passed
    assert not proof.built
    assert proof.reason.startswith("tensorrt-rtx: ")


def test_where_there_is_a_gpu_the_engine_is_run_timed_and_the_rung_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, _ = standin_tensorrt.install(monkeypatch, tmp_path)
    module.refuse_strong_dequantize = True
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(engines, "TIMED_SECONDS", 0.0)
    model = Network(quantized=True).model()
    proof = prove(model, "int8", [], logits=logits_of(model))
    assert proof.passed, proof
    assert proof.gpu is not None, proof.gpu_reason
    assert (proof.gpu.flavour, proof.gpu.typing, proof.gpu.agreement) == ("tensorrt", "weak", 1.0)
    assert proof.gpu.attempts[0].startswith("strongly typed: no engine: ")
    assert proof.gpu.wall_ms["p50"] > 0
    wrong = prove(model, "int8", [], logits=-logits_of(model))
    assert not wrong.passed
    assert "agrees with onnxruntime on" in wrong.reason
