"""What the device and gpu benchmarks make of clocks, processes and folders of our own."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import device
from benchmarks.harness import Times, interleave
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import EngineError

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
