"""Honest latency on this machine: warm-up, interleaved runs, percentiles, ratios.

Shared machines drift, so engines are timed in turn (A B A B ...) and compared pair by pair; a
single absolute time is never the claim.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime import metrics
from runtime.engines.engine import Engine


class Timing(NamedTuple):
    """How long one call of an engine takes; times are of the process, in milliseconds."""

    form: str
    batch: int
    wall_ms: dict[str, float]
    """p50, p90, p99 and max of the wall time of one call."""
    cpu_ms: float
    """Median CPU time of one call, all threads together: blind to other processes."""
    relative_speed: float
    """Median over the rounds of the first engine's CPU time divided by this one's."""


def interleave(
    engines: Sequence[Engine],
    images: npt.NDArray[np.uint8],
    *,
    seconds: float = 3.0,
    warmup: int = 3,
    most_rounds: int = 1000,
) -> list[Timing]:
    """Time ``engines`` in turn on ``images`` uint8 ``[N, H, W, C]``, about ``seconds`` in all.

    Speeds are relative to the first engine. At least three rounds are run.
    """
    for engine in engines:
        for _ in range(warmup):
            engine.infer(images)
    wall: list[list[float]] = [[] for _ in engines]
    cpu: list[list[float]] = [[] for _ in engines]
    end = time.perf_counter() + seconds
    for round_ in range(most_rounds):
        if round_ >= 3 and time.perf_counter() >= end:
            break
        for index, engine in enumerate(engines):
            cpu_start, start = time.process_time(), time.perf_counter()
            engine.infer(images)
            wall[index].append(time.perf_counter() - start)
            cpu[index].append(time.process_time() - cpu_start)
    first = np.array(cpu[0])
    return [
        Timing(
            form=engine.form,
            batch=len(images),
            wall_ms=metrics.percentiles_ms(np.array(wall[index])),
            cpu_ms=float(np.median(cpu[index]) * 1e3),
            relative_speed=float(np.median(first / np.maximum(cpu[index], 1e-9))),
        )
        for index, engine in enumerate(engines)
    ]
