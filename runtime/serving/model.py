"""What answers: one bundle, or the slots of this device, behind one seam. It knows no HTTP.

A model is polled between batches and used by one thread. A slot on trial answers through
``LiveClassifier``, which counts and steps back: here the first image of each batch is its frame.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from runtime.candidates import Request
from runtime.choose import Choice
from runtime.classifier import Classifier
from runtime.delivery.live import LiveClassifier
from runtime.engines.engine import Outputs, UInt8
from runtime.errors import EngineError
from runtime.manifest import Manifest


class Served(NamedTuple):
    """What answers at the moment, for others to look at."""

    manifest: Manifest
    choice: Choice

    @property
    def on_gpu(self) -> bool:
        """Whether a batch costs hardly more than one image."""
        return self.choice.engine.provider != "cpu"


class Model(Protocol):
    """What a batcher asks; for one thread."""

    @property
    def served(self) -> Served:
        """What answers now."""

    def poll(self) -> None:
        """Between two batches: take over a new slot, if one is ready."""

    def infer(self, images: UInt8) -> Outputs:
        """Run ``images``, uint8 ``[N, H, W, C]``. Raises EngineError."""

    def close(self) -> None:
        """Free the engine."""


class BundleModel:
    """One bundle, from the start to the end."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self.served = _served(classifier)

    def poll(self) -> None:
        """Nothing changes."""

    def infer(self, images: UInt8) -> Outputs:
        """Run ``images``, uint8 ``[N, H, W, C]``. Raises EngineError."""
        return _finite(self._classifier, images)

    def close(self) -> None:
        """Free the engine."""
        self._classifier.close()


class SlotModel:
    """The slots of this device, as they change."""

    def __init__(self, live: LiveClassifier) -> None:
        self._live = live

    @property
    def served(self) -> Served:
        """What answers now."""
        return _served(self._live.classifier)

    def poll(self) -> None:
        """Take over a new slot, if one is ready."""
        self._live.poll()

    def infer(self, images: UInt8) -> Outputs:
        """Run ``images``, uint8 ``[N, H, W, C]``. Raises EngineError."""
        if self._live.on_trial:
            self._live(images[0])
        try:
            return _finite(self._live.classifier, images)
        except EngineError:
            if not self._live.on_trial:
                raise
            for image in images:  # the one that it fails on ends the trial
                self._live(image)
            return _finite(self._live.classifier, images)

    def close(self) -> None:
        """Free the engines."""
        self._live.close()


def open_bundle(path: Path, request: Request, cache: Path | None) -> Callable[[], Model]:
    """How to open the bundle at ``path``; raises as ``Classifier.open`` does."""
    return lambda: BundleModel(Classifier.open(path, **request._asdict(), cache=cache))


def open_slots(state: Path, request: Request) -> Callable[[], Model]:
    """How to open the slots of the state folder; raises as ``LiveClassifier`` does."""
    return lambda: SlotModel(LiveClassifier(state, request=request))


def _served(classifier: Classifier) -> Served:
    choice = Choice(classifier.engine, classifier.selftest, classifier.steps)
    return Served(classifier.bundle.manifest, choice)


def _finite(classifier: Classifier, images: UInt8) -> Outputs:
    outputs = classifier.engine.infer(images)
    if not np.isfinite(outputs.logits).all():
        raise EngineError(f"{classifier.engine}: the answer is not finite (NaN or overflow)")
    return outputs
