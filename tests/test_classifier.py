"""The device's API and command, on a real bundle."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from runtime import Answer, Classifier
from runtime.__main__ import main as fieldfit
from runtime.bundle import Bundle
from runtime.errors import DataError, EngineError
from runtime.manifest import encode
from runtime.selftest import judge


@pytest.fixture(scope="module")
def classifier(quick: Path) -> Classifier:
    return Classifier.open(quick / "build" / "quick" / "bundle", threads=1)


@pytest.fixture
def samples(quick: Path) -> list[Path]:
    return sorted((quick / "build" / "quick" / "samples").iterdir())


def test_path_bytes_array_image_and_list_give_one_answer(
    classifier: Classifier, samples: list[Path]
) -> None:
    path = samples[0]
    answer = classifier(path)
    image = Image.open(path)
    for same in (str(path), path.read_bytes(), image, np.asarray(image)):
        other = classifier(same)
        assert (other.label, other.probabilities) == (answer.label, answer.probabilities)
    listed = classifier([path, np.asarray(image)])
    assert [a.label for a in listed] == [answer.label] * 2
    assert classifier([]) == []


def test_an_answer_says_label_score_and_times(classifier: Classifier, samples: list[Path]) -> None:
    answer = classifier(samples[0])
    assert isinstance(answer, Answer)
    assert answer.label in classifier.bundle.manifest.labels
    assert answer.score == max(answer.probabilities.values())
    assert sum(answer.probabilities.values()) == pytest.approx(1.0)
    assert set(answer.milliseconds) == {"preprocess", "infer"}
    assert not answer.abstained


def test_a_proven_form_is_chosen_and_says_so(classifier: Classifier) -> None:
    assert classifier.engine.form in ("int8-cpu", "fp32")  # whichever is faster here
    chosen = f"onnxruntime CPU, {classifier.engine.form}: {classifier.selftest.reason}"
    assert classifier.reasons[-1] == chosen
    assert "golden samples agree" in classifier.selftest.reason


def test_a_long_list_is_answered_in_order(classifier: Classifier, samples: list[Path]) -> None:
    many = (samples * 12)[:50]
    answers = list(classifier.stream(many))
    alone = {path: classifier(path).label for path in samples}
    assert [a.label for a in answers] == [alone[path] for path in many]


def spoil_golden(bundle: Path, form: str) -> None:
    """Exchange the golden logits of one form, with a manifest that knows the new bytes."""
    import hashlib

    from export.write_bundle import encode_golden

    opened = Bundle.open(bundle)
    golden = opened.golden()
    logits = {k.removeprefix("logits."): v for k, v in golden.items() if k != "images"}
    logits[form] = -logits[form]
    data = encode_golden(golden["images"], logits)
    (bundle / "golden.npz").write_bytes(data)
    files = tuple(
        msgspec.structs.replace(e, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        if e.name == "golden.npz"
        else e
        for e in opened.manifest.files
    )
    manifest = msgspec.structs.replace(opened.manifest, files=files)
    (bundle / "manifest.json").write_bytes(encode(manifest))


def test_a_form_that_fails_its_self_test_is_passed_over_out_loud(
    bundle: Path, samples: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_golden(bundle, "int8-cpu")
    with Classifier.open(bundle) as stepped_down:
        assert stepped_down.engine.form == "fp32"
        words = "onnxruntime CPU, int8-cpu: passed over: failed its self-test"
        assert any(reason.startswith(words) for reason in stepped_down.reasons)
    with pytest.raises(EngineError, match="failed its self-test"):
        Classifier.open(bundle, form="int8-cpu")
    assert fieldfit(["verify", str(bundle)]) == 1
    assert "FAIL onnxruntime CPU, int8-cpu" in capsys.readouterr().out
    assert fieldfit(["classify", str(bundle), str(samples[0]), "--form", "int8-cpu"]) == 1


def test_the_self_test_judges_by_answers_and_closeness() -> None:
    expected = np.array([[3.0, -3.0], [-2.0, 2.0], [0.01, -0.01]], dtype=np.float32)
    assert judge(expected, expected + 1e-3).passed
    narrow = expected.copy()
    narrow[2] = [-0.01, 0.01]
    assert judge(expected, narrow).passed, "a lead of one percent may turn by rounding"
    turned = expected.copy()
    turned[1] = [2.0, -2.0]
    assert "1 of 3 golden answers differ" in judge(expected, turned).reason
    assert "dB" in judge(expected, expected * 1.5).reason
    assert "not finite" in judge(expected, np.full_like(expected, np.nan)).reason
    assert "expected logits" in judge(expected, expected[:2]).reason


def test_classify_prints_a_line_for_each_image(
    quick: Path, samples: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(quick / "build" / "quick" / "bundle")
    assert fieldfit(["classify", bundle, str(samples[0].parent)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split("\t")[2] for line in lines] == [str(path) for path in samples]
    assert "onnxruntime CPU, int8-cpu" in captured.err
    assert fieldfit(["classify", bundle, f"{samples[0].parent}/*-1.png", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"path", "label", "score", "abstained", "probabilities", "milliseconds"} <= set(answer)


def test_one_broken_image_does_not_stop_the_others(
    quick: Path, samples: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    shutil.copy(samples[0], tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(samples[0].read_bytes()[:300])
    bundle = str(quick / "build" / "quick" / "bundle")
    assert fieldfit(["classify", bundle, str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert "a.png: expected an image, got an empty file" in captured.err
    assert "c.png: cannot be decoded" in captured.err
    assert fieldfit(["classify", bundle, str(tmp_path), "--json"]) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(record["path"]).name for record in records] == ["a.png", "b.png", "c.png"]
    assert ["error" in record for record in records] == [True, False, True]


def test_places_without_images_are_errors(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(quick / "build" / "quick" / "bundle")
    for place in (tmp_path, tmp_path / "none.png", tmp_path / "*.png"):
        assert fieldfit(["classify", bundle, str(place)]) == 1
        assert str(place) in capsys.readouterr().err


def test_an_unreadable_image_is_named(classifier: Classifier) -> None:
    with pytest.raises(DataError, match="expected a path, bytes, PIL image or array, got int"):
        classifier(3)  # type: ignore[call-overload]


def test_verify_replays_every_form(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = quick / "build" / "quick" / "quick-0.1.0.zip"
    assert fieldfit(["verify", str(archive), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert [test["form"] for test in report["selftests"]] == ["fp32", "fp16", "int8", "int8-cpu"]


def test_doctor_describes_machine_and_choice(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fieldfit(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"python", "machine", "cuda", "tensorrt", "onnxruntime", "cache"} <= set(report)
    assert report["bundle"] is None
    bundle = str(quick / "build" / "quick" / "bundle")
    assert fieldfit(["doctor", bundle]) == 0
    assert "engine" in capsys.readouterr().out
    assert fieldfit(["doctor", bundle, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)["bundle"]
    assert about["steps"][-1]["accepted"]
    assert about["steps"][0]["fault"] in ("missing library", "no device")


def test_the_engine_is_a_metric(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(quick / "build" / "quick" / "bundle")
    assert fieldfit(["doctor", bundle, "--metrics", "--form", "fp32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (running,) = (line for line in lines if line.startswith("fieldfit_engine_info{"))
    assert 'engine="onnxruntime"' in running
    assert running.endswith('provider="cpu",form="fp32"} 1')
    passed_over = [line for line in lines if line.startswith("fieldfit_engine_passed_over{")]
    assert any('engine="TensorRT"' in line and 'fault="' in line for line in passed_over)
    assert 'fieldfit_golden_agreement{bundle="quick",bundle_version="0.1.0"} 1' in lines
    assert fieldfit(["doctor", "--metrics"]) == 1
    assert "fieldfit doctor BUNDLE --metrics" in capsys.readouterr().err


def test_benchmark_compares_the_forms(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(quick / "build" / "quick" / "bundle")
    arguments = ["benchmark", bundle, "--engine", "onnxruntime-cpu", "--seconds", "0.2"]
    assert fieldfit([*arguments, "--batch", "2", "--json"]) == 0
    timings = json.loads(capsys.readouterr().out)
    assert [t["form"] for t in timings] == ["fp32", "int8-cpu"]
    assert timings[0]["relative_speed"] == 1.0
    assert fieldfit(arguments) == 0
    assert "int8-cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["classify"], ["benchmark", "b", "--batch", "0"], ["unknown"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        fieldfit(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize("verb", ["classify", "build", "verify", "doctor", "benchmark"])
def test_help_teaches_by_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        fieldfit([verb, "--help"])
    assert stopped.value.code == 0
    assert f"Example: fieldfit {verb}" in " ".join(capsys.readouterr().out.split())


def test_a_closed_pipe_is_no_error(quick: Path, samples: list[Path]) -> None:
    bundle = quick / "build" / "quick" / "bundle"
    command = f"{sys.executable} -m runtime classify {bundle} {samples[0]} {samples[1]} | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_an_unknown_form_lists_those_of_the_bundle(
    quick: Path, samples: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(quick / "build/quick/bundle")
    assert fieldfit(["classify", bundle, str(samples[0]), "--form", "foo"]) == 1
    words = "expected one of the bundle's forms, fp32, fp16, int8, int8-cpu, got foo"
    assert words in capsys.readouterr().err


def test_a_refused_bundle_is_json_too(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "fp32.onnx").write_bytes(b"")
    assert fieldfit(["verify", str(bundle), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert "fp32.onnx" in report["reason"]


def test_hidden_files_are_skipped_as_in_training(tmp_path: Path) -> None:
    from runtime.sources.files import find_images

    for name in ("a.png", ".hidden.png", ".cache/b.png", "folder.png/c.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [path.relative_to(tmp_path) for path in find_images([str(tmp_path)])]
    assert found == [Path("a.png"), Path("folder.png/c.png")]


def test_a_name_that_the_terminal_cannot_show_is_escaped(
    quick: Path, samples: list[Path], tmp_path: Path
) -> None:
    image = shutil.copy(samples[0], tmp_path / "ünï.png")
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "classify", quick / "build/quick/bundle", image],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\\xfcn\\xef.png" in done.stdout


@pytest.mark.parametrize(("option", "value"), [("--seconds", "nan"), ("--seconds", "0"),
                                               ("--threads", "x"), ("--batch", "-1")])  # fmt: skip
def test_numbers_that_mean_nothing_are_wrong_usage(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fieldfit(["benchmark", "bundle", option, value])
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err
