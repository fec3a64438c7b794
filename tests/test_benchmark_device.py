"""What the device and gpu benchmarks make of clocks, processes and folders of our own."""

import functools
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import device, gpu, harness, training
from benchmarks.harness import Options, Table, Times, interleave
from runtime.candidates import Request
from runtime.choose import choose_engine
from runtime.engines import cudart
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.engines.plan_cache import PlanCache
from runtime.errors import EngineError
from tests import standin_tensorrt

ROOT = Path(__file__).resolve().parent.parent
OURS, BARE = device.OURS, device.BARE


@pytest.mark.parametrize(
    ("wall", "cpu", "words"),
    [
        (1.3, 1.3, "holds"),
        (1.4, 1.0, "does not hold"),
        (1.0, 1.4, "does not hold"),  # more threads hide work from the clock on the wall
    ],
)
def test_a_start_is_held_to_the_bar_by_wall_and_by_cpu_time(
    wall: float, cpu: float, words: str
) -> None:
    times = {
        OURS: Times(cpu=[cpu] * 3, wall=[wall] * 3),
        BARE: Times(cpu=[1.0] * 3, wall=[1.0] * 3),
    }

    table, figures = device.start_table(times, BARE, "Start")

    assert table.notes[0].endswith(f"wall and by CPU time: {words}.")
    assert [row[0] for row in table.rows] == [OURS, BARE]
    assert figures[OURS]["wall_ratio"].median == wall


def test_processes_are_charged_with_the_time_of_their_threads() -> None:
    busy = "t = __import__('time'); end = t.process_time() + {}\nwhile t.process_time() < end: pass"
    processes = {
        name: functools.partial(device.run_code, sys.executable, busy.format(seconds))
        for name, seconds in (("long", 0.2), ("short", 0.0))
    }

    times = interleave(processes, seconds=0.0, least=1, warmup=0, clocks=device.CHILDREN)

    # Not a matter of this machine's speed: the loop is told how long to work.
    assert times["long"].cpu[0] > 0.2
    assert times["long"].cpu[0] > times["short"].cpu[0]


def test_a_process_that_fails_says_its_last_line() -> None:
    with pytest.raises(EngineError, match="ValueError: no such thing"):
        device.run_code(sys.executable, "raise ValueError('no such thing')")


def test_processes_see_what_is_installed_and_not_the_folder_they_start_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("print('the wrong one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert device.run_code(sys.executable, "import json; print(json.dumps(1))") == "1\n"


def test_direct_dependencies_are_those_of_the_base_install() -> None:
    pyproject = """
    [project]
    dependencies = ["numpy>=1.26", "tqdm >= 4.66"]
    [project.optional-dependencies]
    train = ["torch>=2.9"]
    """

    assert device.direct_dependencies(pyproject) == ["numpy", "tqdm"]


def test_installed_bytes_are_counted_by_package(tmp_path: Path) -> None:
    for name, size in (("small", 10), ("large", 1000)):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (tmp_path / f"{name}.py").write_bytes(b"#" * size)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"{name}.py,,\nno_longer_there.py,,\n")

    assert device.installed_bytes(tmp_path) == {"large": 1000, "small": 10}


def test_the_model_that_does_nothing_keeps_the_graph_contract() -> None:
    engine = OnnxRuntimeEngine(device.identity(), form="fp32", threads=1)
    images = np.array([[[[3], [250]]]], np.uint8)

    outputs = engine.infer(images)

    assert outputs.logits.tolist() == outputs.features.tolist() == [[3.0, 250.0]]


def test_the_bare_script_decodes_resizes_and_answers(tmp_path: Path) -> None:
    image, model = tmp_path / "image.png", tmp_path / "model.onnx"
    model.write_bytes(device.identity())
    # Two pixels wide after the resize: the right half is brighter.
    Image.fromarray(np.repeat([[10, 200]], 8, axis=1).astype(np.uint8)).save(image)

    assert device.run_code(sys.executable, device.BARE_CODE, model, image) == "1\n"


def fail_with_words(options: Options) -> gpu.Findings:
    raise EngineError("no device of ours")


def break_off(options: Options) -> gpu.Findings:
    raise ZeroDivisionError("a bug")


def crash(options: Options) -> gpu.Findings:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("unreachable")


def find(options: Options) -> gpu.Findings:
    return gpu.Findings((Table(title="Found", columns=("a",), rows=(("x",),)),), {"a": "x"})


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (fail_with_words, "no device of ours"),
        (break_off, "broke off: ZeroDivisionError: a bug"),
        (crash, "its process was ended by SIGSEGV"),
    ],
)
def test_a_part_that_ends_badly_ends_in_words(
    measure: Callable[[Options], gpu.Findings], words: str
) -> None:
    assert gpu.isolated(gpu.Part("bad", measure), Options(bundle=Path())) == words


def test_the_page_says_what_ran_and_what_did_not() -> None:
    options = Options(bundle=Path())
    found = gpu.isolated(gpu.Part("good", find), options)
    assert isinstance(found, gpu.Findings)

    some = gpu.report({"good": found, "bad": "no device"}, options)
    none = gpu.report({"bad": "no device"}, options)

    assert some.tables[0].rows == (("good", "measured"), ("bad", "not run: no device"))
    assert [table.title for table in some.tables] == ["What ran", "Found"]
    assert "nothing here has run on a GPU" in none.tables[0].notes[0]
    assert "nothing here has run on a GPU" not in " ".join(some.tables[0].notes)
    assert f"`{gpu.COMMAND}`" in " ".join(none.tables[0].notes)


def test_tensorrt_forms_are_built_compared_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_choose import make_bundle

    _, cuda = standin_tensorrt.install(monkeypatch, tmp_path)
    bundle = make_bundle(tmp_path, forms=("fp32", "int8", "int8-cpu"))

    found = gpu.tensorrt(Options(bundle=bundle.path, quick=True), "tensorrt")

    engines, answers, calls = found.tables
    assert [row[0] for row in engines.rows] == ["fp32", "int8"]
    # The same graph under two names, with onnxruntime behind the stand-in: nothing may differ.
    assert [row[:2] for row in answers.rows] == [("fp32", "100.0%"), ("int8", "100.0%")]
    ways = "pinned, graph", "pinned, no graph", "mapped, graph", "mapped, no graph"
    assert [row[0] for row in calls.rows] == [f"{f}, {w}" for f in ("fp32", "int8") for w in ways]
    assert cuda.fakeLive() == 0  # everything was given back


def test_a_form_that_cannot_be_built_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_choose import make_bundle

    trt, _ = standin_tensorrt.install(monkeypatch, tmp_path)
    trt.unsupported = "GlobalAveragePool"
    bundle = make_bundle(tmp_path, forms=("fp32",))

    engines, answers, _ = gpu.tensorrt(Options(bundle=bundle.path, quick=True), "tensorrt").tables

    assert "GlobalAveragePool" in engines.rows[0][-1]
    assert answers.rows == ()


def test_the_cuda_part_describes_copies_and_captures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cuda = standin_tensorrt.install(monkeypatch, tmp_path)

    facts, copies = gpu.cuda(Options(bundle=Path(), quick=True)).tables

    assert ("compute capability", "8.7") in facts.rows
    assert ("a captured graph copies what was captured", "yes") in facts.rows
    # The stand-in's events always lie 1.5 ms apart.
    assert copies.rows[0][:2] == ("25,600", str(harness.spread([25_600 / 1.5 / 1e6])))
    assert cuda.fakeLive() == 0


def test_without_tensorrt_or_a_gpu_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(cudart, "probe", lambda: "no GPU is visible")

    with pytest.raises(EngineError, match=r"tensorrt: .*; no GPU is visible"):
        gpu.tensorrt(Options(bundle=Path()), "tensorrt")


def test_the_bare_script_of_a_plan_decodes_runs_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in standin_tensorrt.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    # Isolated from PYTHONPATH, it is told where the stand-in lies.
    paths = [str(tmp_path), str(ROOT)]
    code = f"import sys; sys.path[:0] = {paths}\n{gpu.PLAN_CODE}"
    image, plan = tmp_path / "image.png", tmp_path / "engine.plan"
    Image.fromarray(np.repeat([[10, 200]], 8, axis=1).astype(np.uint8)).save(image)
    settings = json.dumps({"profile": [[1, 1, 2, 1]] * 3, "strong": True}).encode()
    header = standin_tensorrt.StandIn().header
    plan.write_bytes(header + len(settings).to_bytes(4, "little") + settings + device.identity())
    library = tmp_path / standin_tensorrt.first_soname()

    assert device.run_code(sys.executable, code, "tensorrt", library, plan, image) == "1\n"


def test_mixed_precision_is_timed_beside_float32_and_counts_finite_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from train.device import reference_device

    def make_stepper(material: Any, *, kept: bool) -> Callable[[], float]:
        return lambda: math.nan if "overflows" in material.reason else 0.5

    monkeypatch.setattr(training, "make_recipe", lambda images: None)
    monkeypatch.setattr(training, "make_material", lambda recipe, device: device)
    monkeypatch.setattr(training, "make_stepper", make_stepper)
    devices = {
        "float32": reference_device("a test"), "float16": reference_device("one that overflows"),
    }  # fmt: skip

    (table,) = gpu.training_steps(devices, Options(bundle=Path(), quick=True)).tables

    # Two to warm up and two rounds.
    assert [(row[0], row[-1]) for row in table.rows] == [
        ("float32", "4 of 4"), ("float16", "0 of 4"),
    ]  # fmt: skip


def test_the_plan_that_second_starts_are_compared_on_is_the_one_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_choose import make_bundle

    trt, _ = standin_tensorrt.install(monkeypatch, tmp_path)
    bundle, cache = make_bundle(tmp_path), tmp_path / "cache"
    choose_engine(bundle, Request(form="int8"), cache=PlanCache(cache)).engine.close()

    plan = gpu.plan_of(cache, "int8")

    assert plan.startswith(trt.header)
    assert plan.endswith(bundle.model("int8"))
    with pytest.raises(EngineError, match="no plan of fp16 was kept: none is in the cache"):
        gpu.plan_of(cache, "fp16")
