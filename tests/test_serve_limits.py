"""`fieldfit serve` against clients that are slow, gone, too large, too many, or send anything.

Services of small limits run in this process; the fuzzed requests go to one of its own.
"""

import asyncio
import contextlib
import io
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from runtime.candidates import Request
from runtime.classifier import Classifier
from runtime.delivery.live import LiveClassifier
from runtime.delivery.slots import Slots
from runtime.engines.engine import Outputs, UInt8
from runtime.errors import EngineError
from runtime.serving.batching import Answered, Batcher, Job, Watch, Window
from runtime.serving.gate import Gate, Limits, Workspace
from runtime.serving.model import BundleModel, Model, Served, SlotModel, open_bundle
from runtime.serving.refusal import Refusal
from tests.model_zips import SIZE, model_zip
from tests.serving_client import PATIENCE_S, Client, ask, encode, infer_body, inside, started
from tests.serving_fuzz import Case, fuzzed
from tests.test_engines import CHANNELS
from tests.test_live import activated, failing_in_the_dark

INFER = "/v2/models/tiny/infer"
SHAPE = (*SIZE, CHANNELS)
MIB = 1024 * 1024
HEAD = "POST /classify HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    model_zip(folder, "1.0")
    return folder / "tiny-1.0"


@pytest.fixture(scope="module")
def small(bundle: Path) -> Iterator[str]:
    """A service that grants little."""
    limits = Limits(body_bytes=20_000, held_bytes=60_000, connections=8, client_s=0.5)
    with inside(bundle, limits) as url:
        yield url


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full(SHAPE, 99, np.uint8)).save(file, "PNG")
    return file.getvalue()


def pictures(count: int) -> UInt8:
    return np.random.default_rng(count).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def counts(url: str) -> dict[str, float]:
    text = ask(url, "GET", "/metrics").body.decode()
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- too large


def test_a_body_over_the_limit_is_refused_before_it_is_sent(small: str) -> None:
    with Client(small) as client:
        client.send(f"{HEAD}Content-Length: 20001\r\nExpect: 100-continue\r\n\r\n".encode())
        assert client.status() == 413  # no "100 Continue" comes before


def test_a_body_over_the_limit_is_refused_though_it_comes(small: str) -> None:
    reply = ask(small, "POST", "/classify", b"x" * 1_000_000)

    assert reply.status == 413
    assert "at most 20,000 bytes" in reply.error


def test_a_body_of_no_known_length_is_refused_when_it_is_too_long(small: str) -> None:
    with Client(small) as client:
        client.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(3):
            client.send(b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
        reply = client.reply()
    assert reply.status == 413


def test_a_body_in_chunks_is_read(small: str) -> None:
    data = picture()
    with Client(small) as client:
        client.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        for byte in (data[:9], data[9:]):
            client.send(f"{len(byte):x}\r\n".encode() + byte + b"\r\n")
        client.send(b"0\r\n\r\n")
        assert client.reply().status == 200


def test_few_bytes_that_become_many_images_are_held_against_the_limit(small: str) -> None:
    reply = ask(small, "POST", INFER, *infer_body([picture()] * 60))

    assert reply.status == 413
    assert "send fewer images at a time" in reply.error


def test_endless_headers_are_refused(small: str) -> None:
    with Client(small) as client:
        client.send(HEAD.encode() + b"X-Long: " + b"a" * 100_000)
        assert client.reply().status == 400


# --- slow and gone


def test_a_client_that_sends_slowly_is_given_up(small: str) -> None:
    beginnings = ("", "POST /class", f"{HEAD}Content-Length: 100\r\n\r\nabc")
    clients = [Client(small) for _ in beginnings]
    for client, sent in zip(clients, beginnings, strict=True):
        client.send(sent.encode())
    for client in clients:
        reply = client.reply()
        assert (reply.status, reply.error) == (408, "the request did not arrive in time")
        assert client.ended()
        client.close()


def test_a_client_that_trickles_is_given_up_all_the_same(small: str) -> None:
    with Client(small) as client:
        client.send(HEAD.encode())
        ended = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not ended.wait(0.1):
                    client.send(b"X-A: b\r\n")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert client.reply().status == 408
        finally:
            ended.set()
            thread.join()


def test_a_client_that_hangs_up_in_the_middle_leaves_nothing_behind(small: str) -> None:
    for sent in (HEAD, f"{HEAD}Content-Length: 10000\r\n\r\n" + "x" * 5000):
        with Client(small) as client:
            client.send(sent.encode())
    with Client(small) as client:
        client.send(encode("POST", INFER, *infer_body(pictures(1))))  # and does not wait
    until(lambda: counts(small)["fieldfit_serve_held_bytes"] == 0)
    until(lambda: counts(small)["fieldfit_serve_waiting_requests"] == 0)
    assert counts(small)['fieldfit_serve_responses_total{code="499"}'] >= 1
    assert 'fieldfit_serve_responses_total{code="500"}' not in counts(small)
    assert ask(small, "POST", "/classify", picture()).status == 200


def test_too_many_connections_are_refused_until_some_end(small: str) -> None:
    clients = [Client(small) for _ in range(8)]
    for client in clients:
        assert client.ask("GET", "/v2").status == 200
    with Client(small) as one_more:
        reply = one_more.reply()
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    clients.pop().close()
    until(lambda: answers(small))
    for client in clients:
        client.close()


def answers(url: str) -> bool:
    try:
        return ask(url, "GET", "/v2").status == 200
    except OSError:
        return False


# --- overload


class Blocked:
    """A real model that answers when it is told to."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.go = threading.Event()
        self.asked: queue.SimpleQueue[int] = queue.SimpleQueue()

    @property
    def served(self) -> Served:
        return self._model.served

    def poll(self) -> None:
        self._model.poll()

    def infer(self, images: UInt8) -> Outputs:
        self.asked.put(len(images))
        assert self.go.wait(PATIENCE_S)
        return self._model.infer(images)

    def close(self) -> None:
        self._model.close()


@pytest.fixture
def blocked(bundle: Path) -> Blocked:
    return Blocked(BundleModel(Classifier.open(bundle, threads=1)))


def test_under_overload_requests_are_refused_before_their_body_and_health_is_not(
    blocked: Blocked,
) -> None:
    with inside(lambda: blocked, Limits(places=2)) as url:
        asking = [Client(url) for _ in range(2)]
        for client in asking:
            client.send(encode("POST", INFER, *infer_body(pictures(1))))
        until(lambda: counts(url)["fieldfit_serve_waiting_requests"] == 2)

        with Client(url) as client:
            client.send(f"{HEAD}Content-Length: 1000000\r\n\r\n".encode())
            reply = client.reply()
            assert client.ended()
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert reply.error == "all places are taken; try again"
        with Client(url) as client:
            assert client.ask("GET", "/v2/health/ready").status == 200
            # The same on a connection that has been answered before.
            assert client.ask("POST", "/classify", picture()).status == 503
        assert counts(url)['fieldfit_serve_refused_total{reason="overload"}'] == 2

        blocked.go.set()
        assert [client.reply().status for client in asking] == [200, 200]
        for client in asking:
            client.close()
        assert ask(url, "POST", "/classify", picture()).status == 200


def test_a_refused_client_that_still_sends_gets_its_refusal(blocked: Blocked) -> None:
    with inside(lambda: blocked, Limits(places=1)) as url:
        first = Client(url)
        first.send(encode("POST", INFER, *infer_body(pictures(1))))
        until(lambda: counts(url)["fieldfit_serve_waiting_requests"] == 1)
        # Far more than any buffer holds: without somebody who reads it, the client would see a
        # connection that was reset, not the answer.
        assert ask(url, "POST", "/classify", b"x" * 8_000_000).status == 503
        blocked.go.set()
        assert first.reply().status == 200
        first.close()


def test_what_nobody_waits_for_is_not_computed(blocked: Blocked) -> None:
    with inside(lambda: blocked, Limits()) as url:
        first = Client(url)
        first.send(encode("POST", INFER, *infer_body(pictures(1))))
        assert blocked.asked.get(timeout=PATIENCE_S) == 1
        for _ in range(3):
            with Client(url) as client:
                client.send(encode("POST", INFER, *infer_body(pictures(2))))
                until(lambda: counts(url)["fieldfit_serve_waiting_requests"] == 2)
            until(lambda: counts(url)["fieldfit_serve_waiting_requests"] == 1)
        blocked.go.set()
        assert first.reply().status == 200
        first.close()
        assert ask(url, "POST", "/classify", picture()).status == 200
        assert blocked.asked.get_nowait() == 1  # that of the last question
        assert blocked.asked.empty()


# --- batches


def batched(
    blocked: Blocked, window: Window, requests: list[UInt8], coming: int = 0
) -> tuple[list[int], list[Answered]]:
    """The sizes of the batches, the first of one image aside, and the answers."""

    async def ask_all() -> list[Answered]:
        loop = asyncio.get_running_loop()
        spec = batcher.served.manifest.input

        def submit(images: UInt8) -> "asyncio.Future[Answered]":
            future: asyncio.Future[Answered] = loop.create_future()
            batcher.submit(Job(images, spec, None, future))
            return future

        first = submit(pictures(1))
        await loop.run_in_executor(None, blocked.asked.get)
        futures = [submit(images) for images in requests]
        blocked.go.set()
        await first
        return list(await asyncio.gather(*futures))

    sizes: list[int] = []
    batcher = Batcher(
        lambda: blocked, Watch(lambda images, _: sizes.append(images), lambda: None), window=window
    )
    batcher.start()
    answers = asyncio.run(ask_all())
    batcher.close()
    return sizes[1:], answers


def test_requests_that_wait_are_run_together_and_each_gets_its_own(
    blocked: Blocked, bundle: Path
) -> None:
    requests = [pictures(count) for count in (1, 2, 3, 4)]

    sizes, answers = batched(blocked, Window(6, 0.0), requests)

    assert sizes == [6, 4]
    with Classifier.open(bundle, threads=1) as model:
        for images, answer in zip(requests, answers, strict=True):
            expected = model.engine.infer(images)
            np.testing.assert_allclose(answer.outputs.logits, expected.logits, rtol=1e-5)
            np.testing.assert_allclose(answer.outputs.features, expected.features, rtol=1e-5)


def test_a_request_of_more_images_than_a_batch_is_run_in_parts(blocked: Blocked) -> None:
    sizes, (answer,) = batched(blocked, Window(4, 0.0), [pictures(10)])

    assert sizes == [4, 4, 2]
    assert len(answer.outputs.logits) == 10


def test_a_batch_waits_for_requests_that_are_on_their_way(bundle: Path) -> None:
    """The window is far longer than the test: it ends because the batch is full."""
    sizes: list[int] = []
    watch = Watch(lambda images, _: sizes.append(images), lambda: None)
    batcher = Batcher(open_bundle(bundle, Request(threads=1), None), watch, window=Window(2, 99.0))
    batcher.start()

    async def ask_twice() -> None:
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Answered]] = [loop.create_future() for _ in range(2)]
        batcher.coming = 1
        for future in futures:
            batcher.submit(Job(pictures(1), batcher.served.manifest.input, None, future))
            await asyncio.sleep(0.05)
        await asyncio.gather(*futures)

    asyncio.run(ask_twice())
    batcher.close()
    assert sizes == [2]


class Failing:
    """A real model that fails when told to."""

    def __init__(self, model: Model, error: Exception) -> None:
        self._model, self._error = model, error
        self.fails = True

    @property
    def served(self) -> Served:
        return self._model.served

    def poll(self) -> None:
        if self.fails:
            raise RuntimeError("the update is broken")

    def infer(self, images: UInt8) -> Outputs:
        if self.fails:
            raise self._error
        return self._model.infer(images)

    def close(self) -> None:
        self._model.close()


@pytest.mark.parametrize("error", [EngineError("the GPU is gone"), RuntimeError("a bug")])
def test_a_model_that_fails_is_no_answer_and_no_end(bundle: Path, error: Exception) -> None:
    failing = Failing(BundleModel(Classifier.open(bundle, threads=1)), error)
    with inside(lambda: failing, Limits()) as url:
        reply = ask(url, "POST", "/classify", picture())
        assert (reply.status, reply.error) == (503, "the model failed on this batch")
        assert counts(url)["fieldfit_serve_failed_batches_total"] == 1
        failing.fails = False
        assert ask(url, "POST", "/classify", picture()).status == 200


def test_what_was_made_ready_for_the_model_before_is_refused(bundle: Path) -> None:
    batcher = Batcher(
        open_bundle(bundle, Request(threads=1), None), Watch(lambda *_: None, lambda: None)
    )
    spec = batcher.start().manifest.input

    async def ask_with(changed: Any, version: str | None) -> str:
        future: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        batcher.submit(Job(pictures(1), changed, version, future))
        with pytest.raises(Refusal) as refused:
            await future
        return refused.value.word

    other = msgspec.structs.replace(spec, mean=1)
    assert asyncio.run(ask_with(other, None)) == "model changed"
    assert asyncio.run(ask_with(spec, "0.9")) == "model changed"
    batcher.close()


def test_a_slot_on_trial_that_fails_on_any_image_of_a_batch_costs_no_answer(
    tmp_path: Path,
) -> None:
    slots = Slots(tmp_path / "state")
    slots.activate(slots.stage(model_zip(tmp_path, "1")).sha256)
    slots.begin_try()
    slots.commit()
    model = SlotModel(LiveClassifier(slots.folder, request=Request(threads=1)))
    bright, dark = np.full((1, *SHAPE), 200, np.uint8), np.zeros((1, *SHAPE), np.uint8)
    try:
        expected = model.infer(np.concatenate([bright, dark])).logits
        activated(slots, failing_in_the_dark(tmp_path))

        def on_trial() -> bool:
            model.poll()
            return model.served.manifest.version == "2"

        until(on_trial)
        assert np.isfinite(model.infer(bright).logits).all()
        assert model.served.manifest.version == "2"

        logits = model.infer(np.concatenate([bright, dark])).logits

        np.testing.assert_allclose(logits, expected, rtol=1e-5)
        assert model.served.manifest.version == "1"
        until(lambda: bool(slots.status().state.failures))
        assert "not finite" in slots.status().state.failures[-1].reason
    finally:
        model.close()


# --- the counts of the gate


def test_places_and_bytes_are_given_back_whatever_happens() -> None:
    gate = Gate(Limits(places=1, held_bytes=10))

    def work() -> None:
        with gate.holding() as held, gate.place():
            held.add(7)
            assert (gate.full, gate.taken, gate.held) == (True, 1, 7)
            with pytest.raises(Refusal, match="all places"), gate.place():
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert (gate.full, gate.taken, gate.held) == (False, 0, 0)


def test_bytes_that_others_hold_are_waited_for_elsewhere_and_too_many_never_come() -> None:
    gate = Gate(Limits(held_bytes=10))
    with gate.holding() as one, gate.holding() as other:
        one.add(7)
        with pytest.raises(Refusal) as refused:
            other.add(4)
        assert refused.value.status == 503
        other.add(3)
        with pytest.raises(Refusal) as refused:
            one.add(4)
        assert refused.value.status == 413
    assert gate.held == 0


def test_decoders_wait_for_memory_and_what_is_larger_than_all_works_alone() -> None:
    workspace = Workspace(10)
    entered = threading.Event()

    def second() -> None:
        with workspace.take(99):
            entered.set()

    with workspace.take(4), workspace.take(6):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(PATIENCE_S)
    thread.join()


# --- anything


REQUESTS = 400


def test_fuzzed_requests_are_answered_and_never_with_500(bundle: Path) -> None:
    with started("--bundle", bundle) as service:
        assert ask(service.url, "POST", "/classify", picture()).status == 200
        statuses = set()
        for seed in range(REQUESTS):
            case = fuzzed(seed, "tiny", SHAPE)
            status = status_of(service.url, case)
            if case.whole:
                assert status is not None, f"seed {seed}: no answer"
            assert status != 500, f"seed {seed}"
            statuses.add(status)
        assert {200, 400, 404, 405} <= statuses
        assert ask(service.url, "POST", "/classify", picture()).status == 200
        service.process.terminate()
        assert "Traceback" not in service.said()


def status_of(url: str, case: Case) -> int | None:
    """The status of the answer to these bytes; None if there is none."""
    with Client(url) as client:
        try:
            client.send(case.data)
            if not case.whole:  # or the service would wait for the rest
                client.socket.shutdown(socket.SHUT_WR)
            return client.status()
        except OSError:  # it hung up, perhaps before we did
            return None
