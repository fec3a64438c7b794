"""The page's server: what it gives, what it refuses, and that nothing it is sent holds it up."""

import asyncio
import base64
import contextlib
import html.parser
import http.client
import json
import os
import random
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import ServeError
from runtime.line.child import Child
from runtime.line.page import server as server_module
from runtime.line.page import snapshot
from runtime.line.page.answers import POLICY, Access, Answer, Answers, Request, parse
from runtime.line.page.process import PageProcess
from runtime.line.page.server import HEAD_BYTES, MAX_CONNECTIONS, Address
from runtime.line.page.snapshot import METRICS, PICTURES, board_folder
from runtime.line.verdict import Word
from tests.boards import published, rewrite, verdict

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "a-token-that-is-long-enough-1234567890"
ANYBODY = Access(host=lambda _: True)
ATTACK = '"><script>document.title = "owned"</script><img src=x onerror="window.owned = 1">\u202e'


@contextlib.contextmanager
def page(state: Path, *arguments: str, host: str = "127.0.0.1", cwd: Path = ROOT) -> Iterator[int]:
    """``fieldfit page`` as it is started on a device; its port."""
    command = [sys.executable, "-m", "runtime", "page", "--json", "--state", str(state)]
    with subprocess.Popen(
        [*command, "--listen", f"{host}:0", *arguments], cwd=cwd, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield int(json.loads(line)["url"].rstrip("/").rpartition(":")[2])
            assert process.poll() is None, "it has ended by itself"
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    (folder / "secret").write_text("s3cret")
    published(folder, [verdict("DEFECT", 1), verdict("OK", 2), verdict("NOT INSPECTED", 3)])
    return folder


@pytest.fixture(scope="module")
def port(state: Path) -> Iterator[int]:
    with page(state) as number:
        yield number


def ask(
    port: int, path: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, dict(answer.getheaders())


def raw(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := client.recv(65536):
                answer += more
    return answer


def test_the_page_stands_without_a_script(port: int) -> None:
    status, body, headers = ask(port, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    text = body.decode()
    for word in ("station-2", "Not inspecting", "NOT INSPECTED", "because of 3", "Drift",
                 "onnxruntime 1.23 CPU, int8-cpu", "tensorrt: missing library", "51 °C",
                 "solar 0.1.0", "mqtt://broker/line", '<meta http-equiv="refresh"'):  # fmt: skip
        assert word in text, word
    assert text.count("<main") == 1
    assert "://" not in text.replace("mqtt://", ""), "nothing from elsewhere"


@pytest.mark.parametrize("path", ["/", "/live", "/status.json", "/page.css", "/nothing"])
def test_a_browser_may_do_nothing_but_show_it(port: int, path: str) -> None:
    _, _, headers = ask(port, path)
    assert headers["Content-Security-Policy"] == POLICY
    assert "unsafe" not in POLICY
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Server" not in headers


def test_programs_read_the_same_as_people(port: int) -> None:
    status, body, headers = ask(port, "/status.json?at=1")
    told = json.loads(body)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert (told["level"], told["current"]) == ("failing", True)
    assert told["alarms"][0] == ["failing", "The newest frame was not inspected: because of 3"]
    assert told["snapshot"]["verdicts"]["DEFECT"] == 1
    status, body, _ = ask(port, "/metrics")
    assert (status, body.splitlines()[-1]) == (200, b"fieldfit_outbox_rows 2")


def test_pictures_are_given_by_their_names(port: int, state: Path) -> None:
    for file in (board_folder(state) / PICTURES).iterdir():
        status, body, headers = ask(port, f"/thumbnails/{file.name}")
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        assert body == file.read_bytes()
    assert ask(port, "/thumbnails/abc-999.jpg")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/thumbnails/../snapshot.json",
        "/thumbnails/../../secret",
        "/thumbnails/%2e%2e/%2e%2e/secret",
        "/thumbnails/..%2f..%2fsecret",
        "/thumbnails/",
        "/thumbnails/.abc-1.jpg.new",
        "/thumbnails/abc-1.jpg\x00.txt",
        "/thumbnails/abc-1.jpg\n",
        "/../secret",
        "//etc/passwd",
        "/etc/passwd",
        "/server.py",
        "/page.css/../../../secret",
        "/snapshot.json",
        "http://127.0.0.1/secret",
        "secret",
    ],
)
def test_there_is_no_way_out_of_the_folder(port: int, path: str) -> None:
    answer = raw(port, b"GET " + path.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert answer.split(b" ", 2)[1] in (b"400", b"404"), answer
    assert b"s3cret" not in answer
    assert b"root:" not in answer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "GETS"])
def test_only_get_is_answered(port: int, method: str) -> None:
    status, _, headers = ask(port, "/", method)
    assert (status, headers["Allow"]) == (405, "GET")


def test_a_name_that_was_bent_to_this_machine_is_refused(port: int) -> None:
    """DNS rebinding: a page elsewhere asks as its own name."""
    for name in ("evil.example", "127.0.0.1.evil.example", "", "[::2]", "10.0.0.1"):
        assert ask(port, "/status.json", Host=name)[0] == 403, name
    for name in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80"):
        assert ask(port, "/status.json", Host=name)[0] == 200, name
    twice = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert b" 400 " in raw(port, twice)


def test_a_head_that_is_too_large_is_refused(port: int) -> None:
    line = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "
    assert raw(port, line + b"x" * 2 * HEAD_BYTES + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")


def test_clients_that_say_nothing_are_sent_away_and_others_are_served(port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(MAX_CONNECTIONS)]
    try:
        answer = raw(port, b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ")
        silent.pop().close()
        # The server sees that at its own pace; the silent ones are cut off after seconds at most.
        while not answer.startswith(b"HTTP/1.1 200 "):
            answer = raw(port, b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer.startswith((b"HTTP/1.1 503 ", b"HTTP/1.1 200 "))
    finally:
        for client in silent:
            client.close()


def test_a_client_that_drips_is_cut_off(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy it looks: the deadline is that of the whole head."""
    monkeypatch.setattr(server_module, "_HEAD_S", 0.3)
    desk = server_module._Desk(Answers(board_folder(state), ANYBODY))

    async def drip() -> bytes:
        server = await asyncio.start_server(desk.meet, "127.0.0.1", 0, limit=HEAD_BYTES)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            answered = asyncio.ensure_future(reader.read())
            while not answered.done():
                with contextlib.suppress(ConnectionError):
                    writer.write(b"G")
                    await writer.drain()
                await asyncio.sleep(0.02)
            writer.close()
            return await answered

    assert asyncio.run(drip()).startswith(b"HTTP/1.1 408 ")


def test_no_request_makes_it_fail(state: Path) -> None:
    answers = Answers(board_folder(state), ANYBODY)
    chance = random.Random(6)
    whole = (
        b"GET /status.json?x=1 HTTP/1.1\r\nHost: [::1]:80\r\nAuthorization: Basic YTpi\r\n"
        b"Accept: */*\r\n\r\n"
    )
    seen = set()
    for _ in range(20_000):
        head = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(len(head) - 4)
            if chance.random() < 0.5:
                head[place] = chance.randrange(256)
            else:
                del head[place : place + chance.randrange(1, 12)]
        request = parse(bytes(head[:-4]) + b"\r\n\r\n")
        if isinstance(request, Request) and request.path in ("/", "/live", "/status.json"):
            request = request._replace(path="/nothing")  # those cost time, and are asked above
        answer = request if isinstance(request, Answer) else answers.to(request)
        assert answer.encode().startswith(b"HTTP/1.1 ")
        seen.add(answer.status)
    assert seen == {400, 404, 405}


def test_beyond_this_machine_a_token_is_needed(state: Path, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    with page(state, "--token-file", str(file), host="0.0.0.0") as port:
        status, _, headers = ask(port, "/")
        assert status == 401
        assert headers["WWW-Authenticate"].startswith("Basic ")
        for wrong in ("Bearer nothing", "Basic ???", "Basic", f"Basic {TOKEN}", f"Other {TOKEN}"):
            assert ask(port, "/metrics", Authorization=wrong)[0] == 401, wrong
        browser = base64.b64encode(f"me:{TOKEN}".encode()).decode()
        for right in (f"Bearer {TOKEN}", f"Basic {browser}"):
            assert ask(port, "/", Authorization=right, Host="station-2.plant")[0] == 200


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "page", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_without_one_it_listens_nowhere_else(state: Path) -> None:
    said = run("--state", str(state), "--listen", "0.0.0.0:0")
    assert "--listen 0.0.0.0 can be asked from elsewhere" in said
    assert "--token-file" in said


def test_a_port_that_is_taken_is_said(state: Path, port: int) -> None:
    said = run("--state", str(state), "--listen", f"127.0.0.1:{port}")
    assert f"127.0.0.1 port {port}: cannot listen there" in said


def test_an_address_is_host_and_port() -> None:
    assert Address.parse("0.0.0.0:80") == ("0.0.0.0", 80)
    assert Address.parse("[::1]:0") == ("::1", 0)
    assert Address.parse(":8090") == ("127.0.0.1", 8090)
    for wrong in ("8090", "localhost", "::1:80", "host:", "host:70000", "host:-1", "host:a"):
        with pytest.raises(ServeError, match="expected HOST:PORT"):
            Address.parse(wrong)


def test_old_metrics_are_an_error_and_old_verdicts_are_not_shown(tmp_path: Path) -> None:
    published(tmp_path, [verdict("OK")])
    answers = Answers(board_folder(tmp_path), ANYBODY)

    def to(path: str) -> Answer:
        return answers.to(Request("GET", path, {}))

    assert to("/metrics").status == 200
    assert b'class="newest ok"' in to("/live").body
    rewrite(tmp_path, monotonic=-100.0)
    assert to("/metrics").status == 503
    assert b"Stale" in to("/metrics").body
    assert b'class="newest ok"' not in to("/live").body
    assert b"No current verdict" in to("/live").body
    assert json.loads(to("/status.json").body)["current"] is False
    published(tmp_path, [verdict("OK")])
    (board_folder(tmp_path) / METRICS).unlink()
    assert to("/metrics").status == 503


def test_a_device_on_which_nothing_ran_has_a_page(tmp_path: Path) -> None:
    answers = Answers(board_folder(tmp_path / "nothing"), ANYBODY)
    answer = answers.to(Request("GET", "/", {}))
    assert answer.status == 200
    assert b"No inspection has run with this state folder yet." in answer.body


class Tags(html.parser.HTMLParser):
    """Every tag and attribute of a document."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_what_devices_say_stays_text(tmp_path: Path) -> None:
    words: tuple[Word, ...] = ("DEFECT", "ABSTAIN", "OK")
    evil = [
        verdict(word, seq, source=ATTACK, frame=ATTACK, label=ATTACK, reason=ATTACK, time=ATTACK,
                flags=(ATTACK,))
        for seq, word in enumerate(words)
    ]  # fmt: skip
    published(
        tmp_path, list(evil), device=ATTACK, machine=ATTACK, fieldfit=ATTACK,
        model=snapshot.Model(name=ATTACK, version=ATTACK, slot=ATTACK, trial=ATTACK,
                             adaptation=ATTACK, verified=False, ok_labels=(ATTACK,)),
        engine=snapshot.Engine(name=ATTACK, reasons=(ATTACK,), degraded=ATTACK),
        cameras=(snapshot.Camera(name=ATTACK, kind=ATTACK, fault=ATTACK),),
        stages={ATTACK: snapshot.Spread(1, 2, 3)},
        drift=(snapshot.Drift(of=ATTACK, p_value=0.0, alpha=1.0, drifted=True, window=1),),
        outbox=snapshot.Outbox(to=ATTACK, fault=ATTACK),
        disks=(snapshot.Disk(path=ATTACK, free=1, total=2),),
        update=snapshot.Update(outcome=ATTACK, failed=True),
        evidence=snapshot.Evidence(refused={ATTACK: 1}),
    )  # fmt: skip
    answer = Answers(board_folder(tmp_path), ANYBODY).to(Request("GET", "/", {}))
    text = answer.body.decode()
    found = Tags()
    found.feed(text)
    assert found.tags.count("script") == 1, "only the page's own"
    assert found.tags.count("img") == 2 + 3 + 1, "notable, recent and newest"
    assert not {name for name in found.attributes if name.startswith("on")}
    assert "style" not in found.attributes
    assert "\u202e" not in text
    assert text.count("&lt;script&gt;") > 20


def test_it_ends_with_whoever_started_it(state: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "runtime", "page", "--state", str(state), "--listen", "127.0.0.1:0",
         "--json", "--lifeline"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline()
        process.stdin.write(b"news\n")
        process.stdin.flush()
        process.stdin.close()
        assert process.wait(60) == 0


def test_beside_a_line_it_is_started_again_and_ended(state: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    told: list[str] = []
    beside = PageProcess(state, f"127.0.0.1:{number}", told.append)
    child: Child = beside._child
    try:
        beside.tick()
        while True:  # until it listens
            with contextlib.suppress(OSError):
                assert ask(number, "/status.json")[0] == 200
                break
            assert child.pid is not None
            beside.tick()
        assert told == []
    finally:
        beside.close()
    with pytest.raises(OSError, match="refused"):
        ask(number, "/status.json")


def test_over_tls_it_answers_whoever_trusts_it(state: Path, tmp_path: Path) -> None:
    pair = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
            "subjectAltName=DNS:localhost", "-out", str(pair[0]),
            "-keyout", str(pair[1])]  # fmt: skip
    subprocess.run(make, check=True, capture_output=True)
    with page(state, "--cert", str(pair[0]), "--key", str(pair[1])) as port:
        trusting = ssl.create_default_context(cafile=str(pair[0]))
        connection = http.client.HTTPSConnection("localhost", port, context=trusting, timeout=30)
        connection.request("GET", "/status.json")
        assert connection.getresponse().status == 200
        connection.close()


def test_the_commands_of_the_docs_run(state: Path, tmp_path: Path) -> None:
    """docs/page.md, as written, but for the ports; the command of the line is a test of its own."""
    text = (ROOT / "docs" / "page.md").read_text()
    commands = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    watch, *alone, token, with_token = commands
    assert watch.startswith("fieldfit watch ")
    subprocess.run(["bash", "-ec", token], cwd=tmp_path, check=True)
    for command in (*alone, with_token):
        program, verb, *words = shlex.split(command)
        assert (program, verb) == ("fieldfit", "page")
        place = words.index("--listen")
        host = words[place + 1].rpartition(":")[0]
        rest = [*words[:place], *words[place + 2 :]]
        with page(state, *rest, host=host, cwd=tmp_path) as port:
            assert ask(port, "/")[0] == (401 if "--token-file" in rest else 200)
