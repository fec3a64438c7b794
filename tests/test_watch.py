"""`fieldfit watch` as a program: what it says, what it keeps, and how it ends.

Real processes, real signals, a real engine; the service manager's end of the socket is the test's.
"""

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from benchmarks.broker import Broker
from runtime.__main__ import main as fieldfit
from runtime.classifier import Classifier
from runtime.delivery.device_status import record_update
from runtime.delivery.identity import device
from runtime.delivery.slots import Slots
from runtime.line.outbox import Outbox
from runtime.line.verdict import Verdict
from runtime.verbs.watch import OUTBOX
from tests import cameras
from tests.model_zips import LABELS, SIZE, frames, model_zip, with_constants
from tests.prometheus import check_metrics
from tests.test_engines import CHANNELS, tiny_model
from tests.test_line_mqtt import running

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60.0
OK = "a"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_zip(tmp_path_factory.mktemp("tiny"), "1", model=hanging_in_the_dark())


def hanging_in_the_dark() -> onnx.ModelProto:
    """Right on every picture; on a black one it goes round a loop for years."""
    model = tiny_model(size=SIZE)
    last = model.graph.node[-1]
    out = str(last.output[0])
    last.output[0] = "sound"
    with_constants(
        model, dark=np.array(-0.9, np.float32), years=np.array(1e16, np.float32),
        yes=np.array(True),
    )  # fmt: skip
    make, value = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [make("Identity", ["on"], ["still_on"]), make("Neg", ["x"], ["turned"])],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("on", TensorProto.BOOL, []),
            value("x", TensorProto.FLOAT, [None, 4]),
        ],
        [value("still_on", TensorProto.BOOL, []), value("turned", TensorProto.FLOAT, [None, 4])],
    )
    model.graph.node.extend([
        make("ReduceMean", ["features"], ["level"], keepdims=0),
        make("Sub", ["dark", "level"], ["below"]),
        make("Relu", ["below"], ["darkness"]),
        make("Mul", ["darkness", "years"], ["rounds"]),
        make("Cast", ["rounds"], ["times"], to=TensorProto.INT64),
        make("Loop", ["times", "yes", "sound"], [out], body=body),
    ])  # fmt: skip
    return model


class Manager:
    """The service manager's end of the notification socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.path = path

    def next(self, timeout_s: float = PATIENCE_S) -> str:
        """Empty if nothing comes."""
        self.socket.settimeout(timeout_s)
        with contextlib.suppress(TimeoutError):
            return self.socket.recv(65536).decode()
        return ""

    def until(self, what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while what not in self.next():
            assert time.monotonic() < end, f"no {what}"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    opened = Manager(tmp_path / "notify")
    yield opened
    opened.socket.close()


class Watching:
    """A running `fieldfit watch`."""

    def __init__(self, folder: Path, words: Sequence[str], **environment: str) -> None:
        self.state = folder / "state"
        self.errors = (folder / "stderr").open("a+")
        command = [
            sys.executable, "-m", "runtime", "watch", *words, "--state", str(self.state),
            "--threads", "1",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=self.errors,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        )  # fmt: skip

    def lines(self, count: int) -> list[dict[str, Any]]:
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(count)]
        assert all(lines), self.said()
        return [json.loads(line) for line in lines]

    def end(self, number: signal.Signals | None = None) -> tuple[int, list[dict[str, Any]]]:
        """The exit code, and all lines that were not read."""
        if number is not None:
            self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, [json.loads(line) for line in rest.splitlines()]

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def kept(self) -> list[Verdict]:
        with Outbox(self.state / OUTBOX, device(self.state).id) as outbox:
            rows = outbox.unsent(100_000)
        return [msgspec.json.decode(row.payload, type=Verdict) for row in rows]


Start = Callable[..., Watching]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Watching] = []

    def starter(*words: object, **environment: str) -> Watching:
        running.append(Watching(tmp_path, [str(word) for word in words], **environment))
        return running[-1]

    yield starter
    for watching in running:
        watching.process.kill()
        watching.process.communicate()
        watching.errors.close()


def put(folder: Path, number: int, image: np.ndarray[Any, Any] | None = None) -> Path:
    """A picture that appears whole."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{number:04}.png"
    hidden = folder / f".{path.name}"
    Image.fromarray(frames(256)[100 + number % 100] if image is None else image).save(hidden, "PNG")
    hidden.rename(path)
    return path


BLACK = np.zeros((*SIZE, CHANNELS), np.uint8)


def test_each_file_gets_a_verdict_that_is_kept_and_said(
    tmp_path: Path, archive: Path, start: Start
) -> None:
    for number in range(5):
        put(tmp_path / "in", number)
    (tmp_path / "in" / "0002.png").write_bytes(b"no picture")
    put(tmp_path / "more", 7)
    watching = start(tmp_path / "in", tmp_path / "more", "--bundle", archive, "--ok", OK)
    code, lines = watching.end()
    assert code == 0, watching.said()
    assert [line["seq"] for line in lines] == list(range(1, 7))
    assert watching.kept() == [msgspec.convert(line, Verdict) for line in lines]
    verdicts = {Path(line["frame"]).name: line["verdict"] for line in lines}
    assert verdicts["0002.png"] == "NOT INSPECTED"
    assert Counter(verdicts.values())["NOT INSPECTED"] == 1
    assert "not an image" in next(line["reason"] for line in lines if "0002" in line["frame"])
    said = watching.said().splitlines()
    assert said[-2].startswith("fieldfit: 6 frames: ")
    assert said[-2].endswith("1 NOT INSPECTED; 0 dropped")
    assert said[-1] == "next: send the 6 records that wait: --mqtt mqtt://HOST/TOPIC"


def test_a_termination_in_the_middle_of_frames_loses_no_record(
    tmp_path: Path, archive: Path, start: Start, manager: Manager
) -> None:
    inbox = tmp_path / "in"
    for number in range(300):
        put(inbox, number)
    watching = start(
        f"watch:{inbox}", "--bundle", archive, "--ok", OK, NOTIFY_SOCKET=str(manager.path)
    )
    manager.until("READY=1")
    lines = watching.lines(20)
    code, rest = watching.end(signal.SIGTERM)
    assert code == 0, watching.said()
    lines += rest
    assert 20 <= len(lines) < 300
    assert watching.kept() == [msgspec.convert(line, Verdict) for line in lines]
    manager.until("STOPPING=1")
    assert f"{len(lines)} frames" in watching.said()


def test_after_kills_every_file_has_a_verdict_and_the_numbers_have_no_gap(
    tmp_path: Path, archive: Path, start: Start
) -> None:
    inbox = tmp_path / "in"
    names = {str(put(inbox, number)) for number in range(60)}
    words = f"watch:{inbox}", "--bundle", archive, "--ok", OK
    for kill_after in (7, 12):
        watching = start(*words)
        watching.lines(kill_after)
        watching.end(signal.SIGKILL)
    before = len(watching.kept())
    assert before < len(names)
    watching = start(*words)
    end = time.monotonic() + PATIENCE_S
    while {verdict.frame for verdict in watching.kept()} != names:
        assert time.monotonic() < end, watching.said()
        time.sleep(0.05)
    assert watching.end(signal.SIGINT)[0] == 0
    kept = watching.kept()
    assert [verdict.seq for verdict in kept] == list(range(1, len(kept) + 1))
    assert len(kept) - len(names) <= 2, "a kill may bring the frame in hand again, and no other"


def test_the_watchdog_is_fed_while_idle_and_starved_by_a_stop_and_by_an_engine_that_hangs(
    tmp_path: Path, archive: Path, start: Start, manager: Manager
) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    watching = start(
        f"watch:{inbox}", "--bundle", archive, "--ok", OK,
        NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="200000",
    )  # fmt: skip
    manager.until("READY=1")
    for _ in range(3):
        manager.until("WATCHDOG=1")  # nothing to inspect, and alive
    watching.process.send_signal(signal.SIGSTOP)
    silent(manager)
    watching.process.send_signal(signal.SIGCONT)
    manager.until("WATCHDOG=1")
    put(inbox, 1)
    assert watching.lines(1)[0]["verdict"] in ("OK", "DEFECT")
    manager.until("WATCHDOG=1")
    put(inbox, 2, BLACK)
    silent(manager)
    assert watching.process.poll() is None


def silent(manager: Manager) -> None:
    """Return when nothing was said for long after a loop that is alive would have spoken."""
    end = time.monotonic() + PATIENCE_S
    while manager.next(timeout_s=1.5):
        assert time.monotonic() < end, "it goes on saying that it is alive"


def test_a_disk_that_takes_nothing_makes_frames_not_inspected_until_it_does_again(
    tmp_path: Path, archive: Path, start: Start
) -> None:
    inbox = tmp_path / "in"
    put(inbox, 1)
    watching = start(f"watch:{inbox}", "--bundle", archive, "--ok", OK)
    lines = watching.lines(1)
    before = resource.prlimit(
        watching.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)
    )
    put(inbox, 2)
    (refused,) = watching.lines(1)
    assert refused["verdict"] == "NOT INSPECTED"
    assert "could not be kept" in refused["reason"]
    assert "seq" not in refused
    assert refused["label"] is None
    resource.prlimit(watching.process.pid, resource.RLIMIT_FSIZE, before)
    put(inbox, 3)
    lines += watching.lines(1)
    assert watching.end(signal.SIGTERM)[0] == 0
    assert [line["seq"] for line in lines] == [1, 2]
    assert watching.kept() == [msgspec.convert(line, Verdict) for line in lines]
    again = start(f"watch:{inbox}", "--bundle", archive, "--ok", OK)
    brought = again.lines(1)
    if brought[0]["frame"] == lines[0]["frame"]:  # said, but the limit came before it was done with
        brought = again.lines(1)
    assert brought[0]["frame"] == refused["frame"], "it was not done with"


def test_it_needs_no_extra(tmp_path: Path, archive: Path) -> None:
    put(tmp_path / "in", 1)
    words = ["watch", str(tmp_path / "in"), "--bundle", str(archive), "--ok", OK]
    words += ["--state", str(tmp_path / "state"), "--evidence", str(tmp_path / "kept")]
    extras = ["paho", "pymodbus", "cv2", "starlette", "uvicorn", "cryptography", "tuf", "scipy"]
    code = f"import sys; sys.modules.update(dict.fromkeys({extras})); " + (
        f"from runtime.__main__ import main; sys.exit(main({words}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seq"] == 1


def test_what_it_was_not_told_it_asks_for(
    tmp_path: Path, archive: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in", 1)
    words = ["watch", str(tmp_path / "in"), "--state", str(tmp_path / "state")]
    assert fieldfit([*words, "--bundle", str(archive)]) == 1
    assert f"pass --ok LABEL, one or more of {', '.join(LABELS)}" in capfd.readouterr().err
    assert fieldfit([*words, "--bundle", str(archive), "--ok", "fine"]) == 1
    assert "has no label 'fine'" in capfd.readouterr().err
    assert fieldfit(words) == 1
    assert "fieldfit stage" in capfd.readouterr().err


def test_two_lines_do_not_share_a_state_folder(
    tmp_path: Path, archive: Path, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    inbox = tmp_path / "in"
    put(inbox, 1)
    watching = start(f"watch:{inbox}", "--bundle", archive, "--ok", OK)
    watching.lines(1)
    assert fieldfit(["watch", str(inbox), "--state", str(watching.state)]) == 1
    assert "another fieldfit watch inspects with this state folder" in capfd.readouterr().err


def test_metrics_and_the_page_s_file_are_written_while_it_runs_and_at_the_end(
    tmp_path: Path, archive: Path, start: Start
) -> None:
    for number in range(3):
        put(tmp_path / "in", number)
    file = tmp_path / "metrics" / "line.prom"
    watching = start(
        tmp_path / "in", "--bundle", archive, "--ok", OK, "--metrics", file,
        "--evidence", tmp_path / "kept",
    )  # fmt: skip
    assert watching.end()[0] == 0, watching.said()
    text = file.read_text()
    counts = re.findall(r'results_total\{verdict="[A-Z ]+"\} (\d+)', text)
    assert sum(map(int, counts)) == 3
    manifest = Classifier.open(archive, threads=1).bundle.manifest
    assert f'model_info{{sha="{manifest.digest}",version="1",ep="cpu"}} 1' in text
    assert "fieldfit_outbox_rows 3\n" in text
    assert "fieldfit_evidence_taken_total" in text
    assert watching.said().splitlines()[-1].startswith("next: ")
    check_metrics(text)


def test_a_new_slot_takes_over_between_two_frames_of_a_line(tmp_path: Path, start: Start) -> None:
    slots = Slots(tmp_path / "state")
    for version in ("1", "2"):
        slots.stage(model_zip(tmp_path, version))
    first, second = (release.sha256 for release in slots.status().staged)
    slots.activate(first)
    slots.begin_try()
    slots.commit()
    inbox = tmp_path / "in"
    put(inbox, 0)
    watching = start(f"watch:{inbox}", "--ok", OK)
    assert watching.lines(1)[0]["version"] == "1"
    with slots.lock():
        slots.activate(second)
    versions, number = [], 0
    while "2" not in versions:
        number += 1
        put(inbox, number)
        versions.append(watching.lines(1)[0]["version"])
        assert number < 5000, watching.said()
    assert set(versions) == {"1", "2"}
    assert watching.end(signal.SIGTERM)[0] == 0
    assert "NOT INSPECTED" not in {verdict.verdict for verdict in watching.kept()}


def test_a_page_shows_the_line_from_a_process_of_its_own_that_ends_with_it(
    tmp_path: Path, archive: Path, start: Start
) -> None:
    inbox = tmp_path / "in"
    put(inbox, 1)
    put(inbox, 2).write_bytes(b"no picture")
    record_update(tmp_path / "state", "nothing new", failed=False)
    watching = start(f"watch:{inbox}", "--bundle", archive, "--ok", OK, "--page", "127.0.0.1:0")
    watching.lines(2)
    url = until(lambda: re.search(r"the page is at (http://\S+?)/?\n", watching.said()))[1]

    def shown() -> dict[str, Any] | None:
        snapshot: dict[str, Any] = json.loads(get(f"{url}/status.json"))
        found = snapshot.get("snapshot", snapshot)
        return found if sum(found.get("verdicts", {}).values()) == 2 else None

    snapshot = until(shown)
    assert snapshot["phase"] == "inspecting"
    assert snapshot["verdicts"]["NOT INSPECTED"] == 1
    assert snapshot["model"]["name"] == "tiny"
    assert snapshot["engine"]["name"] == "onnxruntime CPU, fp32"
    (camera,) = snapshot["cameras"]
    assert (camera["name"], camera["kind"]) == (f"watch:{inbox}", "files")
    assert snapshot["update"]["outcome"] == "nothing new"
    assert snapshot["heat"]["limit_c"] == 90.0
    assert snapshot["outbox"]["rows"] == 2
    assert 'fieldfit_rejected_inputs_total{reason="image"} 1\n' in get(f"{url}/metrics")
    watching.end(signal.SIGKILL)
    until(lambda: refused(url))


def test_the_commands_of_the_page_run(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/line.md, as written, in a folder where the bundle is where it says."""
    page = (ROOT / "docs" / "line.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(line, comments=True)[1:] for line in "".join(blocks).splitlines()]
    assert [words[0] for words in commands] == ["watch", "service", "service", "service"]
    (tmp_path / "build" / "solar").mkdir(parents=True)
    archive = model_zip(tmp_path, "1", labels=("functional", "defective", "c", "d"))
    archive.rename(tmp_path / "build" / "solar" / "bundle")
    put(tmp_path / "inbox", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for words in commands:
        if words[0] == "watch":
            watching = start(*words[1:])
            assert watching.lines(1)[0]["verdict"] in ("OK", "DEFECT")
            assert watching.end(signal.SIGTERM)[0] == 0
        else:
            assert fieldfit(words) == 0


def test_a_page_for_others_needs_tokens(
    tmp_path: Path, archive: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in", 1)
    words = ["watch", str(tmp_path / "in"), "--bundle", str(archive), "--ok", OK]
    asked = [*words, "--state", str(tmp_path / "state"), "--page", "0.0.0.0:0"]
    assert fieldfit(asked) == 1
    assert "--token-file" in capfd.readouterr().err


def test_a_camera_that_vanishes_is_not_inspected_another_goes_on_and_it_comes_back(
    tmp_path: Path, archive: Path, start: Start
) -> None:
    video = cameras.write_video(tmp_path / "part.avi", 20)
    one, two = cameras.WebCamera(video, fps=20.0), cameras.WebCamera(video, fps=10.0)
    with one, two:
        watching = start(one.source, two.source, "--bundle", archive, "--ok", OK)
        lines_until(watching, lambda lines: inspected(lines) == {one.source, two.source})
        one.vanish()
        seen = lines_until(watching, lambda lines: "NOT INSPECTED" in said_of(lines, one.source))
        assert "NOT INSPECTED" not in said_of(seen, two.source)
        lost = next(line for line in seen if line["verdict"] == "NOT INSPECTED")
        assert lost["label"] is None
        assert "camera lost" in lost["reason"]
        lines_until(watching, lambda lines: len(said_of(lines, two.source)) > 5)
        one.come()
        lines_until(watching, lambda lines: one.source in inspected(lines))
        code, _ = watching.end(signal.SIGTERM)
    assert code == 0, watching.said()
    kept = watching.kept()
    assert [verdict.seq for verdict in kept] == list(range(1, len(kept) + 1))


Lines = list[dict[str, Any]]


def lines_until(watching: Watching, found: Callable[[Lines], bool]) -> Lines:
    """What it says until it has said that."""
    lines: Lines = []
    end = time.monotonic() + PATIENCE_S
    while not found(lines):
        assert time.monotonic() < end, watching.said()
        lines += watching.lines(1)
    return lines


def said_of(lines: Lines, source: str) -> list[str]:
    return [line["verdict"] for line in lines if line["source"] == source]


def inspected(lines: Lines) -> set[str]:
    return {line["source"] for line in lines if line["verdict"] != "NOT INSPECTED"}


def test_verdicts_reach_a_broker_and_a_plc(
    tmp_path: Path, archive: Path, start: Start, broker: Broker
) -> None:
    from pymodbus.client import ModbusTcpClient

    inbox, plc_port = tmp_path / "in", free_port()
    got = subprocess.Popen(
        ["mosquitto_sub", "-p", str(broker.port), "-t", "line/+/results", "-q", "1", "-C", "3"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for number in range(2):
        put(inbox, number)
    watching = start(
        f"watch:{inbox}", "--bundle", archive, "--ok", OK,
        "--mqtt", f"{broker.url}/line", "--modbus", plc_port,
    )  # fmt: skip
    lines = watching.lines(2)
    put(inbox, 2).write_bytes(b"no picture")
    lines += watching.lines(1)
    sent, _ = got.communicate(timeout=PATIENCE_S)
    assert [json.loads(line) for line in sent.splitlines()] == lines
    until(lambda: not watching.kept())
    status = subprocess.run(
        ["mosquitto_sub", "-p", str(broker.port), "-t", "line/status/#", "-C", "1", "-W", "30"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert device(watching.state).id in status.stdout
    until(lambda: not refused(f"tcp://127.0.0.1:{plc_port}"))
    with ModbusTcpClient("127.0.0.1", port=plc_port) as client:

        def registers() -> list[int]:
            read: list[int] = client.read_holding_registers(0, count=6).registers
            return read if read[5] == 3 else []

        _, verdict, state, *_ = until(registers)
        assert (verdict, state) == (0, 3), "NOT INSPECTED, and that is a fault"
    assert watching.end(signal.SIGTERM)[0] == 0
    assert watching.said().splitlines()[-1] == "next: fieldfit service install, to keep it running"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    if shutil.which("mosquitto_sub") is None:
        pytest.skip("no client of a broker here: apt install mosquitto-clients")
    with running(tmp_path / "broker") as started:
        yield started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        text: str = answer.read().decode()
    return text


def refused(url: str) -> bool:
    place = urllib.parse.urlsplit(url)
    with socket.socket() as attempt:
        return attempt.connect_ex((place.hostname, place.port)) != 0


def until(found: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value
