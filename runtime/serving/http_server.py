"""uvicorn's HTTP server with an end to what a client may cost: connections, waiting, overload.

It knows no model. Under overload a request is turned away by its first bytes, before HTTP is parsed
for it, since parsing is most of what a refusal would cost. Health and metrics still get through.
"""

import asyncio
import contextlib
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.serving.gate import Gate, overloaded
from runtime.serving.refusal import Refusal
from runtime.serving.serving_metrics import ServingMetrics

_LINGER_S = 2.0
"""How long a client that was turned away may still send: to close at once could cost it the
response (RFC 9112, 9.6)."""

_HANDSHAKE_S = 5.0
_IDLE_S = 5
_SWEEP_TICKS = 10
"""Of uvicorn's, ten a second."""

_BACKLOG = 128

_CLIENT_TOO_SLOW = Refusal(408, "client too slow", "the request did not arrive in time")
_TOO_MANY = Refusal(503, "too many connections", "too many connections; try again", retry_after=1)
_ENDING = Refusal(503, "ending", "the service is ending; try again", retry_after=1)

_REASONS = {408: "Request Timeout", 503: "Service Unavailable"}


class Connection(H11Protocol):
    """One client's connection, as uvicorn's, that can be turned away at any time before an answer.

    ``gate`` and ``metrics`` are those of its service.
    """

    def __init__(self, gate: Gate, metrics: ServingMetrics, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gate, self._metrics = gate, metrics
        self._turned_away = False
        self._lingering: asyncio.TimerHandle | None = None
        self._seen: object = None
        self._waits_since = time.monotonic()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a client, or not if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._gate.limits.connections:
            self.turn_away(_TOO_MANY, linger=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of it."""
        super().connection_lost(exc)
        if self._lingering:
            self._lingering.cancel()

    def data_received(self, data: bytes) -> None:
        """Read on, unless this is a new question and no place is free."""
        if self._turned_away:
            return
        if self._gate.full and self._at_rest and data.startswith(b"POST "):
            self.turn_away(overloaded())
            return
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP; if the answer is on its way already, only the end is left."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._metrics.responses[400] += 1
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def sweep(self, now: float) -> None:
        """End it if it has waited for its client for too long."""
        if not self._waits_for_client or self.cycle is not self._seen:
            self._seen, self._waits_since = self.cycle, now
        elif now - self._waits_since > self._gate.limits.client_s:
            if self._answering or self._turned_away:
                self.transport.abort()
            else:
                self.turn_away(_CLIENT_TOO_SLOW)

    @property
    def receiving(self) -> bool:
        """Whether a request has begun and is not whole."""
        return not self._at_rest and bool(self.cycle is None or self.cycle.more_body)

    def turn_away(self, refusal: Refusal, *, linger: bool = True) -> None:
        """Refuse in a fixed answer, and close: at once, or when the client has had time for it."""
        self._turned_away = True
        self._metrics.refused[refusal.word] += 1
        self._metrics.responses[refusal.status] += 1
        self.transport.write(_fixed_answer(refusal))
        self._unset_keepalive_if_required()
        if self.cycle is not None:  # whoever still reads is told that there is nobody
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if linger and self.transport.can_write_eof():  # TLS cannot
            self.transport.write_eof()
            self._lingering = self.loop.call_later(_LINGER_S, self.transport.abort)
        else:
            self.transport.close()

    @property
    def _at_rest(self) -> bool:
        """Between two requests."""
        between = self.cycle is None or self.cycle.response_complete
        return between and not self.conn.trailing_data[0]

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and self.cycle.response_started

    @property
    def _waits_for_client(self) -> bool:
        if self.cycle is None or self.cycle.response_complete:
            return True
        return self.cycle.more_body or self.flow.write_paused


def _fixed_answer(refusal: Refusal) -> bytes:
    body = f'{{"error":"{refusal.sentence}"}}'.encode()
    retry = f"Retry-After: {refusal.retry_after}\r\n" if refusal.retry_after else ""
    return (
        f"HTTP/1.1 {refusal.status} {_REASONS[refusal.status]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"{retry}Connection: close\r\n\r\n"
    ).encode() + body


class Server(uvicorn.Server):
    """Serves ``app`` on a socket that is bound, until SIGTERM, and then ends what it took."""

    def __init__(
        self,
        app: Any,
        listener: socket.socket,
        gate: Gate,
        metrics: ServingMetrics,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=H11Protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",  # a warning for each malformed request would fill the disk
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=round(gate.limits.shutdown_s),
            )
        )
        self._listener, self._gate, self._metrics, self._tls = listener, gate, metrics, tls
        self._listening: Callable[[], object] = lambda: None

    def run(self, listening: Callable[[], object]) -> None:  # type: ignore[override]
        """Serve, and return when all that was taken is answered; ``listening`` is told first."""
        self._listening = listening
        asyncio.run(self.serve())

    def end(self) -> None:
        """End as on SIGTERM; for any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, with an end to how long a handshake may take."""
        await self.lifespan.startup()
        loop = asyncio.get_running_loop()
        handshake = _HANDSHAKE_S if self._tls else None
        server = await loop.create_server(
            self._connection, sock=self._listener, backlog=_BACKLOG, ssl=self._tls,
            ssl_handshake_timeout=handshake,
        )  # fmt: skip
        self.servers = [server]
        self.started = True
        self._listening()

    def _connection(self) -> asyncio.Protocol:
        return Connection(
            self._gate, self._metrics, self.config, self.server_state, self.lifespan.state
        )

    async def on_tick(self, counter: int) -> bool:
        """What uvicorn does ten times a second, and the sweep."""
        if counter % _SWEEP_TICKS == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                connection.sweep(now)  # type: ignore[union-attr]
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing more; answer what is whole."""
        for connection in list(self.server_state.connections):
            if connection.receiving:  # type: ignore[union-attr]
                connection.turn_away(_ENDING)  # type: ignore[union-attr]
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn, which sends itself the signal again when all is done: SIGTERM is how a
        service ends, and no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            with super().capture_signals():
                yield
        finally:
            signal.signal(signal.SIGTERM, before)
