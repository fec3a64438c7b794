"""Which engines are tried in which order, before any library is asked."""

import pytest

from runtime.candidates import KINDS, Request, plan_rounds
from runtime.errors import EngineError
from runtime.manifest import Form, Minimum

ALL: tuple[Form, ...] = ("fp32", "fp16", "int8", "int8-fp16", "int8-cpu")


def order(
    request: Request, forms: tuple[Form, ...] = ALL, minimum: Minimum | None = None
) -> list[tuple[str, tuple[str, ...]]]:
    return [(r.kind.name, r.forms) for r in plan_rounds(request, forms, minimum)[0]]


def test_the_gpu_comes_before_the_cpu_and_tensorrt_before_onnxruntime() -> None:
    assert order(Request()) == [
        ("tensorrt", ("int8-fp16", "int8", "fp16")),
        ("tensorrt", ("fp32",)),
        ("onnxruntime-cuda", ("fp16", "fp32")),
        ("onnxruntime-cpu", ("int8-cpu", "fp32")),
    ]


def test_only_what_passed_the_gate_is_a_candidate() -> None:
    assert order(Request(), ("fp32",)) == [
        ("tensorrt", ("fp32",)), ("onnxruntime-cuda", ("fp32",)), ("onnxruntime-cpu", ("fp32",)),
    ]  # fmt: skip
    forms: tuple[Form, ...] = ("int8-cpu",)
    rounds, excluded = plan_rounds(Request(), forms, None)
    assert [r.kind.name for r in rounds] == ["onnxruntime-cpu"]
    assert [(e.kind.name, e.reason) for e in excluded] == [
        ("tensorrt", "runs none of int8-cpu"), ("onnxruntime-cuda", "runs none of int8-cpu"),
    ]  # fmt: skip


def test_the_tensorrt_provider_is_tried_only_when_asked_for() -> None:
    assert "onnxruntime-tensorrt" not in dict(order(Request()))
    asked = order(Request(engine="onnxruntime-tensorrt"))
    assert asked == [
        ("onnxruntime-tensorrt", ("int8", "fp16")),
        ("onnxruntime-tensorrt", ("fp32",)),
    ]


@pytest.mark.parametrize("how", ["request", "manifest"])
def test_nothing_below_what_is_required_is_a_candidate(how: str) -> None:
    def names(need: Minimum) -> set[str]:
        asked = Request(require=need) if how == "request" else Request()
        return {name for name, _ in order(asked, minimum=need if how == "manifest" else None)}

    assert names("tensorrt") == {"tensorrt"}
    assert names("cuda") == {"tensorrt", "onnxruntime-cuda"}
    _, excluded = plan_rounds(Request(require="tensorrt"), ALL, "cuda")
    assert {e.kind.name: e.reason for e in excluded} == {
        "onnxruntime-cuda": "below the tensorrt that is required",
        "onnxruntime-cpu": "below the tensorrt that is required",
    }


def test_a_form_that_is_asked_for_is_the_only_one_wherever_it_runs() -> None:
    assert order(Request(form="fp32")) == [
        ("tensorrt", ("fp32",)), ("onnxruntime-cuda", ("fp32",)), ("onnxruntime-cpu", ("fp32",)),
    ]  # fmt: skip
    assert order(Request(form="int8")) == [("tensorrt", ("int8",)), ("onnxruntime-cpu", ("int8",))]
    assert order(Request(form="fp16", engine="onnxruntime-cpu")) == [("onnxruntime-cpu", ("fp16",))]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(form="int4"), "expected one of the bundle's forms, fp32, fp16, .*, got int4"),
        (Request(engine="tflite"), "expected an engine of tensorrt, .*, got tflite"),  # type: ignore[arg-type]
        (
            Request(engine="onnxruntime-cpu", require="cuda"),
            "cuda is required, and onnxruntime-cpu",
        ),
        (Request(engine="tensorrt", form="int8-cpu"), "TensorRT runs .*, not int8-cpu"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_in_words(request_: Request, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        plan_rounds(request_, ALL, None)
    assert caught.value.fault == "not wanted"


def test_tiers_hold_only_what_an_engine_runs() -> None:
    for kind in KINDS:
        assert {form for tier in kind.tiers for form in tier} <= set(kind.runs)
