"""Bundles of a few kilobytes, to measure and test how bundles travel: whole, but no models."""

import hashlib
import io
from pathlib import Path

import numpy as np

from runtime.bundle import MANIFEST, encode_zip
from runtime.manifest import FORMAT, Adaptation, Artifact, FileEntry, Manifest, Quality, encode
from runtime.preprocess import InputSpec


def small_zip(folder: Path, version: str = "1.0.0", *, size: int = 5000) -> Path:
    """Write ``small-VERSION.zip`` to ``folder``; its graph is ``size`` bytes that are no graph."""
    golden = io.BytesIO()
    np.savez(golden, images=np.zeros((1, 32, 32, 1), np.uint8))
    random = np.random.default_rng(int.from_bytes(version.encode(), "big") % 2**32)
    files = {"fp32.onnx": random.bytes(size), "golden.npz": golden.getvalue()}
    entries = [
        FileEntry(name=name, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        for name, data in files.items()
    ]
    quality = Quality(samples=1, labelled=1, agreement=1.0, sqnr_db=200.0)
    manifest = Manifest(
        format=FORMAT,
        name="small",
        version=version,
        labels=("good", "bad"),
        input=InputSpec(size=(32, 32), channels=1),
        adaptation=Adaptation(rung="as is", verified=True, reason="a test", labels_used=0),
        artifacts=(Artifact(form="fp32", file="fp32.onnx", quality=quality),),
        files=tuple(entries),
        golden="golden.npz",
        recipe_sha256="0" * 64,
        checkpoint_sha256="0" * 64,
    )
    path = folder / f"small-{version}.zip"
    path.write_bytes(encode_zip({MANIFEST: encode(manifest), **files}))
    return path
