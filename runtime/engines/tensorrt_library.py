"""Find TensorRT, hear what it says, and read a plan's header: what building and running share.

There are two flavours with one API: ``tensorrt`` (JetPack, data-centre GPUs) and ``tensorrt-rtx``
(industrial PCs; it also builds on a machine without a GPU). Neither runs the other's plans.

TensorRT returns None where it fails and tells the reason only to its logger, and it accepts one
logger per process: so there is one here, and ``listening`` lends an ear to it.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from runtime.errors import EngineError

Flavour = Literal["tensorrt", "tensorrt-rtx"]

_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_MAGIC: dict[bytes, Flavour] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}
_HEADER_BYTES = 28


class TensorRT(NamedTuple):
    """An imported TensorRT library."""

    module: Any
    flavour: Flavour
    version: str


class PlanHeader(NamedTuple):
    """What the first bytes of a serialized engine say."""

    flavour: Flavour
    version: str
    """Of the library that built it, e.g. ``10.3.0.26``."""
    size: int | None
    """Bytes of the whole plan; only TensorRT-RTX writes it."""


class Heard:
    """What the logger said while someone listened."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.layers = ""
        """The builder's list of kernels, from its verbose log."""

    def reason(self) -> str:
        """The errors since last asked, in one line: the first three, which cause the others."""
        words = "; ".join(dict.fromkeys(self.errors[:3])) or "TensorRT gave no reason"
        self.errors.clear()
        return words


def installed() -> bool:
    """Whether there is any TensorRT to load; nothing of it is loaded yet."""
    return any(
        sys.modules.get(module) or importlib.util.find_spec(module) for module in _MODULES.values()
    )


def load_library(flavour: Flavour | None = None) -> TensorRT | str:
    """TensorRT of this flavour, by default whichever is installed, or the reason why not."""
    reasons = []
    for name, module_name in _MODULES.items():
        if flavour not in (None, name):
            continue
        try:
            module = importlib.import_module(module_name)
            return TensorRT(module, name, module.__version__)
        # Its own loader raises OSError, RuntimeError or AttributeError for missing libraries.
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reasons.append(f"{name}: {' '.join(str(error).split())}")
    return "; ".join(reasons)


@contextlib.contextmanager
def listening(library: TensorRT) -> Iterator[Heard]:
    """Collect what the process's logger is told meanwhile."""
    heard = Heard()
    sinks = logger(library).sinks
    sinks.append(heard)
    try:
        yield heard
    finally:
        sinks.remove(heard)


def logger(library: TensorRT) -> Any:
    """The one logger of this process, a ``trt.ILogger``."""
    if library.flavour not in _loggers:
        _loggers[library.flavour] = _make_logger(library.module)
    return _loggers[library.flavour]


_loggers: dict[Flavour, Any] = {}


def _make_logger(trt: Any) -> Any:
    error_levels = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.sinks: list[Heard] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in error_levels:
                for sink in self.sinks:
                    sink.errors.append(" ".join(message.split()))
            elif message.startswith("Layers:"):
                for sink in self.sinks:
                    sink.layers = message

    return Logger()


def plan_header(plan: bytes) -> PlanHeader:
    """Read the header of a serialized engine; no TensorRT is needed.

    Raises EngineError if ``plan`` is not one, or is shorter or longer than its header says.
    (Layout: TensorRT-RTX 1.7 plans, and trtexec's source for TensorRT.)
    """
    flavour = _MAGIC.get(plan[:4])
    if flavour is None or len(plan) < _HEADER_BYTES:
        raise EngineError(
            f"expected a TensorRT plan, which starts with ftrt or vtrt, got {len(plan):,} bytes "
            f"that start with {plan[:4]!r}; build the engine again",
            "refused artifact",
        )
    size = int.from_bytes(plan[16:24], "little") if flavour == "tensorrt-rtx" else None
    if size not in (None, len(plan)):
        raise EngineError(
            f"{flavour} plan: expected {size:,} bytes, got {len(plan):,}; build the engine again",
            "refused artifact",
        )
    return PlanHeader(flavour, ".".join(str(number) for number in plan[24:28]), size)
