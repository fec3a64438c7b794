"""What dashboards read of the line: names as agreed, and text that Prometheus accepts."""

import re

import pytest

from runtime.choose import Step
from runtime.line.inspection import Inspected
from runtime.line.line_metrics import LineMetrics, Standing
from runtime.line.outbox import Counts
from runtime.line.showing import degraded
from runtime.line.thermal import Heat
from runtime.line.verdict import Finding, Word
from tests.prometheus import check_metrics

NAMES = {
    "fieldfit_inference_duration_seconds", "fieldfit_results_total",
    "fieldfit_rejected_inputs_total", "fieldfit_model_info", "fieldfit_ep_degraded",
    "fieldfit_frame_age_seconds", "fieldfit_outbox_rows", "fieldfit_outbox_dropped_total",
    "fieldfit_update_state", "fieldfit_update_metadata_expires_timestamp_seconds",
    "fieldfit_drift_p_value", "fieldfit_temperature_celsius",
}  # fmt: skip
"""What a dashboard for another version of fieldfit relies on."""

STANDING = Standing(
    bundle_sha256="ab" * 32, bundle_version='1 "a"\\', provider="cpu", degraded=True,
    ages_s={'cam "1"\n': 0.25}, dropped={"cam": 7}, heat=Heat({"CPU": 61.5, "GPU": 60.0}, ("x",)),
    share=0.5, outbox=Counts(rows=12, dropped=3, unkept=1), update_state="current",
    expires={"timestamp": 1.8e9}, drift={"scores": 0.003},
)  # fmt: skip


def inspected(word: Word, *flags: str) -> Inspected:
    finding = Finding(
        time="", boot="", monotonic=0.0, source="cam", frame="1", verdict=word, flags=flags
    )
    return Inspected(finding, "camera" if word == "NOT INSPECTED" else None)


@pytest.fixture
def metrics() -> LineMetrics:
    counted = LineMetrics()
    for number in range(100):
        stages = {"wait": 1.0, "infer": 1.5 + number % 10, "total": 20.0}
        counted.add(inspected("OK"), "OK", stages)
    counted.add(inspected("ABSTAIN", "blurred", "dark"), "ABSTAIN", {"infer": 9000.0})
    counted.add(inspected("NOT INSPECTED"), "NOT INSPECTED", {"wait": 3.0})
    counted.unkept()
    return counted


def test_the_text_has_every_agreed_name_and_counts_right(metrics: LineMetrics) -> None:
    text = metrics.text(STANDING)
    assert set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) >= NAMES
    for line in (
        'fieldfit_results_total{verdict="OK"} 100',
        'fieldfit_results_total{verdict="DEFECT"} 0',
        'fieldfit_results_total{verdict="NOT INSPECTED"} 1',
        'fieldfit_rejected_inputs_total{reason="blurred"} 1',
        'fieldfit_rejected_inputs_total{reason="camera"} 1',
        'fieldfit_rejected_inputs_total{reason="disk"} 1',
        'fieldfit_inference_duration_seconds_bucket{le="0.002"} 10',
        'fieldfit_inference_duration_seconds_bucket{le="+Inf"} 101',
        "fieldfit_inference_duration_seconds_count 101",
        "fieldfit_ep_degraded 1",
        'fieldfit_stage_duration_seconds{stage="total",quantile="0.99"} 0.02',
        "fieldfit_outbox_rows 12",
        'fieldfit_temperature_celsius{zone="GPU"} 60',
        "fieldfit_working_share 0.5",
        'fieldfit_frames_dropped_total{source="cam"} 7',
    ):
        assert f"{line}\n" in text


def test_percentiles_are_of_the_last_frames(metrics: LineMetrics) -> None:
    values = metrics.quantiles_ms()
    assert values["total"] == {0.5: 20.0, 0.9: 20.0, 0.99: 20.0}
    assert "record" not in values
    for _ in range(1000):
        metrics.add(inspected("OK"), "OK", {"total": 40.0})
    assert metrics.quantiles_ms()["total"][0.5] == 40.0


@pytest.mark.parametrize("empty", [False, True])
def test_prometheus_takes_it(metrics: LineMetrics, empty: bool) -> None:
    text = (LineMetrics() if empty else metrics).text(STANDING)
    check_metrics(text)


def test_a_step_down_that_nobody_chose_is_degraded() -> None:
    steps = [
        Step("TensorRT", "", False, "there is none", "missing library"),
        Step("onnxruntime CUDA", "fp16", False, "its plan is damaged", "refused artifact"),
        Step("onnxruntime CPU", "int8-cpu", True, "as proven"),
    ]
    assert degraded(steps) == "onnxruntime CUDA, fp16: passed over: its plan is damaged"
    assert degraded([steps[0], steps[2]]) == ""
