"""What a bundle says about itself: labels, input, files with digests, measured quality.

The manifest's bytes are canonical, one encoding for one content, and end in a digest of
themselves, so that any changed byte is noticed before a field of it is believed.
"""

import hashlib
import re
from typing import Annotated, Literal

import msgspec

from runtime.errors import BundleError
from runtime.preprocess import InputSpec

FORMAT = 1
"""Manifests of a newer format are refused: this fieldfit would not understand them."""

MAX_MANIFEST_BYTES = 1024 * 1024
MAX_FILE_BYTES = 2 * 1024 * 1024 * 1024
MAX_FILES = 64

FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Form = Literal["fp32", "fp16", "int8", "int8-fp16", "int8-cpu"]
Minimum = Literal["tensorrt", "cuda"]
"""The least that a bundle may run on: TensorRT, or any engine on the GPU."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of the bundle; ``size`` in bytes."""

    name: FileName
    sha256: Sha256
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the gate measured on held-out field images, against the checkpoint.

    Shares are in [0, 1]. None stands for "not measurable", e.g. accuracy without labels. Intervals
    are two-sided at 90 %, so that with 95 % confidence nothing is worse than their worse end.
    """

    samples: int
    labelled: int
    agreement: float
    agreement_interval: tuple[float, float] | None = None
    """Wilson's."""
    sqnr_db: float
    """Of the logits against the checkpoint's; capped at 200."""
    accuracy: float | None = None
    accuracy_drop_interval: tuple[float, float] | None = None
    """Paired bootstrap interval of the accuracy lost against the checkpoint; positive is worse."""
    lost: int | None = None
    """Labelled images that only the checkpoint gets right."""
    won: int | None = None
    """Labelled images that only this gets right."""
    p_value: float | None = None
    """McNemar's exact two-sided p of ``lost`` against ``won``: small if they really differ."""
    balanced_accuracy: float | None = None
    worst_recall: float | None = None
    worst_recall_drop_interval: tuple[float, float] | None = None
    """As for accuracy, images drawn within their class."""
    auc: float | None = None


class Adaptation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the model was adapted to the field, and whether that was proven there.

    ``str()`` of it is the one wording that every command shows.
    """

    rung: str
    """The rung of the ladder that was kept, e.g. ``as is`` or ``fine-tuning``."""
    verified: bool
    """Whether enough held-out field labels confirm the choice of the rung."""
    reason: str
    """One sentence: what confirms it, or what is missing."""
    labels_used: Annotated[int, msgspec.Meta(ge=0)]
    """Labelled field images that training used."""

    def __str__(self) -> str:
        labels = "1 field label" if self.labels_used == 1 else f"{self.labels_used} field labels"
        mark = "verified" if self.verified else "UNVERIFIED"
        return f"{self.rung} ({labels}), {mark}: {self.reason}"


class Artifact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One form of the model that passed the gate."""

    form: Form
    file: FileName
    quality: Quality
    relative_speed: float | None = None
    """Images per second over fp32's, onnxruntime CPU, one thread, where it was built."""
    speed_machine: str | None = None
    """Architecture of the processor that ``relative_speed`` is of, e.g. ``x86_64``."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contract between export and every device."""

    format: int
    name: str
    version: str
    labels: tuple[str, ...]
    """In the order of the logits."""
    input: InputSpec
    adaptation: Adaptation
    artifacts: tuple[Artifact, ...]
    files: tuple[FileEntry, ...]
    """Every file of the bundle but the manifest itself."""
    golden: FileName
    """The file of golden samples: ``images`` uint8 [N, H, W, C] and ``logits.FORM`` [N, K]."""
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Divides the logits before softmax."""
    abstain_below: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Answers with a lower score are marked as abstained."""
    ok_labels: tuple[str, ...] = ()
    """Labels of parts that are good; empty if nobody said which those are."""
    reference: FileName | None = None
    """The file of reference statistics (runtime/monitoring/reference.py), if it has one."""
    minimum_runtime: str = "0.1.0"
    required_provider: Minimum | None = None
    """The least that it may run on; a device that cannot is an error there, not a slow answer."""
    recipe_sha256: Sha256
    checkpoint_sha256: Sha256
    digest: str = ""
    """SHA-256 of this manifest with an empty digest; always the last field."""

    def artifact(self, form: str) -> Artifact | None:
        """The artifact of this form, or None if the bundle has none."""
        return next((a for a in self.artifacts if a.form == form), None)


def encode(manifest: Manifest) -> bytes:
    """The canonical bytes of ``manifest``, with its digest filled in."""
    bare = msgspec.structs.replace(manifest, digest="")
    return _canonical(msgspec.structs.replace(bare, digest=_sha256(_canonical(bare))))


def decode(data: bytes) -> Manifest:
    """The manifest in ``data``.

    Raises BundleError if it is too large, of a newer format, not such a manifest, or changed.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"manifest: {len(data):,} bytes, the limit is {MAX_MANIFEST_BYTES:,}")
    try:
        head = msgspec.json.decode(data, type=_FormatOnly)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"manifest: damaged: {error}; copy the bundle again") from error
    if head.format > FORMAT:
        raise BundleError(
            f"manifest: format {head.format} is newer than {FORMAT}, the newest that this fieldfit "
            "reads; update fieldfit on this device"
        )
    # Of the bytes as they are: a manifest from before an optional field was added stays valid.
    end = _END.search(data)
    if end is None or _sha256(data[: end.start(1)] + data[end.end(1) :]) != end[1].decode():
        raise BundleError("manifest: changed since export (its digest differs); copy it again")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"manifest: {error}; copy the bundle again") from error
    return _checked(manifest)


class _FormatOnly(msgspec.Struct):
    format: int


_END = re.compile(rb'"digest": "([0-9a-f]{64})"\n\}\n\Z')


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def _checked(manifest: Manifest) -> Manifest:
    """What the types cannot say."""
    names = [entry.name for entry in manifest.files]
    if len(names) > MAX_FILES or len(set(names)) != len(names) or "manifest.json" in names:
        raise BundleError(f"manifest: expected at most {MAX_FILES} files of different names")
    forms = [artifact.form for artifact in manifest.artifacts]
    if "fp32" not in forms or len(set(forms)) != len(forms):
        raise BundleError(f"manifest: expected fp32 and each form once, got {', '.join(forms)}")
    missing = {a.file for a in manifest.artifacts} | {manifest.golden}
    missing |= {manifest.reference} if manifest.reference else set()
    missing -= set(names)
    if missing:
        raise BundleError(f"manifest: names {', '.join(sorted(missing))} but does not list it")
    if len(manifest.labels) < 2 or len(set(manifest.labels)) != len(manifest.labels):
        raise BundleError("manifest: expected two or more different labels")
    if unknown := sorted(set(manifest.ok_labels) - set(manifest.labels)):
        raise BundleError(f"manifest: ok_labels names {', '.join(unknown)}, which is no label")
    return manifest
