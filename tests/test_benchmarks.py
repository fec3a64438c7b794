"""The benchmarks' arithmetic, rendering and errors, on clocks and records of our own.

No test here measures time: what a figure is on a given day is not a matter of right or wrong.
"""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks import dann, harness, quality
from benchmarks.harness import Clocks, Record, Report, Spread, Table
from benchmarks.run import find, main
from runtime.errors import DataError


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
    assert {"dann", "inference", "features", "quality"} <= set(find())
    for name, module in find().items():
        assert f"  {name} " in shown
        assert (module.__doc__ or "").splitlines()[0] in shown


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        (["inference", "--bundle", "nowhere"], "nowhere: no bundle there; run make train export"),
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

    models, forms = quality.measure(harness.Options(bundle=Path())).tables

    assert models.rows == (
        (
            "solar-all: fine-tuning (kept)", "200", "90.0 %", "85.1 % to 93.4 %", "85.0 %",
            "0.950", "70.0 %",
        ),
        (*quality.PUBLISHED, "", "", "", ""),
    )  # fmt: skip
    assert forms.rows == (
        (
            "solar-all: int8", "99.0 %", "25.0", "89.5 %", "", "3.5",
            "released, 1 layers float",
        ),
        ("solar-all: fp16", "", "", "", "", "0.0", "refused: why"),
    )  # fmt: skip


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


def test_gains_of_adaptation_are_taken_seed_by_seed_and_held_to_the_bars() -> None:
    accuracies = {
        dann.Run(shift, seed, method, 0): 0.5 + 0.1 * seed + better
        for shift, gain in zip(dann.SHIFTS, (0.09, 0.07), strict=True)
        for method, better in zip(dann.METHODS, (0.0, gain, 0.2), strict=True)
        for seed in range(3)
    }
    times = {
        name: harness.Times(cpu=[passes / 2, passes * 2.0])
        for name, (passes, _) in dann.FORMS.items()
    }

    digits, step = dann.report(accuracies, times).tables

    photographs, small = dann.SHIFTS
    assert digits.rows[1] == (
        photographs, "DANN", "69.0 ± 10.0", "9.0 ± 0.0", "+9.0, +9.0, +9.0",
    )  # fmt: skip
    assert f"{photographs}, DANN: holds" in digits.notes[0]
    assert f"{small}, DANN: does not hold; {small}, CDAN: holds" in digits.notes[0]
    assert step.rows[-1][-1] == "0.250 (0.250 to 0.250)"
    assert "The bar of 0.6 holds" in step.notes[0]
