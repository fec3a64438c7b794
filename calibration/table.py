"""The calibration table: the range of every tensor, measured once, read by both dialects.

It does not know how ranges are measured nor what becomes of them. A table belongs to one graph,
one ordered list of images, others held out to test it on, one preprocessing and one method; it is
used again only if all match.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx

from runtime import atomic
from runtime.errors import ExportError
from runtime.preprocess import InputSpec
from runtime.recipe import CalibrationSettings

FORMAT = 3
"""Raised when the meaning of a field changes; older tables are then measured again."""

LARGEST_DB = 200.0
"""Of a ratio in a table: JSON has no infinity, and float32 does not get this far."""


class TensorRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one tensor was seen to hold, and the part of it that INT8 will represent.

    In the file a share of 0 is left out, so that the tensors that clip stand out.
    """

    clipped: float = 0.0
    """Share of the values on calibration images outside ``chosen``, 0 to 1."""
    held_out_outside: float = 0.0
    """Share of the values on held-out training images outside ``chosen``, 0 to 1."""
    observed: tuple[float, float]
    """Smallest and largest value over all calibration images."""
    chosen: tuple[float, float]
    """Values outside saturate."""
    method: str = "minmax"
    """How ``chosen`` was chosen: minmax, percentile, entropy or mse."""
    reason: str = ""
    """Why by this method."""
    channel_means: tuple[float, ...]
    """Mean of each channel, for the inputs of layers: biases are corrected with them. Empty for
    other tensors."""


class Fidelity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How near the logits of a quantized graph are to those of the float graph."""

    sqnr_db: float
    """Signal-to-quantization-noise ratio, in decibels, within ±LARGEST_DB."""
    agreement: float
    """Share of the images with the same answer, 0 to 1."""


class MethodScore(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How good the ranges of one method are, on held-out training images."""

    method: str
    tensorrt: Fidelity
    onnxruntime: Fidelity

    @property
    def sqnr_db(self) -> float:
        """Mean over both dialects."""
        return (self.tensorrt.sqnr_db + self.onnxruntime.sqnr_db) / 2


class TableKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a table was measured from; digests are SHA-256."""

    graph: str
    images: str
    """Of the images' digests in their order."""
    preprocessing: str
    method: str
    """The method and its parameters, as text."""
    held_out: str = ""
    """Of the held-out images' digests in their order."""
    format: int = FORMAT


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ranges of a graph's tensors."""

    key: TableKey
    images: int
    """How many images were seen."""
    held_out: int = 0
    """How many other training images the ranges were tested on."""
    reason: str = ""
    """Why unbounded tensors have the method that they have."""
    scores: tuple[MethodScore, ...] = ()
    """Of the methods that were compared; empty if there was nothing to decide."""
    tensors: dict[str, TensorRange]

    def check_graph(self, model: onnx.ModelProto) -> None:
        """Raise ExportError unless the table was measured on ``model``."""
        if graph_sha256(model) != self.key.graph:
            raise ExportError(
                "the calibration table was measured on another graph; calibrate again"
            )

    def range(self, tensor: str) -> tuple[float, float]:
        """The chosen low and high of ``tensor``.

        Raises ExportError if the table does not have it.
        """
        if tensor not in self.tensors:
            raise ExportError(
                f"the calibration table has no range for tensor {tensor!r}: it belongs to another "
                "graph; calibrate again"
            )
        return self.tensors[tensor].chosen

    def channel_means(self, tensor: str) -> npt.NDArray[np.float64]:
        """Mean ``[C]`` of each channel of ``tensor``, the input of a convolution.

        Raises ExportError if the table does not have it.
        """
        if tensor not in self.tensors or not self.tensors[tensor].channel_means:
            raise ExportError(
                f"the calibration table has no channel means for tensor {tensor!r}: it belongs to "
                "another graph; calibrate again"
            )
        return np.array(self.tensors[tensor].channel_means)


def table_key(
    graph: onnx.ModelProto,
    digests: Iterable[str],
    spec: InputSpec,
    settings: CalibrationSettings,
    *,
    held_out: Iterable[str] = (),
) -> TableKey:
    """The key of the table that these inputs would give.

    ``digests`` are those of the calibration images, ``held_out`` those of the images that the
    ranges are tested on.
    """
    method: str = settings.method
    if settings.method == "percentile":
        method += f" {settings.percentile!r}"
    elif settings.method == "auto":
        method += f" with percentile {settings.percentile!r}"
    return TableKey(
        graph=graph_sha256(graph),
        images=_sha256_of_all(digests),
        preprocessing=hashlib.sha256(msgspec.json.encode(spec)).hexdigest(),
        method=method,
        held_out=_sha256_of_all(held_out),
    )


def _sha256_of_all(digests: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def graph_sha256(model: onnx.ModelProto) -> str:
    """Digest of what a model computes: notes for people and tools do not count."""
    bare = onnx.ModelProto()
    bare.opset_import.extend(model.opset_import)
    bare.graph.CopyFrom(model.graph)
    bare.graph.ClearField("doc_string")
    bare.graph.ClearField("metadata_props")
    del bare.graph.value_info[:]
    for node in bare.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def differences(expected: TableKey, found: TableKey) -> tuple[str, ...]:
    """The parts in which two keys differ; empty if the table can be used again."""
    return tuple(
        name
        for name in TableKey.__struct_fields__
        if getattr(expected, name) != getattr(found, name)
    )


def write_table(path: Path, table: Table) -> None:
    """Write ``table`` as JSON with one tensor a line, atomically."""
    head = [
        f' "{name}": {_json(getattr(table, name))},'
        for name in ("key", "images", "held_out", "reason")
    ]
    scores = ",\n".join(f"  {_json(score)}" for score in table.scores)
    rows = ",\n".join(f"  {_json(name)}: {_row(tensor)}" for name, tensor in table.tensors.items())
    lines = ["{", *head, ' "scores": [', scores, " ],", ' "tensors": {', rows, " }", "}", ""]
    atomic.write_text(path, "\n".join(lines))


def _row(tensor: TensorRange) -> str:
    fields = msgspec.to_builtins(tensor)
    for share in ("clipped", "held_out_outside"):
        if fields[share] == 0.0:
            del fields[share]
    return _json(fields)


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def read_table(path: Path) -> Table:
    """Read what write_table wrote.

    Raises ExportError if the file is missing or is not such a table.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Table)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: no such table; run `python -m calibration RECIPE`") from error
    except (msgspec.DecodeError, OSError) as error:
        raise ExportError(
            f"{path}: not a calibration table ({error}); delete it and calibrate again"
        ) from error
