"""Judge what an aarch64 machine answered: pure decisions on arrays and facts, with reasons.

It starts no process and reads no file.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime import metrics
from runtime.selftest import MIN_SQNR_DB, NARROW_MARGIN

Logits = npt.NDArray[np.floating]


class Tolerance(NamedTuple):
    """How far logits may be from those of x86."""

    min_sqnr_db: float
    max_difference: float | None
    """Largest difference of one logit, as a share of the largest logit; None if any will do."""


_FLOAT = Tolerance(100.0, 1e-5)
_ROUNDED = Tolerance(30.0, NARROW_MARGIN / 2)
"""Differences of up to half of the lead that makes an answer clear cannot turn it."""
_ELSEWHERE = Tolerance(MIN_SQNR_DB, None)
"""As a device's own self-test: TensorRT's forms, which no negotiation offers on a CPU."""

TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": _FLOAT,
    "int8-cpu": _ROUNDED,
    "fp16": _ELSEWHERE,
    "int8": _ELSEWHERE,
    "int8-fp16": _ELSEWHERE,
}
"""What each allows and why is in docs/arm64.md."""

MAX_PROBABILITY_DIFFERENCE = 0.02
"""Of one answer of ``fieldfit classify``; the default bundle's answers stay below it."""


class Row(NamedTuple):
    """One form, compared."""

    form: str
    sqnr_db: float
    max_difference: float
    """As a share of the largest logit."""
    agreement: float
    """Share of golden images with the same answer."""
    clear: int
    """Golden images whose answer has a lead that rounding cannot turn."""
    clear_turned: int
    """Clear answers that differ all the same."""
    samples: int
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        """Whether every clear answer agrees, and the logits are within the tolerance."""
        most = self.tolerance.max_difference
        return (
            self.clear_turned == 0
            and self.sqnr_db >= self.tolerance.min_sqnr_db
            and (most is None or self.max_difference <= most)
        )


class Check(NamedTuple):
    """One thing that must hold, and what was seen."""

    name: str
    passed: bool
    reason: str


def compare(form: str, expected: Logits, got: Logits) -> Row:
    """Compare the logits ``[N, K]`` of one form with ``expected``, those of x86."""
    if got.shape != expected.shape:
        raise ValueError(f"{form}: expected logits {expected.shape}, got {got.shape}")
    largest = float(np.abs(expected).max())
    ordered = np.sort(expected, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > NARROW_MARGIN * largest
    turned = expected.argmax(axis=1) != got.argmax(axis=1)
    return Row(
        form=form,
        sqnr_db=min(metrics.sqnr_db(expected, got), 200.0),
        max_difference=float(np.abs(expected - got).max()) / largest,
        agreement=metrics.agreement(expected, got),
        clear=int(clear.sum()),
        clear_turned=int((clear & turned).sum()),
        samples=len(expected),
        tolerance=TOLERANCES[form],
    )


def reason(row: Row) -> str:
    """What was seen, against what is allowed."""
    if row.clear_turned:
        return f"{row.clear_turned} of {row.clear} clear answers differ"
    if row.max_difference == 0:
        return f"equal, bit for bit, on {row.samples} golden images"
    return (
        f"SQNR {row.sqnr_db:.1f} dB, at least {row.tolerance.min_sqnr_db:.0f}; largest difference "
        f"{row.max_difference:.1e} of the largest logit, {_at_most(row)}"
    )


def _at_most(row: Row) -> str:
    most = row.tolerance.max_difference
    return "whatever it is" if most is None else f"at most {most:.1e}"


def table(rows: list[Row]) -> list[str]:
    """Markdown lines of the comparison."""
    return [
        "| form | SQNR, dB | at least | max difference | at most | agreement | clear answers |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row.form} | {'equal' if row.max_difference == 0 else f'{row.sqnr_db:.1f}'} | "
            f"{row.tolerance.min_sqnr_db:.0f} | {row.max_difference:.1e} | "
            f"{_cell(row.tolerance.max_difference)} | {row.agreement:.1%} | "
            f"{row.clear - row.clear_turned} of {row.clear} |"
            for row in rows
        ),
    ]


def _cell(most: float | None) -> str:
    return "any" if most is None else f"{most:.1e}"


def beyond_base(loaded: Mapping[str, str], lock: str) -> dict[str, str]:
    """Modules of ``loaded`` (module -> distribution) that the base install does not account for.

    ``lock`` is the text of requirements/device.txt.
    """
    base = base_distributions(lock)
    return {module: owner for module, owner in loaded.items() if owner.lower() not in base}


def base_distributions(lock: str) -> frozenset[str]:
    """Names of the distributions that ``lock``, the text of requirements/device.txt, allows."""
    return frozenset({"fieldfit", *re.findall(r"^([A-Za-z0-9._-]+)==", lock, re.MULTILINE)})


def different(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> str:
    """Why two lists of ``fieldfit classify --json`` differ; empty if they do not.

    Labels must be equal, and probabilities within MAX_PROBABILITY_DIFFERENCE.
    """
    if len(expected) != len(got) or not expected:
        return f"expected {len(expected)} answers, got {len(got)}"
    for one, other in zip(expected, got, strict=True):
        name = one["path"].rpartition("/")[2]
        if one["label"] != other["label"]:
            return f"{name}: expected {one['label']}, got {other['label']}"
        for label, probability in one["probabilities"].items():
            found = other["probabilities"][label]
            if abs(probability - found) > MAX_PROBABILITY_DIFFERENCE:
                return f"{name}: expected {label} at {probability:.4f}, got {found:.4f}"
    return ""
