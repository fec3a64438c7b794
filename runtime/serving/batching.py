"""Images of concurrent requests, run together by the one thread that the engine serves.

It knows no HTTP, and nothing of what is in an image. On a GPU a batch costs hardly more than one
image, so it waits a moment for requests that are on their way; on a CPU an image costs the same in
any company (measured), so a batch is what waits already, and small.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from runtime.engines.engine import Outputs, UInt8
from runtime.errors import EngineError
from runtime.preprocess import InputSpec
from runtime.serving.model import Model, Served
from runtime.serving.refusal import Refusal

_log = logging.getLogger(__name__)

POLL_S = 0.5
"""How often a model is polled while nobody asks it."""


class Window(NamedTuple):
    """How requests come together."""

    images: int
    """Most in one call of the engine."""
    seconds: float
    """How long a batch that is not full waits for requests that are on their way."""


ON_GPU, ON_CPU = Window(16, 0.002), Window(4, 0.0)


class Answered(NamedTuple):
    """The outputs of one request, and who answered it."""

    outputs: Outputs
    served: Served


class Job(NamedTuple):
    """One request's images, made ready for a model of this input."""

    images: UInt8
    """uint8 ``[N, H, W, C]``"""
    spec: InputSpec
    version: str | None
    """The model version that the client insists on."""
    future: "asyncio.Future[Answered]"


class Watch(NamedTuple):
    """What is told of each batch."""

    batch: Callable[[int, float], object]
    """Images, and seconds that the engine took."""
    failed: Callable[[], object]


class Batcher:
    """One engine thread with its queue. ``start`` it, ``submit`` jobs, ``close`` it.

    ``window`` is by default what suits the engine that answers.
    """

    def __init__(
        self, open_model: Callable[[], Model], watch: Watch, *, window: Window | None = None
    ) -> None:
        self._open_model, self._watch, self._window = open_model, watch, window
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._opened: queue.SimpleQueue[Served | BaseException] = queue.SimpleQueue()
        self._served: Served | None = None
        self.coming = 0
        """Requests on their way to ``submit``; whoever knows of them counts."""
        # A daemon: Ctrl-C while an engine is being built need not wait for it.
        self._thread = threading.Thread(target=self._run, name="fieldfit-engine", daemon=True)

    def start(self) -> Served:
        """Open the model and return what answers. Raises what opening raises."""
        self._thread.start()
        opened = self._opened.get()
        if isinstance(opened, BaseException):
            raise opened
        self._served = opened
        return opened

    @property
    def served(self) -> Served:
        """What answered last, or will answer first."""
        assert self._served is not None, "start() comes first"
        return self._served

    @property
    def alive(self) -> bool:
        """Whether there is a thread that answers."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Have ``job`` answered through its future: with Answered, or Refusal."""
        self._jobs.put(job)

    def close(self) -> None:
        """Answer what was submitted, free the engine, and return."""
        self._jobs.put(None)
        self._thread.join()

    # --- in the engine's thread

    def _run(self) -> None:
        try:
            model = self._open_model()
        except BaseException as error:  # it is start() that raises it, where somebody listens
            self._opened.put(error)
            return
        self._opened.put(model.served)
        try:
            last = False
            while not last:
                jobs, last = self._batch()
                _poll(model)
                self._served = model.served
                self._answer(model, jobs)
        finally:
            model.close()

    def _batch(self) -> tuple[list[Job], bool]:
        """Jobs to run together, none if nobody asked for a while; and whether they are the last."""
        jobs: list[Job] = []
        try:
            job = self._jobs.get(timeout=POLL_S)
            window = self._window_of(self.served)
            end = time.monotonic() + window.seconds
            while job is not None:
                jobs.append(job)
                if sum(len(one.images) for one in jobs) >= window.images:
                    return jobs, False
                job = self._next(end)
        except queue.Empty:
            return jobs, False
        return jobs, True

    def _next(self, end: float) -> Job | None:
        left = end - time.monotonic()
        if self.coming and left > 0:
            return self._jobs.get(timeout=left)
        return self._jobs.get_nowait()

    def _window_of(self, served: Served) -> Window:
        return self._window or (ON_GPU if served.on_gpu else ON_CPU)

    def _answer(self, model: Model, jobs: Sequence[Job]) -> None:
        wanted = []
        for job in jobs:
            if job.future.cancelled():
                continue  # its client has left
            if refusal := _changed(job, self.served):
                _resolve([(job, refusal)])
            else:
                wanted.append(job)
        if not wanted:
            return
        try:
            outputs = self._infer(model, wanted)
        except Exception as error:
            # Whatever it is, this thread goes on: without it nobody would get an answer again.
            if isinstance(error, EngineError):
                _log.error("%s", error)
            else:
                _log.exception("in the engine's thread")
            self._watch.failed()
            refusal = Refusal(503, "engine failed", "the model failed on this batch", retry_after=1)
            _resolve([(job, refusal) for job in wanted])
            return
        _resolve(zip(wanted, _split(outputs, wanted, model.served), strict=True))

    def _infer(self, model: Model, jobs: Sequence[Job]) -> Outputs:
        images = jobs[0].images if len(jobs) == 1 else np.concatenate([j.images for j in jobs])
        most = self._window_of(self.served).images
        most = min(most, self.served.choice.engine.max_batch or most)
        parts = []
        for at in range(0, len(images), most):
            start = time.perf_counter()
            parts.append(model.infer(images[at : at + most]))
            self._watch.batch(len(parts[-1].logits), time.perf_counter() - start)
        return Outputs(
            np.concatenate([part.logits for part in parts]),
            np.concatenate([part.features for part in parts]),
        )


def _poll(model: Model) -> None:
    try:
        model.poll()
    except Exception:  # an update never stops inference, whatever it is
        _log.exception("between two batches")


def _changed(job: Job, served: Served) -> Refusal | None:
    """Why ``served`` cannot answer what was made ready for the model before it."""
    same = job.version in (None, served.manifest.version)
    if same and job.spec == served.manifest.input:
        return None
    return Refusal(503, "model changed", "the model has just changed; try again", retry_after=1)


def _split(outputs: Outputs, jobs: Sequence[Job], served: Served) -> Iterator[Answered]:
    at = 0
    for job in jobs:
        end = at + len(job.images)
        yield Answered(Outputs(outputs.logits[at:end], outputs.features[at:end]), served)
        at = end


def _resolve(answers: Iterable[tuple[Job, Answered | Refusal]]) -> None:
    """In the loop of the futures, which are not for other threads."""
    pairs = list(answers)

    def settle() -> None:
        for job, answer in pairs:
            if job.future.cancelled():
                continue
            if isinstance(answer, Refusal):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)

    pairs[0][0].future.get_loop().call_soon_threadsafe(settle)
