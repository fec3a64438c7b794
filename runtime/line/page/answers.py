"""What the page's server says to a request: who may ask, what there is, and what a browser may do.

It reads the board's folder and its own few files, and nothing else: paths are names on a list, so
that there is no way out of it. It knows no socket.
"""

import base64
import binascii
import datetime
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from runtime.line.page import render
from runtime.line.page.alarms import Alarm, Standing, judge
from runtime.line.page.snapshot import METRICS, PICTURES, Absent, Snapshot, age_s, read

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: only what this server itself sends; no text becomes a script."""

_ALWAYS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}
_TEXT, _HTML = "text/plain; charset=utf-8", "text/html; charset=utf-8"
_STATIC = {
    "/page.css": "text/css; charset=utf-8",
    "/page.js": "text/javascript; charset=utf-8",
    "/icon.svg": "image/svg+xml",
}
_PICTURE = re.compile(r"/thumbnails/([0-9a-f]{1,32}-[0-9]{1,20}\.jpg)")
_MAX_FILE = 4 * 1024 * 1024
_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}  # fmt: skip
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Request(NamedTuple):
    """The head of a request; no body is ever read."""

    method: str
    path: str
    headers: Mapping[bytes, bytes]
    """By name in lower case."""


class Answer(NamedTuple):
    """What goes back."""

    status: int
    kind: str
    body: bytes
    headers: Mapping[str, str] = {}

    def encode(self) -> bytes:
        """The bytes of HTTP/1.1."""
        lines = [f"HTTP/1.1 {self.status} {_REASONS[self.status]}"]
        fields = {
            **_ALWAYS, "Content-Type": self.kind, "Content-Length": str(len(self.body)),
            **self.headers,
        }  # fmt: skip
        lines += [f"{name}: {value}" for name, value in fields.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + self.body


class Access(NamedTuple):
    """Who may ask."""

    host: Callable[[str], bool]
    """Whether this is a name of ours: a page elsewhere whose name was bent to this address (DNS
    rebinding) sends its own."""
    authorization: Callable[[bytes | None], bool] | None = None
    """Whether the header ``Authorization``, "Bearer", names a token; None asks for none."""


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """``/status.json``."""

    level: str
    word: str
    sentence: str
    alarms: tuple[Alarm, ...]
    current: bool
    """False if the snapshot says nothing about now."""
    age_s: float | None
    snapshot: Snapshot | None


def plain(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer of one sentence."""
    return Answer(status, _TEXT, f"{sentence}\n".encode(), headers or {})


def parse(head: bytes) -> Request | Answer:
    """The request whose head this is, with its empty line, or what is wrong with it."""
    first, *lines = head[:-4].split(b"\r\n")
    parts = first.split(b" ")
    if len(parts) != 3 or not _TOKEN.fullmatch(parts[0]) or not parts[1].startswith(b"/"):
        return plain(400, "expected a request line of HTTP")
    if parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        return plain(400, "expected HTTP/1.1 or HTTP/1.0")
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name):
            return plain(400, "expected header fields of HTTP")
        if name.lower() in headers and name.lower() in (b"host", b"authorization"):
            return plain(400, f"expected one header field {name.decode()}")
        headers[name.lower()] = value.strip(b" \t")
    path = parts[1].partition(b"?")[0].decode("latin-1")
    return Request(parts[0].decode(), path, headers)


class Answers:
    """Answers requests from the folder of a board; its own files are read once."""

    def __init__(self, board: Path, access: Access) -> None:
        self._board, self._access = board, access
        self._made: dict[str, tuple[object, bytes]] = {}
        here = Path(__file__).parent
        self._static = {path: (here / path[1:]).read_bytes() for path in _STATIC}

    def to(self, request: Request) -> Answer:
        """What ``request`` gets."""
        return self._refusal(request) or self._found(request.path)

    def _refusal(self, request: Request) -> Answer | None:
        name = _host(request.headers.get(b"host", b""))
        if not self._access.host(name):
            return plain(403, "this server is not known by that name; ask for localhost")
        known = self._access.authorization
        if known and not known(_bearer(request.headers.get(b"authorization"))):
            way = {"WWW-Authenticate": 'Basic realm="fieldfit: the token is the password"'}
            return plain(401, "a token is needed: as a password, or Authorization: Bearer", way)
        if request.method != "GET":
            return plain(405, "only GET is answered here", {"Allow": "GET"})
        return None

    def _found(self, path: str) -> Answer:
        if path in self._static:
            return Answer(200, _STATIC[path], self._static[path], {"Cache-Control": "no-cache"})
        if picture := _PICTURE.fullmatch(path):
            return self._picture(picture[1])
        if path not in ("/", "/live", "/status.json", "/metrics"):
            return plain(404, "there is nothing here; the page is at /")
        published = read(self._board)
        age = age_s(published) if isinstance(published, Snapshot) else None
        standing = judge(published, age, datetime.datetime.now(datetime.timezone.utc))
        if path == "/metrics":
            return self._metrics(published, standing)
        if path == "/status.json":
            return Answer(200, "application/json", _status(published, standing, age))
        return Answer(200, _HTML, self._rendered(path, published, standing, age))

    def _rendered(
        self, path: str, published: Snapshot | Absent, standing: Standing, age: float | None
    ) -> bytes:
        """Made once, however many look at it; what is a second older is another one."""
        what = published.monotonic if isinstance(published, Snapshot) else published.reason
        key = (what, None if age is None else int(age))
        if path not in self._made or self._made[path][0] != key:
            make = render.page if path == "/" else render.live
            self._made[path] = key, make(published, standing, age).encode()
        return self._made[path][1]

    def _picture(self, name: str) -> Answer:
        data = _read(self._board / PICTURES / name)
        if data is None:
            return plain(404, "this picture is no longer kept")
        kept = {"Cache-Control": "private, max-age=3600, immutable"}
        return Answer(200, "image/jpeg", data, kept)

    def _metrics(self, published: Snapshot | Absent, standing: Standing) -> Answer:
        """The loop's, unless they are old: a scrape that fails is an alarm, old numbers no."""
        if not standing.current:
            reason = f"{standing.word}: {standing.sentence}"
            return plain(503, reason)
        data = _read(self._board / METRICS)
        if data is None:
            return plain(503, "no metrics are published")
        return Answer(200, "text/plain; version=0.0.4; charset=utf-8", data)


def _status(published: Snapshot | Absent, standing: Standing, age: float | None) -> bytes:
    shown = Shown(
        **standing._asdict(),
        age_s=age,
        snapshot=published if isinstance(published, Snapshot) else None,
    )
    return msgspec.json.encode(shown) + b"\n"


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError:
        return None
    return data if len(data) <= _MAX_FILE else None


def _host(header: bytes) -> str:
    """The name in a header ``Host``, without its port."""
    text = header.decode("latin-1")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _bearer(authorization: bytes | None) -> bytes | None:
    """A browser asks for a name and a password: the password is the token."""
    scheme, _, rest = (authorization or b"").partition(b" ")
    if scheme.lower() != b"basic":
        return authorization
    try:
        decoded = base64.b64decode(rest.strip(), validate=True)
    except (binascii.Error, ValueError):
        return None
    return b"Bearer " + decoded.partition(b":")[2]
