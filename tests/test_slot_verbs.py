"""fieldfit activate, commit and rollback as they are called, and the examples that call them.

The examples are run as Mender, RAUC and Greengrass run them, with the real command behind them.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.__main__ import main
from runtime.delivery.slots import Slots
from tests.model_zips import BAD, SIZE, model_zip
from tests.test_engines import CHANNELS

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
"""The extra ``dev`` brings it."""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def zips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Versions 1 and 2 are good; 3 is refused at once, for its labels."""
    folder = tmp_path_factory.mktemp("zips")
    bad = BAD["has its labels in another order"].zip(tmp_path_factory.mktemp("bad"))
    return {"1": model_zip(folder, "1"), "2": model_zip(folder, "2"), "bad": bad}


@pytest.fixture
def device(tmp_path: Path, zips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Slots:
    """A device on which version 1 was committed; the command finds it by itself."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("FIELDFIT_STATE", str(tmp_path / "state"))
    slots = Slots(tmp_path / "state")
    slots.activate(slots.stage(zips["1"]).sha256)
    slots.begin_try()
    slots.commit()
    return slots


@pytest.fixture
def run(device: Slots, tmp_path: Path) -> Run:
    """Runs an example, with a fieldfit whose trials are short and a rauc that records."""
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "fieldfit": f'case "$1" in activate) short="--window 0.1 --threads 1" ;; esac\n'
        f'verb=$1; shift\nexec "{sys.executable}" -m runtime "$verb" ${{short:-}} "$@"\n',
        "rauc": f'echo "$@" >> "{tmp_path}/rauc"\n',
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}")
        (tools / name).chmod(0o755)

    def example(
        name: str, *arguments: str, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*no_network(), str(EXAMPLES / name), *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
            env={**os.environ, **environment, "PATH": f"{tools}:{os.environ['PATH']}"},
        )  # fmt: skip

    return example


@functools.cache
def no_network() -> tuple[str, ...]:
    """What runs a command in a network of its own, where nothing is; where the kernel allows it."""
    command = ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") is None:
        return ()
    return () if subprocess.run([*command, "true"], capture_output=True).returncode else command


def current(device: Slots) -> str:
    slot = device.current()
    assert slot is not None
    return slot.version


# --- the verbs


def test_activate_without_a_service_says_who_takes_it_from_here(
    device: Slots, zips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    slot = device.stage(zips["2"])
    assert main(["activate"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("is on trial: the service's next start tries it")
    assert said[1] == "next: fieldfit activate --wait, to try it now"
    pending = device.pending()
    assert pending is not None
    assert pending.sha256 == slot.sha256
    assert current(device) == "1"


def test_activate_wait_commits_what_is_stable_and_rollback_takes_it_back(
    device: Slots, zips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    slot = device.stage(zips["2"])
    arguments = ["--wait", "--window", "0.1", "--threads", "1", "--latency-ms", "10000", "--json"]
    assert main(["activate", slot.sha256[:12], *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["sha256"], told["outcome"]) == (slot.sha256, "committed")
    assert main(["commit", slot.sha256[:12]]) == 0  # as Mender asks once more
    assert current(device) == "2"
    assert main(["rollback", slot.sha256, "--reason", "too strict"]) == 0
    assert main(["rollback", slot.sha256]) == 0
    assert main(["rollback", "0" * 64]) == 0
    assert current(device) == "1"
    failure = device.status().state.failure(slot.sha256)
    assert failure is not None
    assert failure.reason == "too strict"
    capsys.readouterr()
    assert main(["activate", slot.sha256[:12]]) == 1
    assert "too strict" in capsys.readouterr().err


def test_activate_wait_tells_why_a_bundle_was_given_up(
    device: Slots, zips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    slot = device.stage(zips["bad"])
    assert main(["activate", "--wait", "--window", "0.1", "--threads", "1", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["outcome"] == "given up"
    assert "wrong labels" in err
    assert "tiny 1 (" in err.splitlines()[-1]
    assert main(["commit", slot.sha256[:12]]) == 1
    assert "wrong labels" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "fast"])
def test_a_limit_that_is_no_time_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["activate", f"--latency-ms={limit}"])
    assert ended.value.code == 2
    assert f"expected milliseconds above 0, got {limit!r}" in capsys.readouterr().err


def test_commit_proves_first_and_gives_up_what_fails(
    device: Slots, zips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["commit"]) == 1
    assert "no such slot is on trial" in capsys.readouterr().err
    device.activate(device.stage(zips["bad"]).sha256)
    assert main(["commit"]) == 1
    assert "wrong labels" in capsys.readouterr().err
    assert (current(device), device.pending()) == ("1", None)


# --- the examples


def test_mender_installs_commits_and_rolls_back(
    device: Slots, run: Run, zips: dict[str, Path], tmp_path: Path
) -> None:
    def module(state: str, version: str) -> "subprocess.CompletedProcess[str]":
        tree = tmp_path / f"tree-{version}"
        (tree / "files").mkdir(parents=True, exist_ok=True)
        (tree / "files" / "solar.zip").write_bytes(zips[version].read_bytes())
        (tree / "tmp").mkdir(exist_ok=True)
        return run("mender-fieldfit", state, str(tree))

    assert module("SupportsRollback", "2").stdout == "Yes\n"
    assert module("NeedsArtifactReboot", "2").stdout == "No\n"
    assert module("Download", "2").returncode == 0
    assert module("ArtifactRollback", "bad").returncode == 0  # whatever came before it
    assert current(device) == "1"
    failed = module("ArtifactInstall", "bad")
    assert failed.returncode == 1
    assert "wrong labels" in failed.stderr
    assert module("ArtifactRollback", "bad").returncode == 0
    assert current(device) == "1"
    installed = module("ArtifactInstall", "2")
    assert installed.returncode == 0, installed.stderr
    assert module("ArtifactCommit", "2").returncode == 0
    assert current(device) == "2"
    assert module("ArtifactRollback", "2").returncode == 0
    assert current(device) == "1"
    shutil.rmtree(tmp_path / "tree-2")  # a deployment's folder ends with it
    again = module("ArtifactInstall", "2")
    assert again.returncode == 0, again.stderr
    shutil.rmtree(tmp_path / "tree-2")
    assert module("ArtifactInstall", "2").returncode == 0  # what answers already
    assert module("ArtifactRollback", "2").returncode == 0
    assert current(device) == "2"


def test_rauc_brings_a_model_along_and_marks_the_system_good(
    device: Slots, run: Run, zips: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "rauc-bundle"
    source.mkdir()
    (source / "model.zip").write_bytes(zips["2"].read_bytes())
    where = {"RAUC_BUNDLE_MOUNT_POINT": str(source)}
    assert run("rauc-hook", "slot-post-install", RAUC_SLOT_CLASS="boot", **where).returncode == 0
    assert device.pending() is None
    hooked = run("rauc-hook", "slot-post-install", RAUC_SLOT_CLASS="rootfs", **where)
    assert hooked.returncode == 0, hooked.stderr
    assert (current(device), device.pending() is None) == ("1", False)
    marked = run("rauc-mark-good")
    assert marked.returncode == 0, marked.stderr
    assert (current(device), device.pending()) == ("2", None)
    assert (tmp_path / "rauc").read_text() == "status mark-good\n"


def test_rauc_marks_a_system_bad_on_which_no_bundle_answers(
    device: Slots, run: Run, tmp_path: Path
) -> None:
    marked = run("rauc-mark-good", FIELDFIT_STATE=str(tmp_path / "empty"))
    assert marked.returncode == 0, marked.stderr
    assert (tmp_path / "rauc").read_text() == "status mark-bad\n"


def test_greengrass_deploys_and_goes_back_to_the_version_before(
    device: Slots, run: Run, zips: dict[str, Path]
) -> None:
    for version, answers in (("2", "2"), ("1", "1")):
        done = run("greengrass-install", str(zips[version]))
        assert done.returncode == 0, done.stderr
        assert current(device) == answers


def test_shellcheck_finds_nothing_in_the_examples() -> None:
    scripts = [file for file in EXAMPLES.iterdir() if file.read_bytes().startswith(b"#!/bin/sh")]
    assert len(scripts) == 4
    checked = subprocess.run([SHELLCHECK, *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_the_unit_is_exposed_to_3_of_10_at_most() -> None:
    unit = EXAMPLES / "fieldfit-line.service"
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(unit)]
    rated = subprocess.run(command, capture_output=True, text=True)
    assert rated.returncode == 0, rated.stdout


def test_the_services_loop_answers_each_path_with_its_slot(
    device: Slots, zips: dict[str, Path], tmp_path: Path
) -> None:
    picture = tmp_path / "cell.png"
    Image.fromarray(np.zeros((*SIZE, CHANNELS), np.uint8)).save(picture)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "line.py")],
        input=f"{picture}\n{tmp_path}/none\n{picture}\n",
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, none, last = map(json.loads, done.stdout.splitlines())
    assert first["version"] == last["version"] == "1"
    assert first["label"] == last["label"]
    assert "cannot be read" in none["error"]
