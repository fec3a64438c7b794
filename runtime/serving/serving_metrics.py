"""What a service counts, as Prometheus metrics. It knows no HTTP and no engine.

Counts are plain numbers: the loop's thread and the engine's write different ones.
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Sequence

from runtime.exposition import engine_metrics, heading, metric, sample
from runtime.serving.gate import Gate
from runtime.serving.model import Served

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_IMAGES = (1, 2, 4, 8, 16)


class Histogram:
    """Counts of values up to each of some bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def text(self, name: str, meaning: str) -> str:
        """The metric ``fieldfit_NAME``."""
        totals = list(itertools.accumulate(self._counts))
        bounds = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        return "".join(
            [
                heading(name, "histogram", meaning),
                *(
                    sample(f"{name}_bucket", {"le": bound}, total)
                    for bound, total in zip(bounds, totals, strict=True)
                ),
                sample(f"{name}_sum", {}, self._sum),
                sample(f"{name}_count", {}, totals[-1]),
            ]
        )


class ServingMetrics:
    """The counts of one service."""

    def __init__(self) -> None:
        self.responses: Counter[int] = Counter()
        """By status."""
        self.refused: Counter[str] = Counter()
        """By the word of the refusal."""
        self.request_seconds = Histogram(_SECONDS)
        self._batch_images = Histogram(_IMAGES)
        self._batch_seconds = Histogram(_SECONDS)
        self._images = 0
        self._failed = 0

    def batch(self, images: int, seconds: float) -> None:
        """Count one call of the engine."""
        self._images += images
        self._batch_images.observe(images)
        self._batch_seconds.observe(seconds)

    def failed(self) -> None:
        """Count a batch that the engine failed on."""
        self._failed += 1

    def text(self, served: Served, gate: Gate) -> str:
        """All of them, in Prometheus' text format."""
        info = {"bundle": served.manifest.name, "bundle_version": served.manifest.version}
        return "".join(
            [
                engine_metrics(served.manifest, served.choice),
                metric("serve_model_info", "gauge", "The bundle that answers.", [(info, 1)]),
                metric(
                    "serve_responses_total", "counter", "Responses by HTTP status.",
                    [({"code": str(code)}, n) for code, n in sorted(self.responses.items())],
                ),
                metric(
                    "serve_refused_total", "counter", "Requests that got no answer, and why.",
                    [({"reason": word}, n) for word, n in sorted(self.refused.items())],
                ),
                self.request_seconds.text(
                    "serve_request_duration_seconds",
                    "Whole requests for answers, from their last byte to the answer.",
                ),
                metric("serve_images_total", "counter", "Images answered.", [({}, self._images)]),
                self._batch_images.text("serve_batch_images", "Images in one call of the engine."),
                self._batch_seconds.text(
                    "inference_duration_seconds", "One call of the engine."
                ),
                metric(
                    "serve_failed_batches_total", "counter", "Batches that the engine failed on.",
                    [({}, self._failed)],
                ),
                metric(
                    "serve_waiting_requests", "gauge", "Whole requests that wait.",
                    [({}, gate.taken)],
                ),
                metric(
                    "serve_places", "gauge", "Whole requests that may wait.",
                    [({}, gate.limits.places)],
                ),
                metric(
                    "serve_held_bytes", "gauge", "Bytes of bodies and decoded images.",
                    [({}, gate.held)],
                ),
            ]
        )  # fmt: skip
