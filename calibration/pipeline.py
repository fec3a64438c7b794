"""Calibrate: choose images, measure ranges, leave both behind. The order of the steps, no more.

It gets values, never the recipe, and does not know the dialects that read the table.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from calibration.graph import Graph, check_input
from calibration.images import ADVISED_IMAGES, Choice, batches, choose_images, write_choice
from calibration.ranges import Track, measure
from calibration.table import Table, TableKey, differences, read_table, table_key, write_table
from runtime.dataset import Example
from runtime.errors import DataError, ExportError
from runtime.preprocess import InputSpec, UInt8, preprocess
from runtime.recipe import CalibrationSettings

log = logging.getLogger(__name__)

IMAGES_FILE = "images.json"
TABLE_FILE = "table.json"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A table, the images it was measured on, and whether it was measured now."""

    table: Table
    choice: Choice
    reused: bool
    per_class: Mapping[str, int]
    """Calibration images of each class."""
    reason: str
    """Why the table was, or was not, taken over from an earlier run."""


def calibrate(
    graph: onnx.ModelProto,
    examples: Sequence[Example],
    classes: Sequence[str],
    spec: InputSpec,
    settings: CalibrationSettings,
    *,
    seed: int,
    folder: Path,
    track: Track | None = None,
) -> Calibration:
    """Measure the ranges of the fp32 ``graph`` on images chosen from ``examples``.

    Writes ``images.json`` and ``table.json`` to ``folder``; a table there that was made from the
    same graph, images, preprocessing and method is used again. The graph's own features spread
    the choice. ``track`` passes the batches through, for a progress bar.

    Raises DataError for too few or unsuitable examples, ExportError for a graph that cannot be
    quantized or does not compute what ``spec`` says.
    """
    index = Graph(graph)
    check_input(index, spec)
    features = _features(graph, examples, spec, track)
    choice = choose_images(examples, count=settings.images, spec=spec, seed=seed, features=features)
    if len(choice.chosen) < ADVISED_IMAGES:
        log.warning(
            "only %d calibration images, %d or more are advised", len(choice.chosen), ADVISED_IMAGES
        )
    per_class = choice.per_class(classes)
    missing = [name for name, count in per_class.items() if count == 0]
    if missing and len(missing) < len(classes):
        log.warning("no calibration image of class %s", ", ".join(missing))
    key = table_key(graph, choice.digests, spec, settings)
    path = folder / TABLE_FILE
    table, reason = _earlier(path, key)
    reused = table is not None
    if table is None:
        tensors = measure(graph, batches(choice, spec), settings, track=track)
        table = Table(key=key, images=len(choice.chosen), tensors=tensors)
        write_table(path, table)
    write_choice(folder / IMAGES_FILE, choice)
    log.info("calibration table %s: %s", "used again" if reused else "measured", reason)
    return Calibration(table, choice, reused, per_class, reason)


def _features(
    graph: onnx.ModelProto, examples: Sequence[Example], spec: InputSpec, track: Track | None
) -> npt.NDArray[np.float32]:
    """The graph's ``features`` ``[len(examples), D]``; zeros for an image that cannot be read."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    images: Iterable[UInt8] = (_readable(example, spec)[None] for example in examples)
    rows = [
        session.run(["features"], {"image": image})[0][0]
        for image in (images if track is None else track(images))
    ]
    return np.asarray(rows, dtype=np.float32)


def _readable(example: Example, spec: InputSpec) -> UInt8:
    """The preprocessed image; black where it cannot be read, which the choice names and refuses."""
    try:
        return preprocess(example.path, spec)
    except DataError:
        return np.zeros(spec.shape, dtype=np.uint8)


def _earlier(path: Path, key: TableKey) -> tuple[Table | None, str]:
    """The table at ``path`` if it has ``key``, and why it is or is not used again."""
    if not path.exists():
        return None, "there was none"
    try:
        table = read_table(path)
    except ExportError as error:  # it costs seconds to measure again
        return None, str(error)
    changed = differences(key, table.key)
    if changed:
        return None, f"changed since the last one: {', '.join(changed)}"
    return table, "graph, images, preprocessing and method are as they were"
