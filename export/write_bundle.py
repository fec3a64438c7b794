"""Lay the bundle down: a folder and the zip of it, both whole or not at all.

It opens what it wrote as a device would before it calls it done.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime import atomic
from runtime.bundle import MANIFEST, Bundle, encode_zip
from runtime.manifest import FORMAT, Adaptation, Artifact, FileEntry, Manifest, encode
from runtime.monitoring.reference import REFERENCE
from runtime.recipe import Recipe
from runtime.version import __version__
from train.checkpoint import CheckpointFacts

GOLDEN = "golden.npz"


def encode_golden(
    images: npt.NDArray[np.uint8], logits: Mapping[str, npt.NDArray[np.float32]]
) -> bytes:
    """Golden samples as npz bytes: ``images`` and ``logits.FORM``."""
    buffer = io.BytesIO()
    arrays = {f"logits.{form}": values for form, values in logits.items()}
    np.savez(buffer, images=images, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def adaptation_of(facts: CheckpointFacts) -> Adaptation:
    """What the checkpoint says about its adaptation, in the bundle's words."""
    return Adaptation(
        rung=facts.rung,
        verified=facts.verified,
        reason=facts.adaptation,
        labels_used=facts.labels_used,
    )


def make_manifest(
    recipe: Recipe,
    facts: CheckpointFacts,
    checkpoint_sha256: str,
    artifacts: Sequence[Artifact],
    files: Mapping[str, bytes],
    *,
    abstain_below: float = 0.0,
) -> Manifest:
    """The manifest of a bundle with these ``files``, without its digest."""
    return Manifest(
        format=FORMAT,
        name=recipe.name,
        version=recipe.export.version,
        labels=facts.classes,
        input=facts.input,
        adaptation=adaptation_of(facts),
        artifacts=tuple(artifacts),
        files=tuple(
            FileEntry(name=name, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
            for name, data in sorted(files.items())
        ),
        golden=GOLDEN,
        temperature=facts.temperature,
        abstain_below=abstain_below,
        ok_labels=recipe.export.ok,
        reference=REFERENCE if REFERENCE in files else None,
        minimum_runtime=__version__,
        required_provider=recipe.export.require,
        recipe_sha256=recipe.sha256,
        checkpoint_sha256=checkpoint_sha256,
    )


def write_bundle(
    folder: Path, archive: Path, manifest: Manifest, files: Mapping[str, bytes]
) -> None:
    """Write ``folder`` and ``archive``, replacing older ones.

    Each is opened as a device would before it takes the place of the older one.
    """
    contents = {MANIFEST: encode(manifest), **files}
    with (
        atomic.replacing_file(archive) as packed,
        atomic.replacing_folder(folder) as unpacked,
    ):
        packed.write_bytes(encode_zip(contents))
        Bundle.open(packed)
        for name, data in contents.items():
            (unpacked / name).write_bytes(data)
        Bundle.open(unpacked)
