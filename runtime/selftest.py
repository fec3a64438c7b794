"""Replay the golden samples of a bundle on an engine and say whether it still answers as proven.

The expected logits were recorded for the same form where the bundle was made. Another processor
may round differently, so equality is asked of the answers and closeness of the logits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime import metrics
from runtime.engines.engine import Engine

MIN_SQNR_DB = 25.0
"""Rounding in another order costs INT8 logits 30 dB at most; a wrong kernel leaves under 10."""

NARROW_MARGIN = 0.05
"""A golden answer whose lead is below this share of the largest logit may turn by rounding."""


class SelfTest(NamedTuple):
    """The verdict and what it rests on."""

    passed: bool
    reason: str
    samples: int
    agreement: float
    sqnr_db: float


class Opened(NamedTuple):
    """An engine that answered the golden samples as proven."""

    engine: Engine
    selftest: SelfTest
    how: str = ""
    """Where it comes from, if there is something to say."""


Prove = Callable[[Engine], SelfTest]
"""Replays the golden samples; raises EngineError if the engine does not answer as proven."""


def replay(engine: Engine, golden: dict[str, npt.NDArray[Any]]) -> SelfTest:
    """Run the golden images on ``engine`` and compare with the logits recorded for its form.

    ``golden`` is what ``Bundle.golden`` returns. Raises EngineError if the engine cannot run.
    """
    images = golden["images"]
    expected = golden.get(f"logits.{engine.form}")
    if expected is None:
        return SelfTest(False, f"the bundle has no golden logits for {engine.form}", 0, 0.0, 0.0)
    rows = [engine.infer(images[index : index + 1]).logits for index in range(len(images))]
    return judge(expected, np.concatenate(rows))


def judge(expected: npt.NDArray[Any], got: npt.NDArray[Any]) -> SelfTest:
    """Compare logits ``[N, K]`` with the golden ones; a pure decision that gives its reason."""
    samples = len(expected)
    if got.shape != expected.shape:
        reason = f"expected logits {list(expected.shape)}, got {list(got.shape)}"
        return SelfTest(False, reason, samples, 0.0, 0.0)
    if not np.isfinite(got).all():
        return SelfTest(False, "the logits are not finite (NaN or overflow)", samples, 0.0, 0.0)
    agreement = metrics.agreement(expected, got)
    sqnr = min(metrics.sqnr_db(expected, got), 200.0)
    ordered = np.sort(expected, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > NARROW_MARGIN * np.abs(expected).max()
    turned = int(np.sum(clear & (expected.argmax(axis=1) != got.argmax(axis=1))))
    if turned:
        reason = f"{turned} of {samples} golden answers differ"
    elif sqnr < MIN_SQNR_DB:
        reason = f"golden logits differ: {sqnr:.1f} dB, at least {MIN_SQNR_DB:.0f} are expected"
    else:
        reason = f"{samples} golden samples agree ({sqnr:.0f} dB)"
        return SelfTest(True, reason, samples, agreement, sqnr)
    return SelfTest(False, reason, samples, agreement, sqnr)
