"""Everything that a service is made of, put together; from a bound socket to the end.

It knows no command line. The camera path never runs in this process: this one has the lower
priority, and may be as busy as its clients like.
"""

import concurrent.futures
import ctypes
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from runtime.errors import ServeError
from runtime.serving.access import Certificates, Tokens, check_exposure, tls_context
from runtime.serving.batching import Batcher, Watch
from runtime.serving.gate import MIB, Gate, Limits, Workspace
from runtime.serving.model import Model, Served
from runtime.serving.serving_metrics import ServingMetrics

_NICE = 10
"""Of 19: the kernel gives a camera's process ten times the time where both want it."""

_MOST_DECODERS = 4

_M_MMAP_THRESHOLD = -3
"""Of <malloc.h>: blocks from here on are mapped alone."""


class Listening(NamedTuple):
    """Where a service answers, and what."""

    url: str
    served: Served
    end: Callable[[], None]
    """Ends it as SIGTERM does; for any thread."""


class Address(NamedTuple):
    """Where to listen, and who may ask there."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 is any that is free."""
    token_file: Path | None = None
    certificates: Certificates | None = None


def serve(
    open_model: Callable[[], Model],
    address: Address,
    limits: Limits,
    listening: Callable[[Listening], object],
) -> None:
    """Answer until SIGTERM or Ctrl-C; ``listening`` is told when the first client may come.

    Raises ServeError if it cannot listen as asked or the extra is missing, and what opening the
    model raises.
    """
    try:
        from runtime.serving.app import Service, make_app
        from runtime.serving.http_server import Server
    except ModuleNotFoundError as error:
        raise ServeError(
            f"fieldfit serve needs {error.name}: pip install 'fieldfit[serve]'"
        ) from error
    tokens = Tokens.read(address.token_file) if address.token_file else None
    check_exposure(address.host, tokens, address.certificates)
    tls = tls_context(address.certificates) if address.certificates else None
    metrics, gate = ServingMetrics(), Gate(limits)
    batcher = Batcher(open_model, Watch(metrics.batch, metrics.failed))
    with bound(address.host, address.port) as listener:
        served = batcher.start()
        url = _url(listener, "https" if tls else "http")
        with concurrent.futures.ThreadPoolExecutor(_decoders(), "fieldfit-decode") as decoders:
            workspace = Workspace(limits.work_bytes)
            service = Service(batcher, gate, workspace, decoders, metrics, tokens)
            server = Server(make_app(service), listener, gate, metrics, tls)
            try:
                server.run(lambda: listening(Listening(url, served, server.end)))
            finally:
                batcher.close()


def step_back() -> None:
    """Give this process, and every thread that it will start, the lower priority; and have memory
    that is freed go back to the machine."""
    os.nice(_NICE)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        # By itself it raises the threshold to the largest block that was ever freed, and one odd
        # picture would cost its memory for good.
        mallopt(_M_MMAP_THRESHOLD, MIB)


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet: taken ports are found before models open.

    Raises ServeError if that cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ServeError(f"--host {host}: expected an address of this machine: {error}") from error
    family, _, _, _, where = found[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"{host} port {port}: cannot listen there: {error.strerror}; choose another --port"
        ) from error
    return listener


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _decoders() -> int:
    """Half the cores decode: the engine has one, and the camera needs some."""
    return min(_MOST_DECODERS, max(1, len(os.sched_getaffinity(0)) // 2))
