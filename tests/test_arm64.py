"""The aarch64 trial: its decisions here, and the whole of it when asked for (`make test-arm64`)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime import Bundle
from runtime.candidates import KINDS
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.selftest import replay
from tests.arm64 import __main__ as trial
from tests.arm64 import judge, machine

ROOT = Path(__file__).resolve().parent.parent
ABLE = machine.Host("Linux", "x86_64", True, (), True, True)
LOGITS = np.array([[3.0, -3.0], [-2.0, 2.0], [0.01, -0.01]])
ANSWER = {"path": "a/b.png", "label": "good", "probabilities": {"good": 0.9, "bad": 0.1}}


@pytest.mark.arm64
def test_a_real_bundle_answers_on_aarch64_as_here() -> None:
    if os.environ.get("FIELDFIT_ARM64") != "1":
        pytest.skip("emulates a machine for minutes, as root: make test-arm64, or FIELDFIT_ARM64=1")
    done = subprocess.run(
        [sys.executable, "-m", "tests.arm64"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == trial.SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_debian_root_can_emulate_and_an_aarch64_board_needs_nothing() -> None:
    assert machine.impossible(ABLE) == ""
    board = machine.Host("Linux", "aarch64", False, machine.HOST_PACKAGES, False, False)
    assert machine.impossible(board) == ""
    assert machine.native(board)
    assert not machine.native(ABLE)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"system": "Darwin"}, "expected Linux, got Darwin"),
        ({"root": False}, "sudo make test-arm64"),
        ({"missing": ("debootstrap",)}, "apt install debootstrap"),
        ({"namespaces": False}, "start it privileged"),
        ({"binfmt": False}, "restart systemd-binfmt"),
    ],
)
def test_what_stands_in_the_way_is_said_with_the_way_out(
    change: dict[str, object], told: str
) -> None:
    assert told in machine.impossible(ABLE._replace(**change))  # type: ignore[arg-type]


def test_where_emulation_is_impossible_the_trial_says_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "look_at_host", lambda: ABLE._replace(root=False))
    assert trial.main(["--cache", str(tmp_path / "cache")]) == trial.SKIPPED
    assert capsys.readouterr().out.startswith("SKIPPED: no aarch64 machine here: emulation needs")
    assert not (tmp_path / "cache").exists()


def test_a_binfmt_rule_counts_if_it_is_enabled_and_works_in_any_root() -> None:
    assert machine.registered("enabled\ninterpreter /usr/bin/q\nflags: POF\noffset 0\n")
    assert not machine.registered("disabled\ninterpreter /usr/bin/q\nflags: POF\n")
    assert not machine.registered("enabled\ninterpreter /usr/bin/q\nflags: OC\n")


def test_a_machine_is_used_again_only_for_the_same_system_and_lock() -> None:
    keys = {
        machine.key(("bookworm", "python3-venv"), b"numpy==2.4.6"),
        machine.key(("trixie", "python3-venv"), b"numpy==2.4.6"),
        machine.key(("bookworm",), b"numpy==2.4.6"),
        machine.key(("bookworm", "python3-venv"), b"numpy==2.4.7"),
    }
    assert len(keys) == 4
    assert machine.key(("a",), b"b") == machine.key(("a",), b"b")


def test_the_mirror_is_apt_s_own_archive_and_never_that_of_updates() -> None:
    targets = (
        "Other|http://o/|bookworm\nDebian|http://s/|bookworm-security\nDebian|http://m/d/|trixie\n"
    )
    assert machine.apt_mirror(targets) == "http://m/d/"
    assert machine.apt_mirror("Ubuntu|http://u/|noble\n") == ""
    assert machine.apt_mirror("Debian|mirror+file:/list|bookworm\n") == ""


def test_the_proxy_is_apt_s_own() -> None:
    assert machine.apt_proxy('A "1";\nAcquire::http::Proxy "http://p:3128";\n') == "http://p:3128"
    assert machine.apt_proxy('Acquire::http::Proxy "DIRECT";\n') == ""
    assert machine.apt_proxy('Acquire::http::Proxy::host "http://p:3128";\n') == ""


def test_equal_logits_pass_bit_for_bit() -> None:
    row = judge.compare("fp32", LOGITS, LOGITS.copy())
    assert row.passed
    assert "equal, bit for bit" in judge.reason(row)


def test_logits_beyond_the_tolerance_fail_though_every_answer_agrees() -> None:
    row = judge.compare("fp32", LOGITS, LOGITS * 1.01)
    assert row.agreement == 1.0
    assert not row.passed
    assert "at least" in judge.reason(row)


def test_a_clear_answer_that_turns_fails_in_every_form() -> None:
    got = LOGITS[[1, 1, 2]]
    for form in judge.TOLERANCES:
        row = judge.compare(form, LOGITS, got)
        assert (row.clear, row.clear_turned) == (2, 1)
        assert not row.passed


def test_an_answer_without_a_lead_may_turn_by_rounding() -> None:
    row = judge.compare("int8-cpu", LOGITS, LOGITS * [[1], [1], [-1]])
    assert row.agreement < 1
    assert row.clear_turned == 0
    assert row.passed


def test_forms_that_no_cpu_is_offered_are_asked_what_a_self_test_asks() -> None:
    (cpu,) = [kind for kind in KINDS if kind.name == "onnxruntime-cpu"]
    offered = {form for tier in cpu.tiers for form in tier}
    strict = {form for form, asked in judge.TOLERANCES.items() if asked.max_difference is not None}
    assert strict == offered
    far = LOGITS * 1.03  # 30 dB
    assert judge.compare("int8", LOGITS, far).passed
    assert not judge.compare("int8-cpu", LOGITS, far).passed
    assert "whatever it is" in judge.reason(judge.compare("int8", LOGITS, far))
    assert not judge.compare("int8", LOGITS, LOGITS * 1.1).passed


def test_every_form_has_a_tolerance() -> None:
    from typing import get_args

    from runtime.manifest import Form

    assert set(judge.TOLERANCES) == set(get_args(Form))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"probabilities": {"good": 0.91, "bad": 0.09}}, ""),
        ({"probabilities": {"good": 0.8, "bad": 0.2}}, "expected good at 0.9000, got 0.8000"),
        ({"label": "bad"}, "expected good, got bad"),
    ],
)
def test_other_answers_to_the_samples_are_told(change: dict[str, object], told: str) -> None:
    assert told in judge.different([ANSWER], [ANSWER | change])
    assert bool(judge.different([ANSWER], [ANSWER | change])) == bool(told)


def test_no_answers_at_all_are_no_agreement() -> None:
    assert judge.different([], []) == "expected 0 answers, got 0"
    assert judge.different([ANSWER], []) == "expected 1 answers, got 0"


def test_a_module_of_no_base_distribution_is_named() -> None:
    lock = (
        "numpy==2.4.6 ; python_full_version == '3.11.*' \\\n    --hash=sha256:0\npillow==13.0.0\n"
    )
    loaded = {"numpy": "numpy", "PIL": "pillow", "runtime": "fieldfit"}
    assert judge.beyond_base(loaded, lock) == {}
    assert judge.beyond_base(loaded | {"torch": "torch", "x": ""}, lock) == {
        "torch": "torch",
        "x": "",
    }


@pytest.mark.slow
def test_a_tampered_bundle_opens_and_only_the_replay_finds_it(bundle: Path, tmp_path: Path) -> None:
    trial.spoil(Bundle.open(bundle), tmp_path / "spoiled")
    spoiled = Bundle.open(tmp_path / "spoiled")
    for form, passes in (("int8-cpu", False), ("fp32", True)):
        with OnnxRuntimeEngine(spoiled.model(form), form=form, threads=1) as engine:
            assert replay(engine, spoiled.golden()).passed == passes


def test_what_was_measured_goes_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{trial.BEGIN}\nstale\n{trial.END}\nafter\n")
    report = {
        "bundle": "b 1",
        "bundle_digest": "0" * 64,
        "golden_images": 3,
        "compared_with": "this machine, x86_64",
        "machine": {
            "system": "Debian", "machine": "aarch64", "emulator": "q", "python": "3",
            "onnxruntime": "1",
        },
        "base_install_bytes": {"numpy": 2_000_000, "fieldfit": 1_000_000},
        "checks": [{"name": "n", "passed": True, "reason": "r"}],
        "table": judge.table([judge.compare("fp32", LOGITS, LOGITS)]),
        "seconds": {"making the machine": 200, "made in this run": False, "this run": 90},
    }  # fmt: skip
    trial.record(page, report)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert "3 MB (numpy 2.0, fieldfit 1.0)" in text
    assert "| fp32 | equal |" in text
    trial.record(page, report)
    assert page.read_text() == text
