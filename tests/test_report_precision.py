"""The report's sections on calibration, precision and abstaining: what they compute and show."""

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from calibration.plots import (
    BLUE,
    ORANGE,
    PURPLE,
    clipping_most,
    draw_ranges,
    draw_sensitivity,
)
from calibration.sensitivity import LayerSensitivity
from calibration.table import Table, TableKey, TensorRange
from export import selective as risk  # its Tested is no test
from export.engines import EngineProof, GpuRun, TargetBuild
from export.plots import draw_selective_risk
from export.release import Attempt, FormReport
from export.report import calibration, precision, selective
from export.report.facts import Facts, read_facts
from tests.conftest import QUICK

replace = msgspec.structs.replace


def table(shares: dict[str, tuple[float, float]]) -> Table:
    """Tensors with their shares outside on calibration and on held-out images."""
    tensors = {
        name: TensorRange(
            observed=(-4.0, 4.0), chosen=(-2.0, 2.0), clipped=one, held_out_outside=other,
            channel_means=(),
        )
        for name, (one, other) in shares.items()
    }  # fmt: skip
    key = TableKey(graph="", images="", preprocessing="", method="mse")
    return Table(key=key, images=8, held_out=4, tensors=tensors)


def layer(name: str, *, error: float, compute: float = 0.1, sqnr: float = 20.0) -> LayerSensitivity:
    return LayerSensitivity(
        name=name, sqnr_db=sqnr, flips=0, images=64, error_share=error, compute_share=compute
    )


@pytest.fixture
def facts(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Facts:
    monkeypatch.chdir(quick)
    return read_facts(QUICK)


TABLE = table({"a": (0.0, 0.0), "b": (0.02, 0.0), "c": (0.01, 0.05), "d": (0.0, 0.001)})


def test_coverage_names_the_tensor_that_clips_most_on_each_kind_of_images() -> None:
    on_calibration = calibration.coverage(TABLE, unseen=False)
    assert on_calibration == (4, 2, "b", 0.02)
    assert calibration.coverage(TABLE, unseen=True) == (4, 2, "c", 0.05)
    assert "b clips most, 2.000% of its values" in calibration.describe(TABLE, on_calibration, 9)
    assert "the 2 tensors that clip most" in calibration.describe(TABLE, on_calibration, 2)


def test_a_drawing_of_few_tensors_has_those_that_clip_most_in_the_order_of_the_graph() -> None:
    held_out = {name: tensor.held_out_outside for name, tensor in TABLE.tensors.items()}
    assert clipping_most(TABLE, {}, 2) == ["b", "c"]
    assert clipping_most(TABLE, held_out, 3) == ["b", "c", "d"]
    ranges, shares = draw_ranges(TABLE, held_out, most=3).axes
    assert [label.get_text() for label in ranges.get_yticklabels()] == ["b", "c", "d"]
    marks = {line.get_color(): np.asarray(line.get_ydata()).tolist() for line in shares.get_lines()}
    assert marks[ORANGE] == [0, 1]  # of b and c
    assert marks[PURPLE] == [1, 2]  # of c and d


def first_bars(panel: Axes, count: int) -> list[Rectangle]:
    """Those of layers; stripes behind them come later."""
    bars = panel.patches[:count]
    assert all(isinstance(bar, Rectangle) for bar in bars)
    return [bar for bar in bars if isinstance(bar, Rectangle)]


def test_layers_are_drawn_as_they_come_and_those_kept_float_are_marked() -> None:
    layers = [layer("worst", error=0.7, sqnr=9.0), layer("next", error=0.2), layer("l", error=0.1)]
    signal, price = draw_sensitivity(layers, {"next"}).axes
    bars = first_bars(signal, 3)
    assert [bar.get_width() for bar in bars] == [9.0, 20.0, 20.0]
    assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [BLUE, ORANGE, BLUE]
    assert [bar.get_hatch() is not None for bar in bars] == [False, True, False]
    assert [bar.get_width() for bar in first_bars(price, 3)] == pytest.approx([10.0, 10.0, 10.0])
    assert signal.get_ylim()[0] > signal.get_ylim()[1]  # the worst on top


def test_what_stayed_float_is_accounted_for() -> None:
    layers = [layer("a", error=0.7, compute=0.02), layer("b", error=0.3, compute=0.5)]
    words = precision.account(layers, {"a"})
    assert "1 of 2 layers stayed float" in words
    assert "70% of the error" in words
    assert "2% of the multiplications" in words
    assert precision.account(layers, ()) == "All 2 layers are INT8."
    assert precision.account([], {"a"}) == ""


def test_the_lead_names_what_ships_and_the_smallest_and_fastest_of_it(facts: Facts) -> None:
    sizes = {"fp32": (900, 1.0), "int8": (300, None), "int8-cpu": (450, 1.9), "fp16": (100, None)}
    forms = tuple(
        replace(facts.release.forms[0], form=form, bytes=size, relative_speed=speed,
                released=form != "fp16")
        for form, (size, speed) in sizes.items()
    )  # fmt: skip
    assert precision.lead(replace(facts.release, forms=forms)) == (
        "fp32, int8 and int8-cpu ship; int8 is 3.0 times smaller than fp32; "
        "int8-cpu is 1.9 times as fast on one CPU thread."
    )
    assert precision.lead(replace(facts.release, forms=forms[:1])) == "fp32 ships."


def proof(**fields: object) -> EngineProof:
    builds = tuple(
        TargetBuild(target=target, seconds=1.0, plan_bytes=9, precisions=counts)
        for target, counts in (("8.6", {"FP32": 2, "INT8": 7}), ("8.9", {"INT8": 8, "FP16": 1}))
    )
    return msgspec.convert(
        {"form": "int8", "passed": True, "reason": "", "builds": builds, **fields}, EngineProof
    )


def test_precisions_of_an_engine_are_those_of_any_target_the_most_frequent_first() -> None:
    assert precision.precisions(proof()) == ("INT8", "FP32", "FP16")


def test_why_nothing_ran_on_a_gpu_is_said_only_where_nothing_did() -> None:
    idle = proof(gpu_reason="no driver")
    ran = proof(
        gpu=GpuRun(
            flavour="tensorrt", version="10", agreement=1.0, sqnr_db=40.0, wall_ms={"p50": 0.4}
        )
    )

    def report(engine: EngineProof | None) -> FormReport:
        return FormReport(
            form="int8", released=True, reason="", bytes=1, attempts=(), engine=engine
        )

    assert precision.gpu_reason([report(None), report(idle)]) == "no driver"
    assert precision.gpu_reason([report(idle), report(ran)]) == ""
    assert precision.gpu_reason([report(None)]) == ""


POINT = risk.Point(threshold=0.8, coverage=0.7, error=0.05, bound=0.11)
ALL = risk.Point(threshold=0.5, coverage=1.0, error=0.16, bound=0.23)


def judged(error: float | None, low: float = 0.0, high: float = 1.0) -> risk.Tested:
    interval = None if error is None else (low, high)
    return risk.Tested(form="fp32", coverage=0.71, error=error, error_interval=interval)


def abstention(*results: risk.Tested, chosen: risk.Point | None = POINT) -> risk.Abstention:
    return risk.Abstention(
        max_error=0.15, abstain_below=chosen.threshold if chosen else 0.0, reason="so",
        labelled=99, chosen=chosen, curve=(POINT, ALL), tested=results,
    )  # fmt: skip


def test_whether_the_threshold_holds_is_said_with_what_the_images_leave_open() -> None:
    assert selective.holds(judged(0.1, 0.08, 0.13), 0.15) == "holds"
    assert selective.holds(judged(0.1, 0.08, 0.16), 0.15) == (
        "holds; the images leave open up to 16.0%"
    )
    assert selective.holds(judged(0.2, 0.1, 0.3), 0.15).startswith("is above")
    assert selective.holds(judged(0.3, 0.2, 0.4), 0.15) == "does not hold"
    assert selective.holds(judged(None), 0.15) == ""


def test_the_lead_speaks_of_test_images_which_had_no_say() -> None:
    words = selective.lead(abstention(judged(0.116, 0.08, 0.16)), 0.829)
    assert "fp32 answers 71% of the test images" in words
    assert "11.6% of those answers are wrong" in words
    assert "17.1% would be" in words
    assert selective.lead(abstention(), None).endswith("it does not know.")
    assert "never abstains" in selective.lead(abstention(chosen=None), 0.8)


def test_the_curve_has_the_threshold_that_was_chosen_and_a_mark_for_each_form() -> None:
    two = draw_selective_risk(abstention(judged(0.1, 0.08, 0.13), judged(0.12, 0.09, 0.2))).axes[0]
    none = draw_selective_risk(abstention(judged(None), chosen=None)).axes[0]
    assert [len(panel.containers) for panel in (two, none)] == [2, 0]
    labels = [[line.get_label() for line in panel.get_lines()] for panel in (two, none)]
    assert "chosen: abstains below 0.800" in labels[0]
    assert not any(str(label).startswith("chosen") for label in labels[1])


def test_every_calibration_image_is_shown_with_its_reason(facts: Facts) -> None:
    section = calibration.make(facts)
    assert section is not None
    assert facts.choice is not None
    assert facts.table is not None
    seen, folded = section.body.split("<details>", 1)
    assert seen.count("<img") == calibration.FIRST
    assert section.body.count("<img") == len(facts.choice.chosen) + len(facts.choice.refused)
    assert folded.count("<figcaption>") > 0
    alts = re.findall(r'alt="([^"]*)"', section.body)
    assert all(alt.strip() for alt in alts)
    for name in facts.table.tensors:
        assert f'scope="row">{name}</th>' in section.body
    assert len(section.body) < 1_500_000


def test_a_release_without_int8_has_no_calibration(facts: Facts) -> None:
    assert calibration.make(facts._replace(choice=None, table=None)) is None


def test_every_attempt_is_told_with_its_reason_and_what_stayed_float(facts: Facts) -> None:
    reason = "agreement 12.34% < 85.00%"
    *others, last = facts.release.forms
    failed: Attempt = replace(
        last.attempts[-1], rung="first try", kept_float={"some.layer": "12% of the error"},
        passed=False, reason=reason, split="validation", made="as calibrated; then better",
    )  # fmt: skip
    climbed = replace(last, attempts=(failed, *last.attempts))
    refused = replace(last, form="int8-fp16", released=False, bytes=0, attempts=(), reason="no way")
    release = replace(facts.release, forms=(*others, climbed, refused))
    body = precision.make(facts._replace(release=release)).body
    words = " ".join(re.sub("<[^>]*>", " ", body).split())
    assert "first try refused on validation images: agreement 12.34% &lt; 85.00%" in words
    assert "and the 1 layers left float" not in words
    assert "and the layer left float" in words
    assert "some.layer 12% of the error" in words
    assert "int8-fp16 could not be made: no way" in words
    for form, layers in facts.sensitivities.items():
        assert f"All {len(layers)} layers" in words, form
    assert words.count("SQNR alone") == len(facts.sensitivities)


def test_the_threshold_is_told_and_drawn_or_nothing_where_nothing_was_scored(facts: Facts) -> None:
    section = selective.make(facts)
    assert section is not None
    assert 'role="img"' in section.body
    unlabelled = replace(facts.release, abstention=None)
    assert selective.make(facts._replace(release=unlabelled)) is None
