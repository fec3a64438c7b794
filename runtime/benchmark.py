"""Honest latency on this machine: settled turns, interleaved, percentiles, ratios.

Shared machines drift, so engines take turns (A B A B ...) and are compared round by round; a
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
    """Median over the rounds of the first engine's time divided by this one's: CPU time on a CPU,
    wall time on a GPU, for which the CPU only waits."""


def interleave(
    engines: Sequence[Engine],
    images: npt.NDArray[np.uint8],
    *,
    seconds: float = 3.0,
    calls: int = 6,
    settle: int = 2,
    least_rounds: int = 3,
) -> list[Timing]:
    """Time ``engines`` in turns on ``images`` uint8 ``[N, H, W, C]``, about ``seconds`` in all.

    A turn is ``settle`` calls that are not counted and ``calls`` that are: a device runs one model
    again and again, and right after another model the caches are still the other's. Speeds are
    relative to the first engine, round by round.
    """
    wall: list[list[float]] = [[] for _ in engines]
    cpu: list[list[float]] = [[] for _ in engines]
    turns: list[list[float]] = [[] for _ in engines]
    end = time.perf_counter() + seconds
    while len(cpu[0]) < least_rounds or time.perf_counter() < end:
        for index, engine in enumerate(engines):
            for _ in range(settle):
                engine.infer(images)
            cpu_start = time.process_time()
            for _ in range(calls):
                start = time.perf_counter()
                engine.infer(images)
                wall[index].append(time.perf_counter() - start)
            cpu[index].append((time.process_time() - cpu_start) / calls)
            turns[index].append(sum(wall[index][-calls:]))
    compared = np.array(cpu if engines[0].provider == "cpu" else turns)
    speeds = np.median(compared[0] / np.maximum(compared, 1e-9), axis=1)
    return [
        Timing(
            form=engine.form,
            batch=len(images),
            wall_ms=metrics.percentiles_ms(np.array(wall[index])),
            cpu_ms=float(np.median(cpu[index]) * 1e3),
            relative_speed=float(speeds[index]),
        )
        for index, engine in enumerate(engines)
    ]
