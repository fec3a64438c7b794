"""Clients of `fieldfit serve` that say exactly what a test wants, and services to ask."""

import base64
import contextlib
import json
import os
import queue
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from runtime.candidates import Request
from runtime.serving.gate import Limits
from runtime.serving.model import Model, open_bundle
from runtime.serving.service import Address, Listening, serve

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 30.0
"""How long anything may take that should take a moment."""


class Reply(NamedTuple):
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The sentence of a refusal."""
        sentence = self.json["error"]
        assert isinstance(sentence, str)
        return sentence


class Client:
    """One TCP connection to a service."""

    def __init__(self, url: str, context: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), PATIENCE_S)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_hostname=parts.hostname)
        self._read = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def status(self) -> int | None:
        """The status of the next response, interim ones too; None if there is none."""
        line = self._read.readline()
        return int(line.split()[1]) if line else None

    def reply(self) -> Reply:
        """The next response. Raises ConnectionError if there is none."""
        line = self._read.readline()
        while line.startswith(b"HTTP/1.1 100"):
            self._read.readline()
            line = self._read.readline()
        if not line:
            raise ConnectionError("the service closed the connection")
        headers = {}
        while field := self._read.readline().strip().decode():
            name, _, value = field.partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers["content-length"]) if "content-length" in headers else -1
        return Reply(int(line.split()[1]), headers, self._read.read(length))

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Send a request and return the response."""
        self.send(encode(method, path, body, headers))
        return self.reply()

    def ended(self) -> bool:
        """Whether the service has closed the connection; waits for what it may still say."""
        try:
            return self._read.read(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        """Hang up."""
        self._read.close()
        self.socket.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def encode(
    method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """A request with its length."""
    fields = {"Host": "device", "Content-Length": str(len(body)), **(headers or {})}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def ask(
    url: str,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    context: ssl.SSLContext | None = None,
) -> Reply:
    """One request on a connection of its own."""
    with Client(url, context) as client:
        return client.ask(method, path, body, headers)


def infer_body(
    images: "np.ndarray[Any, Any] | Sequence[bytes]", *, binary: bool = True, **more: Any
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an infer request, its images as binary data or in JSON."""
    if isinstance(images, np.ndarray):
        data = images.tobytes()
        tensor: dict[str, Any] = {"shape": list(images.shape), "datatype": "UINT8"}
        listed: Any = images.reshape(-1).tolist()
    else:
        data = b"".join(len(one).to_bytes(4, "little") + one for one in images)
        tensor = {"shape": [len(images)], "datatype": "BYTES"}
        listed = [base64.b64encode(one).decode() for one in images]
    tensor["name"] = "image"
    if not binary:
        return json.dumps({"inputs": [tensor | {"data": listed}], **more}).encode(), {}
    tensor["parameters"] = {"binary_data_size": len(data)}
    head = json.dumps({"inputs": [tensor], **more}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


@contextlib.contextmanager
def started(*words: str | Path, env: Mapping[str, str] | None = None) -> Iterator["Running"]:
    """``fieldfit serve`` as a process of its own, once it answers; killed at the end."""
    command = [sys.executable, "-m", "runtime", "serve", "--json", "--port", "0", *map(str, words)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **(env or {})}
    with tempfile.TemporaryFile("w+") as stderr:  # a pipe that nobody reads would stop it
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        )
        service = Running(process, "", stderr)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, f"fieldfit serve ended: {service.said()}"
            yield service._replace(url=json.loads(line)["url"])
        finally:
            process.kill()
            process.communicate()


class Running(NamedTuple):
    """A service in another process."""

    process: "subprocess.Popen[str]"
    url: str
    stderr: IO[str]

    def said(self) -> str:
        """What it said on stderr, once it has ended."""
        self.process.wait(PATIENCE_S)
        self.stderr.seek(0)
        return self.stderr.read()

    def rss(self) -> int:
        """Bytes of memory it has now."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")


@contextlib.contextmanager
def inside(model: Path | Callable[[], Model], limits: Limits, **address: Any) -> Iterator[str]:
    """The URL of a service in a thread of this process, ended at the end.

    ``model`` is a bundle, or opens what answers.
    """
    opener = open_bundle(model, Request(threads=1), None) if isinstance(model, Path) else model
    told: queue.SimpleQueue[Listening | BaseException] = queue.SimpleQueue()

    def serving() -> None:
        try:
            serve(opener, Address(port=0, **address), limits, told.put)
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=serving)
    thread.start()
    said = told.get(timeout=PATIENCE_S)
    if isinstance(said, BaseException):
        raise said
    try:
        yield said.url
    finally:
        said.end()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert told.empty(), told.get()
