"""The HTTP interface: routes, statuses, JSON and binary answers. It knows no engine and no files.

Open Inference Protocol below ``/v2``; ``POST /classify`` takes one encoded image as its body, for
``curl``; ``/metrics`` is for Prometheus. Every error is ``{"error": sentence}``.
"""

import asyncio
import concurrent.futures
import functools
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from runtime import metrics
from runtime.engines.engine import UInt8
from runtime.serving import protocol
from runtime.serving.access import Tokens
from runtime.serving.batching import Answered, Batcher, Job
from runtime.serving.decoding import Ready, decoded, ready
from runtime.serving.gate import Gate, Held, Workspace, overloaded
from runtime.serving.model import Served
from runtime.serving.refusal import Refusal
from runtime.serving.serving_metrics import ServingMetrics
from runtime.version import __version__

_Result = TypeVar("_Result")


class Service(NamedTuple):
    """What the interface stands on."""

    batcher: Batcher
    gate: Gate
    workspace: Workspace
    decoders: concurrent.futures.Executor
    metrics: ServingMetrics
    tokens: Tokens | None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/classify``."""

    label: str
    score: float
    abstained: bool
    probabilities: dict[str, float]
    model: str
    version: str


def make_app(service: Service) -> "Guarded":
    """The ASGI application of ``service``."""
    interface = _Interface(service)
    get = ["GET"]
    model = "/v2/models/{name}"
    version = model + "/versions/{version}"
    routes = [
        Route("/v2", interface.server, methods=get),
        Route("/v2/health/live", interface.live, methods=get),
        Route("/v2/health/ready", interface.ready, methods=get),
        Route(model, interface.model, methods=get),
        Route(version, interface.model, methods=get),
        Route(f"{model}/ready", interface.model_ready, methods=get),
        Route(f"{version}/ready", interface.model_ready, methods=get),
        Route(f"{model}/infer", interface.infer, methods=["POST"]),
        Route(f"{version}/infer", interface.infer, methods=["POST"]),
        Route("/classify", interface.classify, methods=["POST"]),
        Route("/metrics", interface.metrics, methods=get),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            Refusal: interface.refused,  # type: ignore[dict-item]
            HTTPException: interface.unknown,  # type: ignore[dict-item]
            ClientDisconnect: interface.left,
            Exception: interface.failed,
        },
    )
    app.router.redirect_slashes = False
    return Guarded(app, service)


class Guarded:
    """An application that only those who may ask reach, and whose responses are counted."""

    def __init__(self, app: Starlette, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request of ASGI."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.responses[message["status"]] += 1
            await send(message)

        tokens = self._service.tokens
        if tokens is not None:
            headers = {name: value for name, value in scope["headers"] if name == b"authorization"}
            if not tokens.allow(headers.get(b"authorization")):
                sentence = "expected an Authorization header: Bearer and a token of this service"
                refusal = Refusal(401, "no token", sentence)
                self._service.metrics.refused[refusal.word] += 1
                await _refused(refusal)(scope, receive, counted)
                return
        await self._app(scope, receive, counted)


class _Interface:
    """What is done for each route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # --- errors

    async def refused(self, request: Request, refusal: Refusal) -> Response:
        self._service.metrics.refused[refusal.word] += 1
        return _refused(refusal)

    async def unknown(self, request: Request, error: HTTPException) -> Response:
        """Of Starlette's router: no such path, or not with this method."""
        sentence = "no such path; this is the Open Inference Protocol below /v2, and /classify"
        if error.status_code == 405:
            sentence = "this path has no such method"
        refusal = Refusal(error.status_code, "no such path", sentence)
        self._service.metrics.refused[refusal.word] += 1
        response = _refused(refusal)
        response.headers.update(error.headers or {})
        return response

    async def left(self, request: Request, error: Exception) -> Response:
        """Nobody reads this; 499, nginx's number, is for the metric."""
        return Response(status_code=499)

    async def failed(self, request: Request, error: Exception) -> Response:
        """A bug of ours; its traceback is in the log and nowhere else."""
        return _refused(Refusal(500, "failed", "the service failed on this request"))

    # --- about the service

    async def server(self, request: Request) -> Response:
        extensions = ["binary_tensor_data"]
        return _json({"name": "fieldfit", "version": __version__, "extensions": extensions})

    async def live(self, request: Request) -> Response:
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        alive = self._service.batcher.alive
        return _json({"ready": alive}, status=200 if alive else 503)

    async def model(self, request: Request) -> Response:
        return _json(protocol.model_metadata(self._model(request).manifest))

    async def model_ready(self, request: Request) -> Response:
        manifest = self._model(request).manifest
        alive = self._service.batcher.alive
        return _json({"name": manifest.name, "ready": alive}, status=200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        text = self._service.metrics.text(self._service.batcher.served, self._service.gate)
        return Response(text, media_type="text/plain; version=0.0.4")

    # --- answers

    async def infer(self, request: Request) -> Response:
        served = self._model(request)
        with self._service.gate.holding() as held:
            body = await self._body(request, held)
            started = time.perf_counter()
            header = request.headers.get(protocol.HEADER_LENGTH)
            with self._service.gate.place():
                read = functools.partial(
                    ready, body, header, served.manifest.input,
                    self._service.gate.limits.images, held, self._service.workspace,
                )  # fmt: skip
                asked: Ready = await self._beside(read)
                version = request.path_params.get("version")
                answered = await self._answered(request, asked.images, served, version)
            self._service.metrics.request_seconds.observe(time.perf_counter() - started)
            said = protocol.answer(
                asked.request.id, asked.request.outputs, answered.outputs, answered.served.manifest
            )
        if said.json_length is None:
            return Response(said.data, media_type="application/json")
        headers = {protocol.HEADER_LENGTH: str(said.json_length)}
        return Response(said.data, headers=headers, media_type="application/octet-stream")

    async def classify(self, request: Request) -> Response:
        served = self._service.batcher.served
        with self._service.gate.holding() as held:
            body = await self._body(request, held)
            started = time.perf_counter()
            with self._service.gate.place():
                read = functools.partial(
                    decoded, [body], served.manifest.input, held, self._service.workspace
                )
                images: UInt8 = await self._beside(read)
                answered = await self._answered(request, images, served, None)
            self._service.metrics.request_seconds.observe(time.perf_counter() - started)
        return _json(_verdict(answered))

    # --- the steps of an answer

    def _model(self, request: Request) -> Served:
        """What answers, if that is what was asked for."""
        served = self._service.batcher.served
        manifest = served.manifest
        if request.path_params["name"] != manifest.name:
            raise Refusal(404, "no such model", f"the model here is {manifest.name!r}")
        if request.path_params.get("version", manifest.version) != manifest.version:
            sentence = f"the version of {manifest.name!r} here is {manifest.version!r}"
            raise Refusal(404, "no such model", sentence)
        return served

    async def _body(self, request: Request, held: Held) -> bytes:
        limits = self._service.gate.limits
        if self._service.gate.full:
            raise overloaded()
        if "content-encoding" in request.headers:
            sentence = "expected a body that is not compressed; leave Content-Encoding out"
            raise Refusal(415, "compressed", sentence)
        declared = int(request.headers.get("content-length", 0))
        if declared > limits.body_bytes:
            raise protocol.too_large(limits.body_bytes)
        parts = []
        async for part in request.stream():
            held.add(len(part))
            parts.append(part)
            if held.count > limits.body_bytes:
                raise protocol.too_large(limits.body_bytes)
        return b"".join(parts)

    async def _beside(self, work: Callable[[], _Result]) -> _Result:
        """Do ``work`` in a decoder's thread; a batch may wait for what is being decoded."""
        self._service.batcher.coming += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._service.decoders, work)
        finally:
            self._service.batcher.coming -= 1

    async def _answered(
        self, request: Request, images: UInt8, served: Served, version: str | None
    ) -> Answered:
        future: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._service.batcher.submit(Job(images, served.manifest.input, version, future))
        left = asyncio.ensure_future(request.receive())  # the body is read: now it is the end
        left.add_done_callback(lambda _: future.cancel())
        try:
            return await future
        except asyncio.CancelledError:
            raise ClientDisconnect from None
        finally:
            left.cancel()


def _verdict(answered: Answered) -> Verdict:
    manifest = answered.served.manifest
    logits = answered.outputs.logits
    (row,) = metrics.softmax(logits, temperature=manifest.temperature).tolist()
    score = max(row)
    return Verdict(
        label=manifest.labels[row.index(score)],
        score=score,
        abstained=score < manifest.abstain_below,
        probabilities=dict(zip(manifest.labels, row, strict=True)),
        model=manifest.name,
        version=manifest.version,
    )


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _refused(refusal: Refusal) -> Response:
    response = _json({"error": refusal.sentence}, refusal.status)
    if refusal.retry_after is not None:
        response.headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response
