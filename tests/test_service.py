"""The unit that keeps the line running: what is in it, what systemd thinks of it, where it goes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.__main__ import main as fieldfit
from runtime.line import unit
from runtime.line.unit import Line, find_devices, system_unit, user_unit
from runtime.verbs import service

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="no systemd here: apt install systemd")

LINE = Line(
    command=(sys.executable, "-m", "runtime", "watch", "watch:/srv/in box", "--ok", "100%", "$a\\"),
    folder=Path("/srv/100% line"),
    writes=(Path("/var/lib/fieldfit"), Path("/srv/with space")),
    reads=(Path("/opt/fieldfit/bin/python"),),
    network=True,
    devices=(Path("/dev/null"),),
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / unit.NAME
    path.write_text(system_unit(LINE))
    return path


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    return subprocess.run([ANALYZE, *words], capture_output=True, text=True, check=False)


# --- what systemd says


@needs_systemd
@pytest.mark.parametrize(("network", "low_port"), [(True, True), (True, False), (False, False)])
def test_the_exposure_of_the_unit_is_at_most_3(
    tmp_path: Path, network: bool, low_port: bool
) -> None:
    path = tmp_path / unit.NAME
    line = LINE._replace(network=network, low_port=low_port, devices=find_devices())
    path.write_text(system_unit(line))
    done = analyze("security", "--offline=true", "--threshold=30", str(path))
    assert done.returncode == 0, done.stdout[-300:]
    (score,) = re.findall(r"exposure level for fieldfit.service: ([\d.]+)", done.stdout)
    assert float(score) <= 3.0


@needs_systemd
def test_a_unit_without_its_sandbox_would_not_pass(tmp_path: Path, written: Path) -> None:
    bare = re.sub(
        r"(?m)^(Protect|Restrict|SystemCall|Capability|Device).*\n", "", written.read_text()
    )
    written.write_text(bare)
    assert analyze("security", "--offline=true", "--threshold=30", str(written)).returncode != 0


@needs_systemd
def test_systemd_understands_every_line_of_it(
    tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (done := analyze("verify", str(written))).returncode == 0, done.stderr
    assert done.stderr == ""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    written.write_text(user_unit(LINE))
    done = analyze("verify", "--user", str(written))
    assert (done.returncode, done.stderr) == (0, "")
    written.write_text(system_unit(LINE).replace("ProtectHostname=", "ProtectHostnames="))
    assert "ProtectHostnames" in analyze("verify", str(written)).stderr, (
        "it would not see a mistake"
    )


# --- what is in it


def test_words_come_to_the_program_as_they_are() -> None:
    text = system_unit(LINE)
    assert '"watch:/srv/in box" --ok 100%% "$$a\\\\"' in text
    assert "DeviceAllow=/dev/null rw\n" in text
    assert "WorkingDirectory=/srv/100%% line\n" in text
    assert 'ReadWritePaths=/var/lib/fieldfit "/srv/with space"\n' in text


def test_the_watchdog_the_limits_of_starting_and_the_gpu_are_in_it() -> None:
    text = system_unit(LINE)
    for line in (
        "Type=notify", "WatchdogSec=10", "Restart=always", "StartLimitBurst=10",
        "KillMode=mixed", "DevicePolicy=closed", "DeviceAllow=char-nvidia* rw",
        "DeviceAllow=char-nvhost* rw", "DeviceAllow=char-video4linux rw",
    ):  # fmt: skip
        assert f"\n{line}\n" in text


def test_a_line_without_a_network_gets_none_and_one_at_home_may_read_it() -> None:
    assert "PrivateNetwork" not in system_unit(LINE)
    alone = system_unit(LINE._replace(network=False))
    assert "\nPrivateNetwork=yes\n" in alone
    assert "\nRestrictAddressFamilies=AF_UNIX\n" in alone
    assert "\nProtectHome=yes\n" in alone
    assert "\nPrivateTmp=yes\n" in alone
    home = system_unit(LINE._replace(reads=(Path("/home/me/bundle"), Path("/tmp/in"))))
    assert "\nProtectHome=read-only\n" in home
    assert "PrivateTmp" not in home


def test_device_files_of_engines_and_cameras_are_found(tmp_path: Path) -> None:
    assert set(find_devices()) <= {p for p in Path("/dev").rglob("*") if p.is_char_device()}
    (tmp_path / "nvmap").touch()
    assert find_devices(tmp_path) == (), "a plain file is no device"


# --- the verb


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("FIELDFIT_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(service, "SYSTEM", tmp_path / "system")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state"


ARGUMENTS = ["watch:inbox", "--ok", "good", "--evidence", "kept"]


def test_show_prints_the_unit_and_writes_nothing(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fieldfit(["service", "show", *ARGUMENTS]) == 0
    text = capsys.readouterr().out
    command = f"{sys.executable} -m runtime watch {' '.join(ARGUMENTS)} --state {state}"
    assert f"ExecStart={command}\n" in text
    assert f"WorkingDirectory={tmp_path}\n" in text
    assert f"ReadWritePaths={state} {state}-floor {tmp_path / 'kept'}\n" in text
    assert "PrivateNetwork=yes" in text
    assert list(tmp_path.iterdir()) == []
    assert fieldfit(["service", "show", "--json", "--", *ARGUMENTS]) == 0
    assert json.loads(capsys.readouterr().out)["unit"] == text


@pytest.mark.parametrize(
    ("user", "folder", "systemctl"),
    [([], "system", "systemctl"), (["--user"], "config/systemd/user", "systemctl --user")],
)
def test_install_writes_it_and_uninstall_leaves_nothing(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    user: list[str], folder: str, systemctl: str,
) -> None:  # fmt: skip
    path = tmp_path / folder / unit.NAME
    assert fieldfit(["service", "install", *user, *ARGUMENTS]) == 0
    assert state.is_dir()
    assert (tmp_path / "kept").is_dir(), "the sandbox needs what may be written to be there"
    assert path.read_text().startswith("# Written by `fieldfit service install`")
    shown = capsys.readouterr().out
    assert f"wrote {path}" in shown
    assert f"next: {systemctl} daemon-reload && {systemctl} enable --now fieldfit.service" in shown
    wants = path.parent / "multi-user.target.wants"
    wants.mkdir()
    (wants / unit.NAME).symlink_to(path)  # as systemctl enable does
    assert fieldfit(["service", "uninstall", *user]) == 0
    assert [p for p in path.parent.rglob("*") if not p.is_dir()] == []
    assert f"next: {systemctl} stop fieldfit.service" in capsys.readouterr().out
    assert fieldfit(["service", "uninstall", *user]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_what_watch_would_refuse_is_refused_now(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        fieldfit(["service", "install", "watch:inbox", "--hotter", "90"])
    assert ended.value.code == 2
    assert "--hotter" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "network"),
    [
        (["/dev/video0"], False), (["rtsp://camera/1"], True), (["aravis:Fake_1"], True),
        (["in/*.png", "--mqtt", "mqtt://broker"], True), (["in", "--page", "127.0.0.1:8080"], True),
    ],
)  # fmt: skip
def test_it_has_a_network_only_if_something_needs_one(
    state: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], network: bool
) -> None:
    assert fieldfit(["service", "show", *arguments]) == 0
    assert ("PrivateNetwork=yes" not in capsys.readouterr().out) == network


@pytest.mark.parametrize(
    ("arguments", "capability"),
    [
        (["--modbus", "502"], "CAP_NET_BIND_SERVICE"),
        (["--page", "[::1]:80"], "CAP_NET_BIND_SERVICE"),
        (["--modbus", "127.0.0.1:5020", "--page", ":8080"], ""),
    ],
)
def test_only_a_port_below_1024_gives_it_a_capability(
    state: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], capability: str
) -> None:
    assert fieldfit(["service", "show", "in", *arguments]) == 0
    assert f"\nCapabilityBoundingSet={capability}\n" in capsys.readouterr().out


def test_the_program_in_the_unit_starts(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As systemd would: in its folder, with its environment, without a shell's."""
    fieldfit(["service", "show", "--json", "--", "nowhere", "--bundle", "none"])
    text = json.loads(capsys.readouterr().out)["unit"]
    command = re.findall(r"(?m)^ExecStart=(.*)$", text)[0].split(" ")
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONSAFEPATH": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("fieldfit: ")
    assert os.fspath(state) in text
