"""Open a bundle and classify images: the five-line API of the device.

from runtime import Classifier
classifier = Classifier.open("build/solar/bundle")
answer = classifier("cell0001.png")
print(answer.label, answer.score)
"""

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, overload

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import metrics
from runtime.bundle import Bundle
from runtime.candidates import EngineName, Request
from runtime.choose import Choice, choose_engine
from runtime.engines.plan_cache import PlanCache
from runtime.errors import BundleError
from runtime.manifest import Adaptation, Minimum
from runtime.preprocess import ImageLike, preprocess_batch
from runtime.version import __version__

BATCH = 16
"""Images of a list that are preprocessed and run together; larger ones gain nothing on a CPU."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one image."""

    label: str
    score: float
    """Probability of ``label`` after temperature scaling."""
    abstained: bool
    """The score is below the bundle's threshold: do not act on the label."""
    probabilities: dict[str, float]
    milliseconds: dict[str, float]
    """``preprocess`` (decode and resize) and ``infer``, an even share of the batch."""


class Inspection(NamedTuple):
    """The verdict on one image, and what it was made from: health checks look at that."""

    answer: Answer
    image: npt.NDArray[np.uint8]
    """uint8 ``[H, W, C]``, as the model saw it."""
    features: npt.NDArray[np.float32]
    """float32 ``[D]``, what the model's last layer saw."""
    by: "Classifier"
    """Who answered: its bundle and its engine."""


class Classifier:
    """A verified bundle on a proven engine. Make one with ``Classifier.open``.

    It serves one thread at a time; use one per thread or process.
    """

    def __init__(self, bundle: Bundle, choice: Choice) -> None:
        self.bundle = bundle
        self.engine = choice.engine
        self.selftest = choice.selftest
        self.steps = choice.steps
        self._labels = bundle.manifest.labels

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        require: Minimum | None = None,
        engine: EngineName | None = None,
        form: str | None = None,
        threads: int | None = None,
        device: int = 0,
        cache: str | Path | None = None,
    ) -> "Classifier":
        """Verify the bundle at ``path``, choose an engine and replay the golden samples on it.

        ``require`` makes a step down an error: ``tensorrt``, or ``cuda`` for any engine on the
        GPU. ``engine`` and ``form`` (``fp16``, ``int8-cpu``, ...) ask for one alone; the rest is
        as in ``Request``. ``cache`` is the folder of built engines and of what was measured here,
        by default $FIELDFIT_CACHE or ~/.cache/fieldfit. The first opening on a device builds and
        measures, which can take minutes with TensorRT.

        Raises BundleError if a byte that it needs is not as the manifest says (`fieldfit verify`
        looks at all), EngineError if nothing can run it here.
        """
        # A device runs one form of several; the others are verified if it ever turns to them.
        bundle = Bundle.open(path, whole=False)
        check_runtime(bundle)
        request = Request(engine, form, require, threads, device)
        plans = PlanCache(Path(cache)) if cache else PlanCache.default()
        return cls(bundle, choose_engine(bundle, request, cache=plans))

    @property
    def reasons(self) -> list[str]:
        """One sentence for each candidate engine, in the order they were tried."""
        return [str(step) for step in self.steps]

    @property
    def adaptation(self) -> Adaptation:
        """How the model was adapted to the field, and whether that is verified."""
        return self.bundle.manifest.adaptation

    @overload
    def __call__(self, images: ImageLike) -> Answer: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, images: Sequence[ImageLike]) -> list[Answer]: ...
    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Answer | list[Answer]:
        """Classify a path, encoded bytes, a PIL image or an array; or a list of them.

        Arrays are uint8 or uint16, ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` RGB or RGBA.

        Raises DataError, naming the image, if one cannot be read.
        """
        if isinstance(images, list | tuple):
            return list(self.stream(images))
        return self._classify([images])[0]  # type: ignore[list-item]

    def stream(self, images: Sequence[ImageLike]) -> Iterator[Answer]:
        """Classify many images in batches, yielding answers in order as they come."""
        left = iter(images)
        while batch := list(islice(left, BATCH)):
            yield from self._classify(batch)

    def inspect(self, image: ImageLike) -> Inspection:
        """Classify one image, as a call does, and give back what the model saw of it.

        Raises DataError if it cannot be read.
        """
        start = time.perf_counter()
        batch = preprocess_batch([image], self.bundle.manifest.input)
        prepared = time.perf_counter()
        outputs = self.engine.infer(batch)
        times = start, prepared, time.perf_counter()
        (answer,) = self._answers(outputs.logits, times)
        return Inspection(answer, batch[0], outputs.features[0], self)

    def _classify(self, images: list[ImageLike]) -> list[Answer]:
        start = time.perf_counter()
        batch = preprocess_batch(images, self.bundle.manifest.input)
        prepared = time.perf_counter()
        logits = self.engine.infer(batch).logits
        return self._answers(logits, (start, prepared, time.perf_counter()))

    def _answers(
        self, logits: npt.NDArray[np.float32], times: tuple[float, float, float]
    ) -> list[Answer]:
        """Answers to logits ``[N, K]``; ``times`` are those of start, prepared and done."""
        start, prepared, done = times
        probabilities = metrics.softmax(logits, temperature=self.bundle.manifest.temperature)
        milliseconds = {
            "preprocess": (prepared - start) * 1e3 / len(logits),
            "infer": (done - prepared) * 1e3 / len(logits),
        }
        return [self._answer(row, milliseconds) for row in probabilities.tolist()]

    def _answer(self, probabilities: list[float], milliseconds: dict[str, float]) -> Answer:
        score = max(probabilities)
        return Answer(
            label=self._labels[probabilities.index(score)],
            score=score,
            abstained=score < self.bundle.manifest.abstain_below,
            probabilities=dict(zip(self._labels, probabilities, strict=True)),
            milliseconds=milliseconds,
        )

    def poll(self) -> None:
        """Nothing: a bundle that was opened by its path does not change between two frames."""

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def __enter__(self) -> "Classifier":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_runtime(bundle: Bundle) -> None:
    """Raises BundleError if ``bundle`` needs a newer fieldfit than this one."""
    needed = bundle.manifest.minimum_runtime
    if _numbers(needed) > _numbers(__version__):
        raise BundleError(
            f"{bundle.path}: needs fieldfit {needed} or newer, this is {__version__}; update "
            "fieldfit on this device"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
