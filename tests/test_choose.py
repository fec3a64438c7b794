"""Negotiation whole: every reason to step down, provoked; and plans that are built once and proven.

TensorRT is a stand-in here (tests/standin_tensorrt.py), with real files, processes and numbers
around it. The races are decided by the tests: how long a call takes is no matter of a test.
"""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.parity import measure
from export.write_bundle import encode_golden, write_bundle
from runtime import choose
from runtime.__main__ import main as fieldfit
from runtime.bundle import Bundle
from runtime.candidates import Request
from runtime.choose import Choice, choose_engine, open_forms, prove_on_cpu
from runtime.engines import cudart
from runtime.engines.engine import Engine
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.engines.plan_cache import PlanCache
from runtime.errors import EngineError
from runtime.manifest import FORMAT, Adaptation, Artifact, FileEntry, Form, Manifest, Minimum
from runtime.preprocess import InputSpec
from tests.standin_tensorrt import StandIn, environment, install
from tests.test_engines import CHANNELS, tiny_model

ROOT = Path(__file__).resolve().parent.parent
SIZE = (24, 16)
FORMS: tuple[Form, ...] = ("fp32", "fp16", "int8", "int8-cpu")
FAST = {"int8": 1.0, "fp16": 2.0, "int8-cpu": 3.0, "fp32": 6.0}
"""Milliseconds by form, unless a test says otherwise."""


def make_bundle(
    folder: Path, *, forms: Sequence[Form] = FORMS, minimum: Minimum | None = None,
    wrong: Sequence[str] = (), spoilt: Mapping[Form, Callable[[bytes], bytes]] | None = None,
) -> Bundle:  # fmt: skip
    """One tiny graph under the names of several forms.

    The golden logits of ``wrong`` are wrong; the files of ``spoilt`` are what it makes of them.
    """
    models = {form: tiny_model(size=SIZE) for form in forms}
    for form, model in models.items():
        model.doc_string = form  # other bytes, the same answers
    data = {form: model.SerializeToString() for form, model in models.items()}
    images = np.random.default_rng(1).integers(0, 256, (3, *SIZE, CHANNELS), dtype=np.uint8)
    with OnnxRuntimeEngine(data[forms[0]], form=forms[0], threads=1) as engine:
        logits = engine.infer(images).logits
    golden: dict[str, Any] = {form: -logits if form in wrong else logits for form in forms}
    quality = measure(logits, logits, np.array([0, 1, 2]), seed=0)
    for form, spoil in (spoilt or {}).items():
        data[form] = spoil(data[form])
    files = {f"{form}.onnx": data[form] for form in forms}
    files["golden.npz"] = encode_golden(images, golden)
    manifest = Manifest(
        format=FORMAT, name="tiny", version="1", labels=("a", "b", "c", "d"),
        input=InputSpec(size=SIZE, channels=CHANNELS),
        adaptation=Adaptation(rung="as is", verified=True, reason="so", labels_used=0),
        artifacts=tuple(Artifact(form=f, file=f"{f}.onnx", quality=quality) for f in forms),
        files=tuple(
            FileEntry(name=name, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
            for name, data in files.items()
        ),
        golden="golden.npz", recipe_sha256="0" * 64, checkpoint_sha256="1" * 64,
        required_provider=minimum,
    )  # fmt: skip
    write_bundle(folder / "bundle", folder / "tiny.zip", manifest, files)
    return Bundle.open(folder / "bundle")


def with_a_strange_node(model: bytes) -> bytes:
    strange = onnx.load_model_from_string(model)
    strange.graph.node[-1].op_type = "Strange"
    return bytes(strange.SerializeToString())


@pytest.fixture(autouse=True)
def decided(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Races end as FAST says; returns the forms of each that was held."""
    held: list[tuple[str, ...]] = []

    def race(engines: Sequence[Engine], images: Any) -> dict[str, float]:
        held.append(tuple(engine.form for engine in engines))
        return {engine.form: FAST[engine.form] for engine in engines}

    monkeypatch.setattr(choose, "race", race)
    return held


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], StandIn]:
    """Installs TensorRT of a version; a second call is an update."""

    def installed(version: str) -> StandIn:
        folder = tmp_path / f"tensorrt-{version}"  # a library that is loaded must not be written to
        folder.mkdir()
        return install(monkeypatch, folder, version)[0]

    return installed


@pytest.fixture
def trt(tensorrt: Callable[[str], StandIn]) -> StandIn:
    return tensorrt("10.3.0.26")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a PC without any of NVIDIA's libraries."""
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(cudart, "_candidates", lambda: iter(()))
    monkeypatch.setattr(cudart, "_loaded", None)


def opened(bundle: Bundle, folder: Path, **request: Any) -> Choice:
    rebuild = request.pop("rebuild", False)
    choice = choose_engine(
        bundle, Request(**{"threads": 1, **request}), cache=PlanCache(folder / "cache"),
        rebuild=rebuild,
    )  # fmt: skip
    choice.engine.close()
    return choice


def fates(choice: Choice) -> list[tuple[str, str, str]]:
    return [(step.engine, step.form, step.fault or "accepted") for step in choice.steps]


# --- stepping down


def test_without_nvidia_the_cpu_runs_and_each_step_down_has_its_reason(
    tmp_path: Path, no_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    choice = opened(make_bundle(tmp_path), tmp_path)
    assert fates(choice) == [
        ("TensorRT", "", "missing library"),
        ("onnxruntime CUDA", "", "missing library"),
        ("onnxruntime CPU", "fp32", "too slow"),
        ("onnxruntime CPU", "int8-cpu", "accepted"),
    ]
    assert "neither tensorrt nor tensorrt_rtx is installed" in str(choice.steps[0])
    assert "onnxruntime-gpu" in choice.steps[1].reason
    assert choice.steps[2].reason == "2.00x the time of int8-cpu (3.00 ms) here"
    loud = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert loud == [str(step) for step in choice.steps[:2]]


def test_tensorrt_runs_the_form_that_is_fastest_here(tmp_path: Path, trt: StandIn) -> None:
    choice = opened(make_bundle(tmp_path), tmp_path)
    assert fates(choice) == [("TensorRT", "fp16", "too slow"), ("TensorRT", "int8", "accepted")]
    assert "3 golden samples agree" in choice.steps[-1].reason
    assert "built in" in choice.steps[-1].reason
    assert (choice.engine.name, choice.engine.form, trt.builds) == ("tensorrt", "int8", 2)


def test_int8_that_is_slower_is_passed_over(
    tmp_path: Path, trt: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAST, "int8", 2.6)
    choice = opened(make_bundle(tmp_path), tmp_path)
    assert choice.engine.form == "fp16"
    assert choice.steps[0].reason == "1.30x the time of fp16 (2.00 ms) here"


def test_a_tensorrt_without_a_gpu_is_passed_over(
    tmp_path: Path, trt: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_ERROR", "35")
    choice = opened(make_bundle(tmp_path), tmp_path)
    assert choice.steps[0].fault == "no device"
    assert "CUDA error 35" in choice.steps[0].reason
    assert choice.engine.form == "int8-cpu"


def test_a_library_that_only_runs_plans_is_the_wrong_version(tmp_path: Path, trt: StandIn) -> None:
    del trt.Builder
    choice = opened(make_bundle(tmp_path), tmp_path)
    assert choice.steps[0].fault == "wrong version"
    assert "only runs engines" in choice.steps[0].reason


def test_a_tensorrt_that_is_too_old_is_the_wrong_version(
    tmp_path: Path, tensorrt: Callable[[str], StandIn]
) -> None:
    tensorrt("8.4.1.5")
    choice = opened(make_bundle(tmp_path), tmp_path)
    assert (choice.steps[0].engine, choice.steps[0].fault) == ("TensorRT", "wrong version")


def test_a_graph_that_cannot_be_built_is_passed_over_naming_the_node(
    tmp_path: Path, trt: StandIn
) -> None:
    trt.unsupported = "GlobalAveragePool"
    choice = opened(make_bundle(tmp_path), tmp_path)
    refused = [step for step in choice.steps if step.engine == "TensorRT"]
    assert [step.form for step in refused] == ["int8", "fp16", "fp32"]
    assert all("GlobalAveragePool" in step.reason for step in refused)
    assert choice.engine.provider == "cpu"


def test_an_engine_that_overflows_is_passed_over_and_not_kept(tmp_path: Path, trt: StandIn) -> None:
    trt.nan_outputs = True
    choice = opened(make_bundle(tmp_path), tmp_path)
    assert choice.steps[0].fault == "failed self-test"
    assert "not finite (NaN or overflow)" in choice.steps[0].reason
    assert PlanCache(tmp_path / "cache").entries() == []


def test_what_failed_is_not_built_again_at_every_start(tmp_path: Path, trt: StandIn) -> None:
    bundle = make_bundle(tmp_path, wrong=("int8",))
    assert fates(opened(bundle, tmp_path))[0] == ("TensorRT", "int8", "failed self-test")
    assert trt.builds == 2
    again = opened(bundle, tmp_path)
    assert fates(again)[0] == ("TensorRT", "int8", "failed self-test")
    assert "fieldfit build --rebuild tries again" in again.steps[0].reason
    assert (again.engine.form, trt.builds) == ("fp16", 2)
    assert opened(bundle, tmp_path, rebuild=True).engine.form == "fp16"
    assert trt.builds == 4


def test_what_could_not_be_built_is_remembered_as_that(tmp_path: Path, trt: StandIn) -> None:
    trt.unsupported = "Strange"
    bundle = make_bundle(tmp_path, spoilt={"int8": with_a_strange_node})
    for _ in range(2):
        choice = opened(bundle, tmp_path)
        assert fates(choice)[0] == ("TensorRT", "int8", "not built")
        assert "Strange" in choice.steps[0].reason


def test_what_tensorrt_cannot_read_is_said_without_building(
    tmp_path: Path,
    trt: StandIn,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = str(make_bundle(tmp_path, spoilt={"int8": with_a_strange_node}).path)
    assert fieldfit(["build", bundle, "--check"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: fieldfit build {bundle}"
    trt.unsupported = "Strange"
    assert fieldfit(["build", bundle, "--check", "--json"]) == 0
    unread = json.loads(capsys.readouterr().out)
    assert "Strange" in unread["int8"][0]
    assert unread["fp16"] == []
    assert fieldfit(["build", bundle, "--check", "--form", "int8"]) == 1
    assert "TensorRT can read none of its forms" in capsys.readouterr().err
    assert trt.builds == 0


def test_a_form_that_fails_on_the_cpu_is_passed_over(tmp_path: Path, no_gpu: None) -> None:
    bundle = make_bundle(tmp_path, wrong=("int8-cpu",))
    choice = opened(bundle, tmp_path)
    assert fates(choice)[2:] == [
        ("onnxruntime CPU", "int8-cpu", "failed self-test"),
        ("onnxruntime CPU", "fp32", "accepted"),
    ]
    assert not prove_on_cpu(bundle, "int8-cpu", bundle.golden()).accepted
    assert prove_on_cpu(bundle, "fp32", bundle.golden()).accepted


@pytest.mark.parametrize(
    ("hide", "engine", "fault"),
    [
        ("tensorrt", "TensorRT", "missing library"),
        ("onnxruntime", "onnxruntime CUDA", "missing library"),
        ("onnxruntime", "onnxruntime CPU", "missing library"),
    ],
)
def test_a_library_that_is_hidden_is_named(
    tmp_path: Path, trt: StandIn, monkeypatch: pytest.MonkeyPatch,
    hide: str, engine: str, fault: str,
) -> None:  # fmt: skip
    bundle = make_bundle(tmp_path)
    for module in (hide, *(["tensorrt_rtx"] if hide == "tensorrt" else [])):
        monkeypatch.setitem(sys.modules, module, None)
    name = engine.lower().replace(" ", "-")
    with pytest.raises(EngineError, match=f"{engine}: passed over: .*{hide}") as caught:
        opened(bundle, tmp_path, engine=name)
    assert caught.value.fault == fault


# --- what is required


def test_a_step_below_what_is_required_is_an_error_with_every_reason(
    tmp_path: Path, no_gpu: None
) -> None:
    with pytest.raises(EngineError) as caught:
        opened(make_bundle(tmp_path), tmp_path, require="cuda")
    words = str(caught.value)
    assert "cuda is required and cannot be had here" in words
    assert "TensorRT: passed over: " in words
    assert "onnxruntime CUDA: passed over: " in words
    assert "onnxruntime CPU: passed over: below the cuda that is required" in words
    assert caught.value.fault == "missing library"


def test_the_bundle_can_require_it(tmp_path: Path, no_gpu: None) -> None:
    with pytest.raises(EngineError, match="tensorrt is required and cannot be had"):
        opened(make_bundle(tmp_path, minimum="tensorrt"), tmp_path)


def test_what_is_required_is_used(tmp_path: Path, trt: StandIn) -> None:
    choice = opened(make_bundle(tmp_path, minimum="cuda"), tmp_path, require="tensorrt")
    assert choice.engine.name == "tensorrt"


def test_a_form_that_is_asked_for_runs_or_is_an_error(tmp_path: Path, no_gpu: None) -> None:
    bundle = make_bundle(tmp_path, wrong=("int8",))
    assert opened(bundle, tmp_path, form="fp16").engine.form == "fp16"
    with pytest.raises(EngineError, match=r"no engine can run it here.*failed its self-test"):
        opened(bundle, tmp_path, form="int8")
    with pytest.raises(EngineError, match=r"one of the bundle's forms, .* got int4"):
        opened(bundle, tmp_path, form="int4")


# --- the second start


def test_the_second_start_builds_and_races_nothing(
    tmp_path: Path, trt: StandIn, decided: list[tuple[str, ...]]
) -> None:
    bundle = make_bundle(tmp_path)
    opened(bundle, tmp_path)
    assert (trt.builds, decided) == (2, [("int8", "fp16")])
    again = opened(bundle, tmp_path)
    assert (trt.builds, len(decided)) == (2, 1)
    assert "plan of 20" in again.steps[-1].reason or "plan of 20" in again.steps[0].reason
    assert again.engine.form == "int8"
    assert ", measured 20" in next(s.reason for s in again.steps if s.fault == "too slow")


def test_another_bundle_or_thread_count_is_another_race(
    tmp_path: Path, no_gpu: None, decided: list[tuple[str, ...]]
) -> None:
    bundle = make_bundle(tmp_path)
    opened(bundle, tmp_path)
    opened(bundle, tmp_path, threads=2)
    opened(make_bundle(tmp_path / "b", forms=("fp32", "int8-cpu")), tmp_path)
    assert len(decided) == 3
    opened(bundle, tmp_path)
    assert len(decided) == 3


def test_after_an_update_the_engine_is_built_anew_and_the_old_plan_goes_when_it_is_proven(
    tmp_path: Path, tensorrt: Callable[[str], StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path)
    tensorrt("10.3.0.26")
    opened(bundle, tmp_path, form="int8")
    newer = tensorrt("10.13.3.9")
    newer.nan_outputs = True
    opened(bundle, tmp_path, form="int8")  # the CPU's, since the new engine is no good
    versions = [record.key.version for record in PlanCache(tmp_path / "cache").entries()]
    assert versions == ["10.3.0.26"]  # a downgrade would still find it
    newer.nan_outputs = False
    caplog.clear()
    choice = opened(bundle, tmp_path, form="int8", rebuild=True)
    assert choice.engine.version == "10.13.3.9"
    assert [r.key.version for r in PlanCache(tmp_path / "cache").entries()] == ["10.13.3.9"]


def test_the_reason_for_a_build_is_said(
    tmp_path: Path, tensorrt: Callable[[str], StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path)
    tensorrt("10.3.0.26")
    opened(bundle, tmp_path, form="int8")
    assert "it can take minutes" in caplog.text
    caplog.clear()
    opened(bundle, tmp_path, form="int8")
    assert caplog.text == ""
    tensorrt("10.13.3.9")
    opened(bundle, tmp_path, form="int8")
    (line,) = [r.getMessage() for r in caplog.records if "building" in r.getMessage()]
    assert "built by TensorRT 10.3.0.26, this is TensorRT 10.13.3.9" in line


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda plan: plan[: len(plan) // 2],
    "flipped": lambda plan: plan[:-9] + bytes([plan[-9] ^ 1]) + plan[-8:],
    "garbage": lambda plan: bytes(range(256)) * 9,
    "empty": lambda plan: b"",
    "other version": lambda plan: plan[:24] + bytes([11, 4, 0, 0]) + plan[28:],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_plan_is_built_again_out_loud(
    tmp_path: Path, trt: StandIn, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    bundle = make_bundle(tmp_path)
    opened(bundle, tmp_path, form="int8")
    (plan,) = (tmp_path / "cache" / "plans").glob("*.plan")
    plan.write_bytes(DAMAGE[case](plan.read_bytes()))
    caplog.clear()
    assert opened(bundle, tmp_path, form="int8").engine.name == "tensorrt"
    assert trt.builds == 2
    assert len([r for r in caplog.records if "building" in r.getMessage()]) == 1
    caplog.clear()
    opened(bundle, tmp_path, form="int8")
    assert (trt.builds, caplog.text) == (2, "")


def test_a_plan_that_tensorrt_refuses_now_is_built_again(
    tmp_path: Path, trt: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path)
    opened(bundle, tmp_path, form="int8")
    trt.refuse_plan = "The engine plan file is generated on an incompatible device"
    trt.on_step = lambda: setattr(trt, "refuse_plan", "")  # a fresh one is taken
    opened(bundle, tmp_path, form="int8")
    assert trt.builds == 2
    assert "is of no use: tensorrt: the plan was refused: The engine plan file" in caplog.text


def test_a_cache_that_cannot_be_written_is_said_at_every_start(
    tmp_path: Path, trt: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path)
    (tmp_path / "cache").touch()  # a file is in its place
    for builds in (2, 4):
        caplog.clear()
        choice = opened(bundle, tmp_path)
        assert (choice.engine.form, trt.builds) == ("int8", builds)
        assert "so it is built at every start" in choice.steps[-1].reason
        assert caplog.text.count("the plan is not kept") == 2
        assert "what was measured is not kept" in caplog.text


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path, trt: StandIn) -> None:
    def interrupt() -> None:
        trt.on_step = None
        raise KeyboardInterrupt

    bundle = make_bundle(tmp_path)
    trt.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        opened(bundle, tmp_path)
    assert PlanCache(tmp_path / "cache").entries() == []
    assert opened(bundle, tmp_path).engine.name == "tensorrt"


OPEN = """
import logging, sys, tensorrt
from runtime.bundle import Bundle
from runtime.candidates import Request
from runtime.choose import choose_engine
logging.basicConfig(level=logging.WARNING, format="%(message)s")
choice = choose_engine(Bundle.open(sys.argv[1]), Request(form="int8", threads=1))
print(choice.engine, tensorrt.builds)
"""


def test_two_programs_that_start_together_build_once(tmp_path: Path) -> None:
    import os

    bundle = make_bundle(tmp_path)
    (tmp_path / "libraries").mkdir()
    variables = {
        **os.environ, **environment(tmp_path / "libraries"), "FIELDFIT_CACHE": str(tmp_path / "c")
    }  # fmt: skip
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, str(bundle.path)],
            env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    answers = [program.communicate(timeout=120) for program in programs]
    assert sorted(out for out, _ in answers) == [
        "tensorrt CUDA, int8 0\n", "tensorrt CUDA, int8 1\n"
    ], answers  # fmt: skip


def test_where_gpu_and_cpu_share_memory_both_ways_are_timed_and_the_faster_is_kept(
    tmp_path: Path, trt: StandIn
) -> None:
    opened(make_bundle(tmp_path), tmp_path, form="int8")  # the stand-in's GPU is integrated
    (record,) = PlanCache(tmp_path / "cache").entries()
    assert record.notes["memory"] in ("pinned", "mapped")
    faster = min(("pinned", "mapped"), key=lambda memory: record.notes[f"{memory}_ms"])
    assert record.notes["memory"] == faster


# --- all forms of one engine, and artifacts that are refused


def test_all_forms_of_the_engine_that_would_be_chosen_are_opened_and_nothing_is_raced(
    tmp_path: Path, trt: StandIn, decided: list[tuple[str, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    bundle, cache = make_bundle(tmp_path, wrong=("int8",)), PlanCache(tmp_path / "cache")
    for _ in range(2):
        engines = open_forms(bundle, cache=cache)
        assert [(e.name, e.form) for e in engines] == [("tensorrt", "fp32"), ("tensorrt", "fp16")]
        for engine in engines:
            engine.close()
        assert (trt.builds, decided) == (3, [])
    assert caplog.text.count("TensorRT, int8: passed over: failed its self-test") == 2


def test_all_forms_of_an_engine_that_is_asked_for(tmp_path: Path, no_gpu: None) -> None:
    bundle, cache = make_bundle(tmp_path), PlanCache(tmp_path / "cache")
    for request in (Request(), Request(engine="onnxruntime-cpu")):
        engines = open_forms(bundle, request, cache=cache)
        assert [engine.form for engine in engines] == ["fp32", "int8-cpu"]
    with pytest.raises(EngineError, match="neither tensorrt nor tensorrt_rtx is installed"):
        open_forms(bundle, Request(engine="tensorrt"), cache=cache)


def test_benchmark_times_every_form_that_tensorrt_runs(
    tmp_path: Path, trt: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["benchmark", str(make_bundle(tmp_path).path), "--cache", str(tmp_path / "cache")]
    assert fieldfit([*arguments, "--seconds", "0.01", "--json"]) == 0
    timings = json.loads(capsys.readouterr().out)
    assert [timing["form"] for timing in timings] == ["fp32", "fp16", "int8"]
    assert timings[0]["relative_speed"] == 1.0
    assert fieldfit([*arguments, "--seconds", "0.01", "--engine", "onnxruntime-cpu"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("onnxruntime ")
    assert table[0].endswith("CPU, batch 1, threads 1; ms of one call")
    assert [line.split()[0] for line in table[1:]] == ["form", "fp32", "int8-cpu"]
    assert trt.builds == 3


def with_a_node_of_compiled_code(data: bytes) -> bytes:
    model = onnx.load_from_string(data)
    model.graph.node.add(op_type="EPContext", domain="com.microsoft", output=["plan"])
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(lambda data: b"no ONNX file", "int8-cpu"), (with_a_node_of_compiled_code, "EPContext")],
    ids=["no ONNX file", "EPContext"],
)
def test_an_artifact_that_is_refused_is_stepped_over(
    tmp_path: Path, no_gpu: None, spoil: Callable[[bytes], bytes], words: str
) -> None:
    choice = opened(make_bundle(tmp_path, spoilt={"int8-cpu": spoil}), tmp_path)
    assert fates(choice)[2:] == [
        ("onnxruntime CPU", "int8-cpu", "refused artifact"),
        ("onnxruntime CPU", "fp32", "accepted"),
    ]
    assert words in choice.steps[2].reason
