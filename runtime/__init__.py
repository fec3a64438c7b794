"""Run a proven image classifier on a device: verify, choose an engine, answer.

This room is the ground floor: it imports no other room and no torch.
"""

from runtime.bundle import Bundle
from runtime.classifier import Answer, Classifier
from runtime.errors import FieldfitError
from runtime.manifest import Manifest
from runtime.preprocess import InputSpec
from runtime.version import __version__

__all__ = [
    "Answer",
    "Bundle",
    "Classifier",
    "FieldfitError",
    "InputSpec",
    "Manifest",
    "__version__",
]
