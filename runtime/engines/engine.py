"""The seam that every engine stands behind: ``infer`` checks, ``_infer`` runs.

It does not know any library, nor how an engine is chosen. Labels, temperature and preprocessing
belong to the classifier: an engine turns preprocessed bytes into numbers and nothing else.
"""

import abc
import types
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from runtime.errors import EngineError

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDER_TITLES: dict[Provider, str] = {"cpu": "CPU", "cuda": "CUDA", "tensorrt": "TensorRT"}

BATCHES = (1, 1, 16)
"""Smallest, usual and largest batch that engines are built for; 16 is the classifier's."""

_UINT8 = np.dtype(np.uint8)
_Self = TypeVar("_Self", bound="Engine")  # typing.Self needs Python 3.11


class Outputs(NamedTuple):
    """What one call returns; both arrays are the caller's to keep."""

    logits: Float32
    """float32 ``[N, K]``, before softmax and temperature."""
    features: Float32
    """float32 ``[N, D]``, what the classifier's last layer sees; drift is measured on it."""


class Engine(abc.ABC):
    """One loaded model. Use it as a context manager, or call ``close``.

    An engine serves one thread at a time.
    """

    def __init__(
        self,
        *,
        name: str,
        version: str,
        provider: Provider,
        form: str,
        shape: tuple[int, int, int],
        max_batch: int | None = None,
    ) -> None:
        self.name = name
        """The library: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``."""
        self.version = version
        """The library's version."""
        self.provider = provider
        """Where it computes, as verified after loading; ``tensorrt`` is that inside onnxruntime."""
        self.form = form
        """Which form of the model it runs, e.g. ``fp32`` or ``int8-cpu``: runtime.manifest.Form."""
        self.shape = shape
        """Height, width and channels of one picture."""
        self.max_batch = max_batch
        """Most pictures in one call; None if there is no limit."""
        self._closed = False

    def infer(self, images: UInt8) -> Outputs:
        """Run the model on ``images``, uint8 ``[N, H, W, C]`` in C order.

        Raises EngineError if they are not such an array, if the engine is closed, or if the
        library fails.
        """
        # One expression: this is all that the seam costs on the fast path.
        if (
            self._closed
            or type(images) is not np.ndarray
            or images.dtype is not _UINT8
            or images.shape[1:] != self.shape
            or not images.flags.c_contiguous
            or not 0 < len(images) <= (self.max_batch or len(images))
        ):
            self._check(images)
        return self._infer(images)

    @abc.abstractmethod
    def _infer(self, images: UInt8) -> Outputs:
        """Run the model; ``images`` have been checked."""

    def close(self) -> None:
        """Free what the engine holds. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._close()

    def _close(self) -> None:  # noqa: B027  (most libraries free with the last reference)
        """Free what the library does not free by itself."""

    def _check(self, images: Any) -> None:
        """The slow path: find the words for what is wrong, or nothing if it is all right."""
        if self._closed:
            raise EngineError(f"{self}: closed; open it again before infer")
        height, width, channels = self.shape
        expected = f"{self}: expected a uint8 array [N, {height}, {width}, {channels}]"
        if not isinstance(images, np.ndarray):
            raise EngineError(f"{expected}, got {type(images).__name__}")
        if images.dtype != _UINT8:
            raise EngineError(
                f"{expected}, got {images.dtype}; pass the bytes that preprocess returns, the "
                "graph normalises them"
            )
        if images.shape[1:] != self.shape:
            hint = "; add the batch axis: images[None]" if images.shape == self.shape else ""
            raise EngineError(f"{expected}, got {list(images.shape)}{hint}")
        if len(images) == 0:
            raise EngineError(f"{expected} with N >= 1, got no image")
        if self.max_batch is not None and len(images) > self.max_batch:
            raise EngineError(
                f"{expected} with N <= {self.max_batch}, got {len(images)}; pass smaller batches "
                "or build the engine for larger ones"
            )
        if not images.flags.c_contiguous:
            raise EngineError(
                f"{expected} in C order, got strides {list(images.strides)}; "
                "pass np.ascontiguousarray(images)"
            )

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    def __str__(self) -> str:
        return f"{self.name} {PROVIDER_TITLES[self.provider]}, {self.form}"


Tensor = tuple[str, str, Sequence[int | None]]
"""Name, dtype as NumPy names it, and dimensions, None where they are dynamic."""


def input_shape(
    form: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[int, int, int]:
    """Height, width and channels of ``image``, once a loaded graph is known to keep the contract.

    Raises EngineError, refused artifact, if it does not.
    """
    if [(name, dtype, len(sides)) for name, dtype, sides in inputs] != [("image", "uint8", 4)]:
        raise EngineError(
            f"{form}: expected one input image, uint8 [N, H, W, C], got {_listed(inputs)}",
            "refused artifact",
        )
    found = {name: (dtype, len(sides)) for name, dtype, sides in outputs}
    if any(found.get(name) != ("float32", 2) for name in Outputs._fields):
        raise EngineError(
            f"{form}: expected outputs logits and features, float32 of two axes, got "
            f"{_listed(outputs)}",
            "refused artifact",
        )
    _, height, width, channels = inputs[0][2]
    if height is None or width is None or channels is None:
        raise EngineError(
            f"{form}: expected fixed height, width and channels, got {_listed(inputs)}; only the "
            "batch axis may be dynamic",
            "refused artifact",
        )
    return height, width, channels


def _listed(tensors: Sequence[Tensor]) -> str:
    """``image, uint8 [?, 6, 5, 3]`` for each."""
    return "; ".join(
        f"{name}, {dtype} [{', '.join('?' if side is None else str(side) for side in sides)}]"
        for name, dtype, sides in tensors
    )


def logits_of(engine: Engine, images: UInt8, batch: int = 16) -> Float32:
    """Logits ``[N, K]`` of uint8 ``images [N, H, W, C]``, so many at a time."""
    rows = [engine.infer(images[i : i + batch]).logits for i in range(0, len(images), batch)]
    return np.concatenate(rows)


def has_node(model: bytes, operator: str) -> bool:
    """Whether the ONNX graph, or a graph in it, has a node of this operator, without onnx.

    Looks for the node's serialized op_type: field 4 of NodeProto in onnx.proto, with its length.
    """
    return bytes([4 << 3 | 2, len(operator)]) + operator.encode() in model


def refuse_compiled_code(model: bytes) -> None:
    """Raise EngineError for a graph that embeds an engine: native code in a model's clothes."""
    if has_node(model, "EPContext"):
        raise EngineError(
            "the ONNX file carries a finished engine (a node EPContext), which is executable code "
            "from elsewhere; export it again without",
            "refused artifact",
        )


def one_line(error: Exception) -> str:
    """What a library says in many lines, short enough for a sentence of ours."""
    return " ".join(str(error).split())[:400]
