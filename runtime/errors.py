"""The few errors a person can act on.

    FieldfitError
    ├── RecipeError   the recipe file says something it must not
    ├── DataError     images or labels are missing, unreadable or contradictory
    ├── ExportError   a graph could not be made, or does not match its checkpoint
    ├── GateError     an artifact was judged and refused
    ├── BundleError   a bundle is not, byte for byte, what its manifest says
    ├── EngineError   no engine can run the bundle here, or it answered wrongly
    ├── UpdateError   an update could not be fetched, trusted or activated
    ├── FleetError    a device's identity or status could not be made, sent, read or trusted
    └── ServeError    the HTTP service cannot be set up as asked

Each message says what was expected, what came, and the way out. Only the ``__main__`` modules
catch them: one line on stderr, exit code 1. Anything else is a bug and keeps its traceback.
"""

from typing import Literal

EngineFault = Literal[
    "missing library",
    "wrong version",
    "no device",
    "refused artifact",
    "not built",
    "failed self-test",
    "too slow",
    "not wanted",
    "failed",
]
"""Why an engine was passed over, in words that a metric can count. ``not wanted`` is a choice of
the user's or the bundle's; ``failed`` is what the library said and no other word fits."""


class FieldfitError(Exception):
    """Base of every error that a user can act on."""


class RecipeError(FieldfitError):
    """The recipe file says something it must not."""


class DataError(FieldfitError):
    """Images or labels are missing, unreadable or contradictory."""


class ExportError(FieldfitError):
    """A graph could not be made, or does not match its checkpoint."""


class GateError(FieldfitError):
    """An artifact was judged and refused."""


class BundleError(FieldfitError):
    """A bundle is not, byte for byte, what its manifest says."""


class EngineError(FieldfitError):
    """No engine can run the bundle here, or it answered wrongly; ``fault`` says why in a word."""

    def __init__(self, message: str, fault: EngineFault = "failed") -> None:
        super().__init__(message)
        self.fault = fault


class UpdateError(FieldfitError):
    """An update could not be fetched, trusted or activated."""


class FleetError(FieldfitError):
    """A device's identity or status could not be made, sent, read or trusted."""


class ServeError(FieldfitError):
    """The HTTP service cannot be set up as asked."""
