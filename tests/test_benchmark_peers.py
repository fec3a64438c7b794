"""Candidates in processes of their own, what the tables say of them, and how growth is judged.

No test here measures time.
"""

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

from benchmarks import coldstart, device, inference, peers, peers_infer, scaling
from benchmarks.harness import Options, Table, Times, spread
from benchmarks.inference import CHECKPOINT, FLOAT, OURS, Material, Speeds, Unmade
from runtime.bundle import Bundle
from runtime.errors import EngineError
from runtime.preprocess import InputSpec, preprocess
from runtime.recipe import ModelSettings
from tests.calibration_graphs import SIZE, draw_images, small_cnn
from tests.test_choose import make_bundle

ECHO = """
import json, sys
print(json.dumps({"ready": {"given": sys.argv[1:]}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("die"):
        raise ValueError("no such thing")
    print(json.dumps({"asked": asked}), flush=True)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose text a test decides, to be run as a module of its own."""
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    return tmp_path / "answering.py"


def test_a_process_answers_until_it_is_closed(module: Path) -> None:
    module.write_text(ECHO)

    with peers.Process(sys.executable, "answering", "a", "b") as process:
        assert process.facts == {"given": ["a", "b"]}
        assert process.ask(batch=2) == {"asked": {"batch": 2}}
        assert process.ask(batch=3) == {"asked": {"batch": 3}}


def test_a_process_that_breaks_off_says_its_last_line(module: Path) -> None:
    module.write_text(ECHO)

    with peers.Process(sys.executable, "answering") as process:
        with pytest.raises(EngineError, match="ValueError: no such thing"):
            process.ask(die=True)
        with pytest.raises(EngineError, match="ValueError: no such thing"):
            process.ask(batch=1)  # it is gone by now


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("""print('{"failed": "there is no compiler"}')""", "there is no compiler"),
        ("import a_module_that_nobody_has", "No module named 'a_module_that_nobody_has'"),
        ("raise SystemExit(7)", "its process ended with 7"),
    ],
)
def test_a_process_that_cannot_start_says_why(module: Path, text: str, words: str) -> None:
    module.write_text(text)

    with pytest.raises(EngineError, match=words):
        peers.Process(sys.executable, "answering")


def test_libraries_are_looked_for_here_and_then_in_the_peers_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package beside a stand-in for that environment's Python is found through it only."""
    (tmp_path / "only_there.py").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(peers.VARIABLE, str(python))
    peers.python_with.cache_clear()

    assert peers.python_with("numpy") == sys.executable
    assert peers.python_with("only_there") == str(python)
    assert peers.python_with("nowhere_at_all") is None
    assert peers.versions("numpy", "nowhere_at_all") == f"numpy {np.__version__}"

    monkeypatch.setenv(peers.VARIABLE, str(tmp_path / "no" / "python"))
    peers.python_with.cache_clear()
    assert peers.python_with("only_there") is None
    peers.python_with.cache_clear()


def material(folder: Path) -> Material:
    """Models, images and calibration images of a tiny network; no checkpoint."""
    models = {form: folder / f"{form}.onnx" for form in ("fp32", "int8-cpu")}
    for path in models.values():
        onnx.save(small_cnn(), path)
    return Material(models, draw_images(5), "drawn images", draw_images(4), None)


def test_candidates_answer_alike_in_processes_of_their_own(tmp_path: Path) -> None:
    given = material(tmp_path)
    made = inference.candidates(given, tmp_path, quick=True)
    plain = "onnxruntime, quantize_static, defaults"
    with contextlib.ExitStack() as stack:
        float_, static = (
            inference.start(made[name], given, tmp_path, stack) for name in (FLOAT, plain)
        )
        assert isinstance(float_, inference.Started)
        assert isinstance(static, inference.Started)
        turn = static.process.ask(threads=2, batch=7, settle=1, calls=2)
        (speeds, *_) = inference.measure_speeds({OURS: float_.process}, quick=True)

    reference = peers_infer.onnxruntime({"model": str(given.models["fp32"])})(1)(given.images)
    np.testing.assert_allclose(float_.answers, reference, rtol=1e-5)
    assert static.answers.shape == reference.shape
    assert not np.array_equal(static.answers, reference)  # it is quantized
    assert all(seconds > 0 for seconds in (*turn["first"], *turn["again"]))
    assert len(speeds.first[OURS].cpu) == len(speeds.again[OURS].cpu)  # warm-ups are not counted


def test_what_is_missing_is_said_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "python_with", lambda package: None)
    given = material(tmp_path)._replace(calibration=None)
    made = inference.candidates(given, tmp_path, quick=True)

    with contextlib.ExitStack() as stack:
        ends = {name: inference.start(c, given, tmp_path, stack) for name, c in made.items()}

    assert len(ends) == 10
    assert ends[CHECKPOINT] == Unmade("no checkpoint lies beside the bundle")
    assert ends["OpenVINO, NNCF INT8"] == Unmade("no calibration images lie beside the bundle")
    said = ends["OpenVINO, defaults"]
    assert isinstance(said, Unmade)
    assert said.reason.startswith("openvino is not installed: run make bench-peers")


def speeds(batch: int, seconds: Mapping[str, float]) -> Speeds:
    times = {name: Times(cpu=[s, 10 * s], wall=[2 * s, 20 * s]) for name, s in seconds.items()}
    return Speeds(1, batch, times, times)


def test_speeds_stand_beside_answers_and_are_held_to_the_bars(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path, forms=("fp32",)).path)
    logits = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    answers = {OURS: logits, FLOAT: logits, CHECKPOINT: logits, "a fast wrong one": logits[::-1]}
    seconds = {OURS: 1.0, FLOAT: 2.2, CHECKPOINT: 6.0, "a fast wrong one": 0.5}
    stages = Table(title="Stages", columns=("stage",), rows=())
    given = material(tmp_path)

    made = inference.report(
        bundle, given, answers, [speeds(1, seconds), speeds(16, seconds)],
        {"torch.compile": "no compiler"}, stages, {},
    )  # fmt: skip

    rows = {row[0]: row[1:] for row in made.tables[0].rows}
    assert rows["a fast wrong one"][0] == "0.0%"
    assert rows["a fast wrong one"][3] == "0.500 (0.500 to 0.500)"
    assert rows[FLOAT][0] == "100.0%"
    assert rows["torch.compile: not measured, no compiler"] == ("",) * 6
    assert [(bar.value, bar.holds) for bar in made.bars] == [
        ("2.20 (2.20 to 2.20) times", True), ("2.20 (2.20 to 2.20) times", False),
    ]  # fmt: skip
    assert f"those of {CHECKPOINT} on 5 drawn images" in made.tables[0].notes[1]
    assert msgspec.json.encode(made)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with a random head, whose answers depend on the image."""
    import torch

    from train.checkpoint import CheckpointFacts, write_checkpoint
    from train.model import build_model

    spec = InputSpec(size=(SIZE, SIZE), channels=1, mean=100, std=50.0)
    settings = ModelSettings(architecture="resnet18", weights="random")
    model = build_model(settings, spec, 3)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    facts = CheckpointFacts(
        name="tiny", classes=("a", "b", "c"), model=settings, input=spec, recipe_sha256="0" * 64,
        dataset_sha256="0" * 64, rung="head", temperature=1.0, verified=True, adaptation="a test",
        labels_used=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    write_checkpoint(path, model, facts)
    return path


@pytest.mark.parametrize("way", ["torch", "torch-channels-last"])
def test_torch_peers_compute_what_the_checkpoint_computes(checkpoint: Path, way: str) -> None:
    import torch

    from train.checkpoint import read_checkpoint

    images = draw_images(3)
    model, _ = read_checkpoint(checkpoint)
    with torch.no_grad():
        wanted = model(torch.from_numpy(images))[0].numpy()
    threads = torch.get_num_threads()

    predict = peers_infer.CANDIDATES[way]({"checkpoint": str(checkpoint)})(1)
    logits = predict(images)

    torch.set_num_threads(threads)
    np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-3)
    assert len(np.unique(logits)) > 3


def test_torch_compile_without_a_compiler_is_told_of(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(peers_infer.NotHereError, match="there is no no-such-compiler"):
        peers_infer.CANDIDATES["torch-compile"]({"checkpoint": str(checkpoint)})


@pytest.mark.slow
def test_bare_scripts_answer_and_tell_their_peak_memory(checkpoint: Path, tmp_path: Path) -> None:
    (pixels,) = draw_images(1)
    image, model = tmp_path / "image.png", tmp_path / "model.onnx"
    Image.fromarray(pixels[..., 0]).save(image)
    onnx.save(small_cnn(), model)
    spec = InputSpec(size=(SIZE, SIZE), channels=1)
    given = ("resnet18", *spec.shape, 100, 50.0)

    def run(code: str, *arguments: object) -> tuple[str, float]:
        printed = device.run_code(sys.executable, code + coldstart.PEAK_CODE, *arguments)
        said, peak = printed.split()
        return said, float(peak)

    _, least = run(device.BARE_CODE, model, image)
    said, most = run(coldstart.TORCH_CODE, checkpoint, image, *given)

    predict = peers_infer.CANDIDATES["torch"]({"checkpoint": str(checkpoint)})(1)
    assert said == f"tensor({predict(preprocess(image, spec)[None]).argmax()})"
    assert 10 < least < most


def test_cold_starts_are_compared_with_ours_and_missing_ones_told_of() -> None:
    times = {
        coldstart.SECOND: Times(cpu=[1.0] * 3, wall=[2.0] * 3),
        coldstart.TORCH: Times(cpu=[4.0] * 3, wall=[9.0] * 3),
    }
    peaks = {coldstart.SECOND: [88.0], coldstart.TORCH: [809.0]}

    (table,) = coldstart.report(times, peaks, {coldstart.ULTRALYTICS: "not installed"}).tables

    assert [row[0] for row in table.rows] == [
        coldstart.SECOND, coldstart.TORCH, f"{coldstart.ULTRALYTICS}: not measured, not installed",
    ]  # fmt: skip
    assert table.rows[1][3:] == ("4.50 (4.50 to 4.50)", "809 (809 to 809)")


def curve(power: float, fixed: float = 0.0) -> scaling.Curve:
    costs = {n: spread([fixed + n**power]) for n in (100, 200, 400)}
    return scaling.Curve("work", "things", costs)


def test_growth_is_the_exponent_of_a_power_law() -> None:
    assert curve(1.0).exponent == pytest.approx(1.0)
    assert curve(2.0).exponent == pytest.approx(2.0)
    assert curve(2.0).doubling == pytest.approx(4.0)
    assert scaling.judged(curve(1.0)) == "proportional or less"
    assert scaling.judged(curve(0.5)) == "proportional or less"
    assert scaling.judged(curve(1.5)) == "**more than proportional**"


def test_growth_that_a_fixed_part_hides_shows_in_the_last_doubling() -> None:
    hidden = curve(2.0, fixed=3e4)

    assert hidden.exponent < scaling.STRAIGHT
    assert scaling.judged(hidden) == "**more than proportional**"


def test_growth_says_what_could_not_be_measured() -> None:
    growth, details = scaling.report([curve(1.0)], {"more work": "no images"}).tables

    assert growth.rows == (
        ("work", "things", "100", "400", "1.00", "2.00 times", "proportional or less"),
    )
    assert growth.notes[-1] == "Not measured: more work: no images"
    assert [row[1] for row in details.rows] == ["100 things", "200 things", "400 things"]


def test_every_kind_of_growth_can_be_called_again_and_again(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, forms=("fp32", "int8-cpu")).path
    sizes = {"pixels": 9_216, "images at once": 3, "files": 40, "devices": 3}

    for kind in scaling.KINDS:
        if kind.of not in sizes:
            continue  # it needs a training
        call = kind.make(bundle, sizes[kind.of], tmp_path)
        call()
        call()

    assert len(list((tmp_path / "files-40").rglob("*.png"))) == 40
    assert len(list((tmp_path / "cache-40").iterdir())) == 2  # a fresh cache each time


def test_growth_of_calibration_needs_a_training(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, forms=("fp32",)).path
    kind = next(kind for kind in scaling.KINDS if kind.of == "images")

    assert "images.json" in str(scaling._curve(kind, Options(bundle=bundle, quick=True)))
