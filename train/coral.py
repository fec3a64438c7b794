"""CORAL on cached features, in closed form: source features in the field's first two moments.

For a field without labels: a head fitted on them has seen features spread like the field's. It
knows features only, neither images nor the network.

Sun, Feng and Saenko, "Return of Frustratingly Easy Domain Adaptation", AAAI 2016.
"""

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.floating]
Float64 = npt.NDArray[np.float64]

CHUNK = 4096


def recolour(source: Features, target: Features, *, ridge: float = 1.0) -> npt.NDArray[np.float32]:
    """``source [N, D]``, whitened with its own covariance and coloured with that of ``target``.

    ``ridge`` times the mean variance of the source's features is added to both diagonals: of a
    few hundred images most directions of a 1,280-dimensional covariance are noise. The mean is
    moved to the target's as well.
    """
    source_mean, source_covariance = _moments(source)
    target_mean, target_covariance = _moments(target)
    floor = ridge * float(np.trace(source_covariance)) / len(source_covariance)
    transform = _power(source_covariance, floor, -0.5) @ _power(target_covariance, floor, 0.5)
    result = (source.astype(np.float64) - source_mean) @ transform + target_mean
    return result.astype(np.float32)


def _moments(features: Features) -> tuple[Float64, Float64]:
    """Mean ``[D]`` and covariance ``[D, D]``, read in chunks."""
    count, width = features.shape
    parts = [slice(i, i + CHUNK) for i in range(0, count, CHUNK)]
    mean = sum(features[p].astype(np.float64).sum(axis=0) for p in parts) / count
    covariance = np.zeros((width, width))
    for part in parts:
        centred = features[part].astype(np.float64) - mean
        covariance += centred.T @ centred
    return mean, covariance / max(1, count - 1)


def _power(covariance: Float64, floor: float, exponent: float) -> Float64:
    values, vectors = np.linalg.eigh(covariance)
    scaled = (np.maximum(values, 0.0) + floor) ** exponent
    return np.asarray((vectors * scaled) @ vectors.T)
