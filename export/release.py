"""``release.json``: how a bundle came to be, every form and every rung with its figures.

It holds what was found; it decides nothing.
"""

import hashlib
from collections.abc import Iterable

import msgspec

from export.engines import EngineProof
from export.selective import Abstention
from runtime.bundle import Bundle
from runtime.dataset import Split
from runtime.errors import BundleError
from runtime.manifest import Adaptation, Quality
from runtime.recipe import GateSettings

RELEASE = "release.json"
"""Its name, beside the bundle and in it."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One rung of a form's precision ladder."""

    form: str
    rung: str = ""
    kept_float: dict[str, str] = {}
    """Layers that were left float on purpose, each with the reason."""
    made: str = ""
    """What was tried for its accuracy, and kept or reverted."""
    split: Split = "test"
    """The images that it was judged on last: an attempt that fails on validation images, which
    choose the rung, is not shown the test images, which prove it."""
    quality: Quality
    """On those."""
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
    """Against fp32 on onnxruntime CPU, one thread, batch 1, interleaved CPU time. A form below 1
    is not chosen on processors of this architecture."""
    cpu_ms: dict[str, float] = {}
    """p50, p90, p99 and max of one call there, in milliseconds of wall time."""


class ReferenceReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a device compares its field with, and how often it would notice what is not there."""

    images: int
    """Held-out field images in it."""
    limits_from: int
    """Images that limits of image quality were learned from."""
    flagged: float
    """Share of the test images on which those limits notice something; nothing is wrong there."""
    alarmed: float
    """Share on which they alarm."""

    def __str__(self) -> str:
        return (
            f"{self.images} held-out images; image quality by {self.limits_from} images, notices "
            f"something on {self.flagged:.1%} of the test images and alarms on {self.alarmed:.1%}"
        )


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
    """Of every image that the recipe uses, with label and split."""
    judged_sha256: str = ""
    """Of the images that the forms were judged on, with their labels: see judged_sha256()."""
    gate: GateSettings = GateSettings()
    """The budgets that they were judged by."""
    abstention: Abstention | None = None
    """Below which score a device abstains, and why."""
    statistics: ReferenceReport | None = None
    """What a device compares its field with."""
    seed: int
    seconds: float
    machine: str
    versions: dict[str, str]
    git: str | None

    @property
    def archive(self) -> str:
        """File name of the bundle's zip."""
        return f"{self.name}-{self.version}.zip"


def judged_sha256(examples: Iterable[tuple[str, str | None]]) -> str:
    """Digest of images, each by the digest of its file's bytes and its label; order is nothing."""
    lines = sorted(f"{sha256} {label or ''}\n" for sha256, label in examples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def encode_release(release: Release) -> bytes:
    """``release.json``: readable, one field a line."""
    return msgspec.json.format(msgspec.json.encode(release), indent=1)


def read_release(bundle: Bundle) -> Release:
    """The release that ``bundle`` carries.

    Raises BundleError if it carries none, or one that this fieldfit does not understand.
    """
    if RELEASE not in {entry.name for entry in bundle.manifest.files}:
        raise BundleError(
            f"{bundle.path}: expected {RELEASE} in the bundle, which records budgets and images; "
            "there is none: export again with this fieldfit"
        )
    try:
        return msgspec.json.decode(bundle.read(RELEASE), type=Release)
    except msgspec.DecodeError as error:
        raise BundleError(
            f"{bundle.path}: {RELEASE}: {error}; use the fieldfit that wrote it, or export again"
        ) from error
