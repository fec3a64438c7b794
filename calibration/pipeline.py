"""Calibrate: choose images, measure ranges, leave both behind. The order of the steps, no more.

It gets values, never the recipe, and does not know what becomes of the table.
"""

import dataclasses
import hashlib
import logging
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx

from calibration.compare import compare, decide
from calibration.foreign import doubt
from calibration.graph import Graph, check_input
from calibration.images import (
    ADVISED_IMAGES,
    Choice,
    batches,
    choose_images,
    held_out,
    write_choice,
)
from calibration.methods import METHODS, Method, bound, choose_range
from calibration.observer import Observer
from calibration.ranges import Track, observe, shares_outside
from calibration.table import (
    MethodScore,
    Table,
    TableKey,
    TensorRange,
    differences,
    graph_sha256,
    read_table,
    table_key,
    write_table,
)
from runtime.atomic import replacing_file
from runtime.dataset import Example
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import DataError, ExportError
from runtime.preprocess import InputSpec, UInt8, preprocess, preprocess_batch
from runtime.recipe import CalibrationSettings

log = logging.getLogger(__name__)

IMAGES_FILE = "images.json"
TABLE_FILE = "table.json"
FEATURES_FILE = "features.npz"
TARGET_FEATURES_FILE = "features-target.npz"

HELD_OUT = 128
"""Training images that were not chosen, on which ranges, and what is tuned later, are tested: with
64 a tuning that helps and one that harms looked alike on MobileNetV2."""

FURTHER = 272
"""Further training images, for what needs many: with those of the usual choice they are 400."""

MIN_HELD_OUT = 16
"""Fewer say more about themselves than about a method."""

_WATCHED = 2
"""Images in a batch whose every tensor is fetched: larger ones are no faster and take memory."""

_BATCH = 4


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A table, the images it was measured and tested on, and whether it was measured now."""

    table: Table
    """Has the scores of the methods that were compared, and the reason for the one taken."""
    choice: Choice
    held_out: tuple[Example, ...]
    """Training images that were not chosen; empty if all were."""
    further: tuple[Example, ...]
    """More of them, that are not held out either."""
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
    target: Sequence[Example] = (),
    track: Track | None = None,
) -> Calibration:
    """Measure the ranges of the fp32 ``graph`` on images chosen from ``examples``.

    Writes ``images.json`` and ``table.json`` to ``folder``; a table there that was made from the
    same graph, images, preprocessing and method is used again. The graph's own features spread
    the choice; they are kept in ``features.npz``. Method ``auto`` compares methods on images that
    were not chosen. ``target`` are field images that are held out for judging, to which the chosen
    ones are compared (calibration/foreign); they have no part in any range. ``track`` passes the
    batches through, for a progress bar.

    Raises DataError for too few or unsuitable examples, ExportError for a graph that cannot be
    quantized or does not compute what ``spec`` says.
    """
    index = Graph(graph)
    check_input(index, spec)
    track = track or _silent
    features = _features(graph, examples, spec, folder / FEATURES_FILE, track)
    choice = choose_images(examples, count=settings.images, spec=spec, seed=seed, features=features)
    if len(choice.chosen) < ADVISED_IMAGES:
        log.warning(
            "only %d calibration images, %d or more are advised", len(choice.chosen), ADVISED_IMAGES
        )
    if target:
        seen = _features(graph, target, spec, folder / TARGET_FEATURES_FILE, track)
        rows = {example.sha256: row for row, example in enumerate(examples)}
        chosen = features[[rows[digest] for digest in choice.digests]]
        choice = msgspec.structs.replace(choice, doubt=doubt(chosen, seen))
    if choice.doubt:
        log.warning("%s", choice.doubt)
    per_class = choice.per_class(classes)
    missing = [name for name, count in per_class.items() if count == 0]
    if missing and len(missing) < len(classes):
        log.warning("no calibration image of class %s", ", ".join(missing))
    unseen = held_out(examples, choice, count=HELD_OUT + FURTHER, spec=spec, seed=seed)
    held, further = unseen[:HELD_OUT], unseen[HELD_OUT:]
    digests = [example.sha256 for example in held]
    key = table_key(graph, choice.digests, spec, settings, held_out=digests)
    path = folder / TABLE_FILE
    table, reason = _earlier(path, key)
    reused = table is not None
    if table is None:
        table = _measure(index, choice, held, spec, settings, key, track)
        write_table(path, table)
    write_choice(folder / IMAGES_FILE, choice)
    log.info("calibration table %s: %s", "used again" if reused else "measured", reason)
    return Calibration(table, choice, held, further, reused, per_class, reason)


def compare_methods(
    graph: onnx.ModelProto,
    calibration: Calibration,
    spec: InputSpec,
    settings: CalibrationSettings,
    *,
    track: Track | None = None,
) -> tuple[MethodScore, ...]:
    """What each method would give on all tensors alike, and what ``calibration`` gives, in the end.

    The last is called by the table's own method. One more pass over the calibration images.
    Without held-out images it is the calibration images that judge.

    Raises as calibrate does.
    """
    index, choice, table = Graph(graph), calibration.choice, calibration.table
    observers = observe(
        index, index.observable(), (track or _silent)(batches(choice, spec, size=_WATCHED))
    )
    tables = {
        method: _with_method(table, observers, dict.fromkeys(observers, (method, "")), settings)
        for method in METHODS
    }
    judges = calibration.held_out or choice.chosen[:HELD_OUT]
    images = preprocess_batch([image.path for image in judges], spec)
    return compare(graph, tables | {f"the table: {table.key.method}": table}, images)


def _measure(
    graph: Graph,
    choice: Choice,
    held: Sequence[Example],
    spec: InputSpec,
    settings: CalibrationSettings,
    key: TableKey,
    track: Track,
) -> Table:
    observers = observe(
        graph,
        graph.observable(),
        track(batches(choice, spec, size=_WATCHED)),
        histogram=settings.method != "minmax",
    )
    images = preprocess_batch([example.path for example in held], spec) if held else None
    table = Table(key=key, images=len(choice.chosen), held_out=len(held), tensors={})
    table = _decide(graph, observers, settings, table, images)
    if images is None:
        return table
    ranges = {name: tensor.chosen for name, tensor in table.tensors.items()}
    shares = shares_outside(graph, ranges, track(_in_batches(images)))
    tensors = {
        name: msgspec.structs.replace(tensor, held_out_outside=shares[name])
        for name, tensor in table.tensors.items()
    }
    return msgspec.structs.replace(table, tensors=tensors)


def _decide(
    graph: Graph,
    observers: Mapping[str, Observer],
    settings: CalibrationSettings,
    table: Table,
    images: UInt8 | None,
) -> Table:
    """``table`` with ranges by the recipe's method, or by that which ``images`` prefer."""
    if settings.method != "auto":
        methods = dict.fromkeys(observers, (settings.method, "the recipe's method"))
        reason = f"the recipe asks for {settings.method}"
        return _with_method(table, observers, methods, settings, reason)
    bounds = {name: bound(graph, name) for name in observers}

    def table_of(method: Method, reason: str, bounded: Method = "minmax") -> Table:
        methods: dict[str, tuple[Method, str]] = {
            name: (bounded, f"bounded: {why}") if why else (method, "unbounded")
            for name, why in bounds.items()
        }
        return _with_method(table, observers, methods, settings, reason)

    if all(bounds.values()):
        return table_of("minmax", "every tensor is bounded: MinMax, without a comparison")
    if images is None or len(images) < MIN_HELD_OUT:
        found = 0 if images is None else len(images)
        return table_of(
            "minmax",
            f"only {found} held-out images, {MIN_HELD_OUT} are needed to compare methods: MinMax",
        )
    tables: dict[str, Table] = {method: table_of(method, "") for method in METHODS}
    for method in METHODS:
        # A bound that hardly any value reaches is a wide range for the others.
        name = f"{method}, bounded tensors percentile"
        tables[name] = table_of(method, "", bounded="percentile")
    scores = compare(graph.model, tables, images)
    best, reason = decide(scores)
    return msgspec.structs.replace(tables[best], reason=reason, scores=scores)


def _with_method(
    table: Table,
    observers: Mapping[str, Observer],
    methods: Mapping[str, tuple[Method, str]],
    settings: CalibrationSettings,
    reason: str = "",
) -> Table:
    """``table`` with the range of each tensor by its method, each with its reason."""
    tensors: dict[str, TensorRange] = {}
    for name, observer in observers.items():
        method, why = methods[name]
        tensors[name] = choose_range(observer, method, percent=settings.percentile, reason=why)
    return msgspec.structs.replace(table, tensors=tensors, reason=reason, scores=())


def _features(
    graph: onnx.ModelProto,
    examples: Sequence[Example],
    spec: InputSpec,
    path: Path,
    track: Track,
) -> npt.NDArray[np.float32]:
    """The graph's ``features`` ``[len(examples), D]``, of a black image for one that is broken.

    They are kept at ``path`` and read from there if graph, images and preprocessing are the same.
    """
    made_from = [graph_sha256(graph), msgspec.json.encode(spec).decode()]
    made_from += [example.sha256 for example in examples]
    key = hashlib.sha256("\n".join(made_from).encode()).hexdigest()
    kept = _kept_features(path, key)
    if kept is not None:
        return kept
    with OnnxRuntimeEngine(graph.SerializeToString(), form="fp32") as engine:
        starts = range(0, len(examples), _BATCH)
        images = (
            np.stack([_readable(example, spec) for example in examples[start : start + _BATCH]])
            for start in starts
        )
        rows = [engine.infer(batch).features for batch in track(images)]
    features = np.concatenate(rows) if rows else np.zeros((0, 1), np.float32)
    with replacing_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, key=key, features=features)
    return features


def _kept_features(path: Path, key: str) -> npt.NDArray[np.float32] | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            return np.asarray(kept["features"]) if str(kept["key"]) == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # missing or damaged: it costs seconds to compute again


def _in_batches(images: UInt8) -> Iterator[UInt8]:
    for start in range(0, len(images), _WATCHED):
        yield images[start : start + _WATCHED]


def _silent(items: Iterable[UInt8]) -> Iterable[UInt8]:
    return items


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
