"""Serve the status page: a process of its own, which only reads what the line published.

One request a connection, and every connection has a deadline, a small head and no body; more than a
few at once are sent away. The standard library is enough for that, so that a device needs no extra.
It does not know what it answers.
"""

import asyncio
import contextlib
import os
import signal
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from runtime.errors import ServeError
from runtime.line.page.answers import Access, Answer, Answers, parse, plain

MAX_CONNECTIONS = 64
"""That are answered; as many again are told to come later, and more are cut off."""
HEAD_BYTES = 16 * 1024

_HEAD_S, _SENDING_S, _PARTING_S = 5.0, 10.0, 1.0
_BACKLOG = 64


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int
    """0 is any that is free."""

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Of ``HOST:PORT``, ``[::1]:PORT`` or ``:PORT``, which is this machine's alone.

        Raises ServeError if it is none.
        """
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not colon or not port.isdecimal() or int(port) > 65535 or (":" in bare and bare == host):
            raise ServeError(f"expected HOST:PORT, e.g. 127.0.0.1:8090 or [::1]:8090, got {text!r}")
        return cls(bare or "127.0.0.1", int(port))


def serve(
    board: Path,
    address: Address,
    access: Access,
    *,
    tls: ssl.SSLContext | None = None,
    listening: Callable[[str], object],
    lifeline: bool = False,
) -> None:
    """Answer from the folder of a board until SIGTERM or Ctrl-C.

    ``listening`` is told the URL when the first client may come. With ``lifeline`` it also ends
    when standard input does: whoever started it is gone.

    Raises ServeError if it cannot listen there.
    """
    asyncio.run(_serve(Answers(board, access), address, tls, listening, lifeline))


async def _serve(
    answers: Answers,
    address: Address,
    tls: ssl.SSLContext | None,
    listening: Callable[[str], object],
    lifeline: bool,
) -> None:
    desk = _Desk(answers)
    try:
        server = await asyncio.start_server(
            desk.meet, address.host, address.port, limit=HEAD_BYTES, backlog=_BACKLOG, ssl=tls,
            ssl_handshake_timeout=_HEAD_S if tls else None,
        )  # fmt: skip
    except OSError as error:
        reason = error.strerror or str(error)
        raise ServeError(
            f"{address.host} port {address.port}: cannot listen there: {reason}; choose another"
        ) from error
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    if lifeline:
        loop.add_reader(sys.stdin.fileno(), _end_with_input, loop, end)
    async with server:
        host, port = server.sockets[0].getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        listening(f"{'https' if tls else 'http'}://{name}:{port}/")
        await end.wait()


def _end_with_input(loop: asyncio.AbstractEventLoop, end: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        end.set()


class _Desk:
    """Takes connections, at most so many at once."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._busy = 0

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, whatever comes of it."""
        self._busy += 1
        try:
            if self._busy > 2 * MAX_CONNECTIONS:
                return
            answer = await self._answer(reader)
            writer.write(answer.encode())
            await asyncio.wait_for(writer.drain(), _SENDING_S)
            await _part(reader, writer)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            pass  # whoever asked has gone
        finally:
            self._busy -= 1
            with contextlib.suppress(OSError, RuntimeError):
                writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        if self._busy > MAX_CONNECTIONS:
            return plain(503, "too many ask at once")
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _HEAD_S)
        except asyncio.TimeoutError:
            return plain(408, f"expected a request within {_HEAD_S:g} s")
        except asyncio.LimitOverrunError:
            return plain(431, f"expected a head of at most {HEAD_BYTES:,} bytes")
        request = parse(head)
        return request if isinstance(request, Answer) else self._answers.to(request)


async def _part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Let the other end read the answer: closing on bytes that nobody has read would recall it."""
    if writer.can_write_eof():
        writer.write_eof()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_discard(reader), _PARTING_S)
    writer.close()
    await asyncio.wait_for(writer.wait_closed(), _PARTING_S)


async def _discard(reader: asyncio.StreamReader) -> None:
    while await reader.read(HEAD_BYTES):
        pass
