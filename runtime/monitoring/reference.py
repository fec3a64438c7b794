"""The reference statistics of a bundle: how held-out field images looked and were answered.

``reference.npz``: made by export, read by a device, compared with what it sees by drift and
image_quality. It does not know how to compare.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.monitoring.image_quality import Limits

Float32 = npt.NDArray[np.float32]

REFERENCE = "reference.npz"


class Reference(NamedTuple):
    """What a bundle knows of its field."""

    labels: tuple[str, ...]
    probabilities: Float32
    """``[M, K]`` of M held-out field images, after temperature scaling."""
    centre: Float32
    """``[D]``: subtracted from features before they are projected."""
    basis: Float32
    """``[D, P]``: projects them; fitted on training images, so that held-out ones are new to it."""
    features: Float32
    """``[M, P]`` of the same images, projected."""
    limits: dict[str, Limits]
    """Of image_quality, by statistic."""

    def project(self, features: Float32) -> Float32:
        """Features ``[D]`` or ``[N, D]`` in the coordinates of ``features``."""
        return np.asarray((features - self.centre) @ self.basis, dtype=np.float32)


def read_reference(bundle: Bundle) -> Reference | None:
    """The reference of ``bundle``; None if it has none, as bundles before 0.2 do not.

    Raises BundleError if it is not what a reference should be.
    """
    raise NotImplementedError
