"""The reference statistics of a bundle: how held-out field images looked and were answered.

``reference.npz`` is made by export and read by a device; drift and image_quality compare what they
see with it. It does not know how to compare.
"""

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.monitoring.image_quality import Limits
from runtime.npz import read_npz

Float32 = npt.NDArray[np.float32]

REFERENCE = "reference.npz"

_LIMITS = "limits."


class Projection(NamedTuple):
    """From many features to few numbers that two-sample tests can be made of."""

    centre: Float32
    """``[D]``: subtracted from features first."""
    basis: Float32
    """``[D, P]``: orthogonal directions, each as long as makes its coordinate of unit variance."""
    scale: float
    """What is left of features outside those directions is this long, on average."""

    def __call__(self, features: Float32) -> Float32:
        """Features ``[N, D]`` as ``[N, P + 1]``: P coordinates, and the length of what is left."""
        centred = features - self.centre
        coordinates = centred @ self.basis
        lengths = np.square(self.basis).sum(axis=0)
        inside = np.square(coordinates) @ (1 / lengths)
        left = np.sqrt(np.maximum(0.0, np.square(centred).sum(axis=1) - inside))
        return np.column_stack([coordinates, left / self.scale]).astype(np.float32)


class Reference(NamedTuple):
    """What a bundle knows of its field."""

    labels: tuple[str, ...]
    probabilities: Float32
    """``[M, K]`` of M held-out field images, after temperature scaling."""
    projection: Projection
    """Fitted on training images, so that held-out images are as new to it as a device's."""
    features: Float32
    """``[M, P + 1]`` of the same images, projected."""
    limits: dict[str, Limits]
    """Of image_quality, by statistic."""


def encode(reference: Reference) -> bytes:
    """The bytes of ``reference.npz``; the labels are the manifest's."""
    projection = reference.projection
    arrays = {
        "probabilities": reference.probabilities,
        "features": reference.features,
        "centre": projection.centre,
        "basis": projection.basis,
        "scale": np.array([projection.scale]),
        **{_LIMITS + name: np.array(limits) for name, limits in reference.limits.items()},
    }
    buffer = io.BytesIO()
    # In C order: a device reads no other.
    plain = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    np.savez(buffer, **plain)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_reference(bundle: Bundle) -> Reference | None:
    """The reference of ``bundle``; None if it has none: older bundles do not.

    Raises BundleError if it is not what a reference should be.
    """
    manifest = bundle.manifest
    if manifest.reference is None:
        return None
    try:
        return _decode(bundle.read(manifest.reference), manifest.labels)
    except (ValueError, LookupError) as error:
        raise BundleError(
            f"{bundle.path}: {manifest.reference} cannot be read: {error}; export it again"
        ) from error


def _decode(data: bytes, labels: tuple[str, ...]) -> Reference:
    arrays = read_npz(data)
    probabilities, features = arrays["probabilities"], arrays["features"]
    centre, basis, scale = arrays["centre"], arrays["basis"], arrays["scale"]
    limits = {
        name.removeprefix(_LIMITS): Limits(*_numbers(values, "limits", 4).tolist())
        for name, values in arrays.items()
        if name.startswith(_LIMITS)
    }
    for name in ("probabilities", "features", "centre", "basis", "scale"):
        _numbers(arrays[name], name)
    samples, wide = len(probabilities), basis.shape[-1]
    expected = {
        "probabilities": (samples, len(labels)),
        "features": (samples, wide + 1),
        "centre": basis.shape[:1],
        "basis": (*centre.shape[:1], wide),
        "scale": (1,),
    }
    for name, shape in expected.items():
        if arrays[name].shape != shape or not samples:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(arrays[name].shape)}")
    return Reference(
        labels, probabilities, Projection(centre, basis, float(scale[0])), features, limits
    )


def _numbers(
    values: npt.NDArray[np.floating], name: str, count: int | None = None
) -> npt.NDArray[np.floating]:
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite numbers")
    if count is not None and values.shape != (count,):
        raise ValueError(f"{name}: expected {count} numbers, got {list(values.shape)}")
    return values
