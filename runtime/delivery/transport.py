"""Fetch from a web server or a folder: bounded, resumable, and from nowhere else than was asked.

It trusts nothing that it fetches and knows no signatures; sizes come from whoever does. Needs the
extra ``fleet``: python-tuf calls it through its FetcherInterface, and brings urllib3.
"""

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface

from runtime.errors import UpdateError
from runtime.version import __version__

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

_CHUNK = 1 << 16
_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)\Z")

Progress = Callable[[int], object]
"""Told how many bytes of the file there are by now."""


class Body(Protocol):
    """What a source answers with."""

    start: int
    """Where in the file the first byte lies."""
    size: int | None
    """Bytes of the whole file, if the source says so."""

    def read(self, limit: int) -> bytes:
        """What has arrived, at most ``limit`` bytes; nothing at the end."""


class Transport(FetcherInterface):
    """Fetches ``https:`` and ``file:`` addresses, counting what that costs.

    Plain ``http:`` only from this machine, or if ``allow_http``: everything fetched is signed, but
    who listens would learn what a device runs. ``timeout`` is in seconds: for each answer of a
    server, and after it an average of ``slowest`` bytes a second is demanded.
    """

    def __init__(
        self, *, allow_http: bool = False, timeout: float = 30.0, slowest: int = 256
    ) -> None:
        self.requests = 0
        self.received = 0
        """Bytes of bodies."""
        self._allow_http = allow_http
        self._timeout = timeout
        self._slowest = slowest
        self._pools: dict[str | None, urllib3.PoolManager] = {}

    def close(self) -> None:
        """Close what is still connected."""
        for pool in self._pools.values():
            pool.clear()

    def check(self, url: str) -> None:
        """Raise UpdateError for an address from which nothing is fetched."""
        parts = urlsplit(url)
        if parts.scheme == "file" and parts.netloc in ("", "localhost"):
            return
        if parts.scheme == "https" and parts.hostname:
            return
        if parts.scheme != "http" or not parts.hostname:
            raise UpdateError(f"{url}: expected https://HOST/PATH or file:///PATH")
        if not (self._allow_http or parts.hostname in LOOPBACK):
            raise UpdateError(
                f"{url}: expected https, got http, which everyone on the way can read and change; "
                "if only signatures matter here, add --allow-http"
            )

    def _fetch(self, url: str) -> Iterator[bytes]:
        with self._open(url) as body:
            while chunk := body.read(_CHUNK):
                yield chunk

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """The bytes at ``url``, in memory, of which there may be at most ``max_length``.

        Raises DownloadHTTPError for what the source does not have, and UpdateError otherwise.
        """
        data = bytearray()
        with self._open(url) as body:
            while chunk := body.read(min(_CHUNK, max_length + 1 - len(data))):
                data += chunk
                if len(data) > max_length:
                    raise _too_long(url, max_length)
        return bytes(data)

    def download(self, url: str, part: Path, size: int, progress: Progress) -> None:
        """Make ``part`` the ``size`` bytes at ``url``, going on where it ends already.

        Never writes a byte beyond ``size``. What has arrived stays in ``part``, on the disk, when
        the connection is cut. Nothing is said about the bytes: verify all of them. Raises
        DownloadHTTPError, UpdateError, or OSError for what the disk refuses.
        """
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            held = file.tell()
            if held < size:
                with self._open(url, held) as body:
                    if body.size not in (None, size):
                        raise UpdateError(
                            f"{url}: expected {size:,} bytes, the source has {body.size:,}"
                        )
                    if body.start != held:
                        file.truncate(body.start)
                        held = body.start
                    progress(held)
                    while chunk := body.read(min(_CHUNK, size + 1 - held)):
                        if held + len(chunk) > size:
                            raise _too_long(url, size)
                        file.write(chunk)
                        held += len(chunk)
                        progress(held)
            file.flush()
            os.fsync(file.fileno())
        if held != size:
            raise UpdateError(
                f"{url}: cut off after {held:,} of {size:,} bytes; the next update goes on there"
            )

    @contextlib.contextmanager
    def _open(self, url: str, start: int = 0) -> Iterator[Body]:
        """The file at ``url`` from ``start`` on, or all of it: see ``Body.start``."""
        self.check(url)
        self.requests += 1
        try:
            if urlsplit(url).scheme == "file":
                with _open_file(url, start) as body:
                    yield _Counted(body, self, url)
            else:
                with contextlib.closing(self._request(url, start)) as response:
                    yield _Counted(_HttpBody(response, url, start), self, url)
        except urllib3.exceptions.HTTPError as error:
            raise UpdateError(f"{url}: {_said(error)}") from error

    def _request(self, url: str, start: int) -> urllib3.BaseHTTPResponse:
        headers = {"User-Agent": f"fieldfit/{__version__}", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        asked = url
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._pool(url).request(
                "GET", url, headers=headers, preload_content=False, redirect=False,
                retries=urllib3.Retry(connect=2, read=0, redirect=0, status=0, other=0),
                timeout=urllib3.Timeout(self._timeout),
            )  # fmt: skip
            if response.status == 416 and "Range" in headers:  # it has less than we have
                response.close()
                del headers["Range"]
                continue
            if response.status not in _REDIRECTS:
                return _answered(response, asked)
            response.close()
            url = urljoin(url, response.headers.get("Location", ""))
            if urlsplit(url).scheme != urlsplit(asked).scheme:
                raise UpdateError(
                    f"{asked}: the server sends us to {url}, which is not "
                    f"{urlsplit(asked).scheme}; a captive portal, or a wrong address"
                )
            self.check(url)
        raise UpdateError(f"{asked}: more than {_MAX_REDIRECTS} redirects; check the address")

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = getproxies().get(parts.scheme)
        if proxy and proxy_bypass(parts.hostname or ""):
            proxy = None
        if proxy not in self._pools:
            self._pools[proxy] = urllib3.ProxyManager(proxy) if proxy else urllib3.PoolManager()
        return self._pools[proxy]


class _Counted:
    """A body whose bytes are counted, and that may not take for ever."""

    def __init__(self, body: Body, transport: Transport, url: str) -> None:
        self.start, self.size = body.start, body.size
        self._body, self._transport, self._url = body, transport, url
        self._began, self._bytes = time.monotonic(), 0

    def read(self, limit: int) -> bytes:
        chunk = self._body.read(limit)
        self._bytes += len(chunk)
        self._transport.received += len(chunk)
        seconds = time.monotonic() - self._began
        if seconds > self._transport._timeout and self._bytes < self._transport._slowest * seconds:
            raise UpdateError(
                f"{self._url}: {self._bytes:,} bytes in {seconds:.0f} s are too slow; try later"
            )
        return chunk


class _HttpBody:
    def __init__(self, response: urllib3.BaseHTTPResponse, url: str, asked: int) -> None:
        self._response = response
        self.start = 0
        length = response.headers.get("Content-Length", "")
        self.size = int(length) if length.isdecimal() else None
        if response.status == 206:
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != asked:
                raise UpdateError(f"{url}: expected the bytes from {asked:,} on, got others")
            self.start = asked
            self.size = int(match[2]) if match[2] != "*" else None

    def read(self, limit: int) -> bytes:
        return self._response.read1(limit, decode_content=False)


class _FileBody:
    def __init__(self, descriptor: int, path: str, start: int, size: int) -> None:
        self._descriptor, self._path, self.start = descriptor, path, start
        self.size: int | None = size

    def read(self, limit: int) -> bytes:
        try:
            return os.read(self._descriptor, limit)
        except OSError as error:  # a stick that was pulled out, or is worn
            raise UpdateError(f"{self._path}: cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _open_file(url: str, start: int) -> Iterator[Body]:
    path = unquote(urlsplit(url).path)
    try:
        # NONBLOCK: opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise DownloadHTTPError(f"{path}: no such file", 404) from None
    except OSError as error:
        raise UpdateError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UpdateError(f"{path}: expected a plain file, got a folder, pipe or device")
        start = start if start <= status.st_size else 0
        os.lseek(descriptor, start, os.SEEK_SET)
        yield _FileBody(descriptor, path, start, status.st_size)
    finally:
        os.close(descriptor)


def _answered(response: urllib3.BaseHTTPResponse, url: str) -> urllib3.BaseHTTPResponse:
    if response.status in (200, 206):
        return response
    response.close()
    raise DownloadHTTPError(f"{url}: the server answers {response.status}", response.status)


def _too_long(url: str, limit: int) -> UpdateError:
    return UpdateError(f"{url}: expected at most {limit:,} bytes, the source sends more")


def _said(error: Exception) -> str:
    """The cause, without the objects' names around it."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, urllib3.exceptions.NameResolutionError):
        return "no such host, or no network"
    if isinstance(reason, urllib3.exceptions.SSLError):
        return f"no trusted certificate ({reason}); a captive portal, or a wrong clock"
    if isinstance(reason, urllib3.exceptions.NewConnectionError):
        return "no connection; is the network there, and the server up?"
    if isinstance(reason, urllib3.exceptions.TimeoutError):
        return "no answer in time"
    if isinstance(error, urllib3.exceptions.ProtocolError):
        return "the connection was cut; the next update goes on there"
    return " ".join(str(reason).split())
