"""``release.json``: how a bundle came to be, every form and every rung with its figures.

It holds what was found; it decides nothing.
"""

import msgspec

from export.engines import EngineProof
from runtime.manifest import Adaptation, Quality


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One rung of a form's precision ladder."""

    form: str
    kept_float: tuple[str, ...]
    """Convolutions that were left float on purpose."""
    quality: Quality
    passed: bool
    reason: str


class FormReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one form; the last attempt is the one that was released, if any was."""

    form: str
    released: bool
    reason: str
    bytes: int
    attempts: tuple[Attempt, ...]
    engine: EngineProof | None = None
    kernels: dict[str, int] = {}
    """Operators that onnxruntime runs after its own optimisation (int8-cpu)."""
    relative_speed: float | None = None
    """Against fp32 on onnxruntime CPU, one thread, batch 1, interleaved CPU time."""


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """``release.json``: how the bundle came to be."""

    name: str
    version: str
    field: str
    """The domain that artifacts were judged on: its test images."""
    adaptation: Adaptation
    """As in the bundle's manifest."""
    reference: Quality
    """The torch checkpoint itself on the same images."""
    parity_db: float
    forms: tuple[FormReport, ...]
    checkpoint_sha256: str
    recipe_sha256: str
    dataset_sha256: str
    seed: int
    seconds: float
    machine: str
    versions: dict[str, str]
    git: str | None
