"""The order of export's steps: graph, parity, calibration, forms, gate, engines, bundle.

What fails the gate is not in the bundle, and ``release.json`` says why. If the fp32 graph does
not match the checkpoint nothing is released at all.
"""

import hashlib
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

from calibration import calibrate, check_kernels, onnxruntime_dialect, tensorrt_dialect
from calibration.quantize import Emitted
from calibration.table import Table
from export.engines import prove_engine
from export.float16 import (
    activation_overflows,
    activation_ranges,
    first_not_finite,
    overflows,
    to_float16,
)
from export.gate import judge, without_int8
from export.golden import choose_golden
from export.onnx_graph import stem_of, to_onnx
from export.parity import check_batches, check_checkpoint, measure, run
from export.release import (
    RELEASE,
    Attempt,
    FormReport,
    Release,
    encode_release,
    judged_sha256,
)
from export.write_bundle import GOLDEN, adaptation_of, encode_golden, make_manifest, write_bundle
from runtime import atomic
from runtime.benchmark import interleave
from runtime.dataset import Dataset, Example, read_dataset
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import DataError, EngineError, ExportError
from runtime.manifest import Artifact
from runtime.preprocess import IMAGE_SUFFIXES
from runtime.recipe import Recipe
from runtime.version import __version__
from train import console
from train.checkpoint import CheckpointFacts, read_checkpoint
from train.device import reference_device
from train.features import predict
from train.pipeline import CACHE
from train.pixels import load_pixels
from train.record import finished, training_key

SAMPLES = 6
"""Held-out images copied to ``samples/`` for `make run`."""

RANGED = 32
"""Held-out images on which activations are held against what half can hold."""


def export(recipe: Recipe, *, allow_fp16_only: bool = False) -> Release:
    """Prove the checkpoint of ``recipe`` in every form and write its bundle.

    If an engine is left without any INT8 form that was asked for, only ``release.json`` is
    written, unless ``allow_fp16_only``: a device must not become slower in silence.

    Raises DataError if training has not run or does not belong to this recipe, ExportError if
    the graph is not the checkpoint (nothing is released then).
    """
    return _Job(recipe).run(allow_fp16_only=allow_fp16_only)


class _Job:
    """One export: what every form shares."""

    def __init__(self, recipe: Recipe) -> None:
        self.started = time.monotonic()
        self.recipe = recipe
        self.dataset = read_dataset(recipe.build / "train" / "images.json")
        self.path = recipe.build / "train" / "checkpoint.safetensors"
        self.model, self.facts = read_checkpoint(self.path)
        _check_trained(recipe, self.dataset, self.facts)
        self.held_out = self.dataset.select(self.dataset.field, "test")
        if len(self.held_out) < 2:
            raise DataError("the field's test split has fewer than 2 images to judge by")
        self.labels = np.array([self.dataset.label_index(e) for e in self.held_out], dtype=np.int64)
        self.images = load_pixels(self.held_out, recipe.input, CACHE)
        device = reference_device("the reference")
        self.logits = predict(
            self.model, self.images, device, lambda i, n: console.track(i, "checkpoint", n)
        )
        self.reference = measure(self.logits, self.logits, self.labels, seed=recipe.seed)
        self.table: Table | None = None
        self.files: dict[str, bytes] = {}
        self.reports: list[FormReport] = []

    def run(self, *, allow_fp16_only: bool) -> Release:
        recipe = self.recipe
        with console.console.status("exporting to ONNX"):
            graph = to_onnx(self.model, self.facts)
        parity = self._fp32(graph)
        for form in recipe.export.forms:
            self.reports.append(self._make(form, graph))
        self._time_forms()
        release = Release(
            name=recipe.name,
            version=recipe.export.version,
            field=self.dataset.field,
            adaptation=adaptation_of(self.facts),
            reference=self.reference,
            parity_db=parity,
            forms=tuple(self.reports),
            checkpoint_sha256=hashlib.sha256(self.path.read_bytes()).hexdigest(),
            recipe_sha256=recipe.sha256,
            dataset_sha256=self.dataset.sha256,
            judged_sha256=judged_sha256((e.sha256, e.label) for e in self.held_out),
            gate=recipe.gate,
            seed=recipe.seed,
            seconds=time.monotonic() - self.started,
            machine=platform.machine(),
            versions={
                "fieldfit": __version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
            },
            git=_git_revision(),
        )
        atomic.write_bytes(recipe.build / RELEASE, encode_release(release))
        if allow_fp16_only or not without_int8(release.forms):
            self._write(release)
        return release

    def _fp32(self, graph: onnx.ModelProto) -> float:
        data = graph.SerializeToString()
        with OnnxRuntimeEngine(data, form="fp32") as engine:
            logits = self._logits(engine)
            parity = check_checkpoint(self.logits, logits)
            check_batches(engine, np.asarray(self.images[:33]))
        quality = measure(self.logits, logits, self.labels, seed=self.recipe.seed)
        self.files["fp32.onnx"] = data
        reason = f"is the checkpoint ({parity:.0f} dB), batches 1, 2, 5 and 33 agree"
        attempt = Attempt(form="fp32", kept_float=(), quality=quality, passed=True, reason=reason)
        self.reports.append(
            FormReport(
                form="fp32", released=True, reason=reason, bytes=len(data), attempts=(attempt,)
            )
        )
        return parity

    def _make(self, form: str, graph: onnx.ModelProto) -> FormReport:
        """One form and its verdict. What cannot be made is refused, and the others go on."""
        try:
            return self._fp16(graph) if form == "fp16" else self._int8(form, graph)
        except (ExportError, EngineError) as error:
            console.say(f"{form}: refused: {error}")
            return FormReport(form=form, released=False, reason=str(error), bytes=0, attempts=())

    def _calibrate(self, graph: onnx.ModelProto) -> Table:
        """The table that both INT8 forms are written from, measured at the first of them."""
        if self.table is not None:
            return self.table
        recipe = self.recipe
        candidates = self.dataset.select(self.dataset.field, "train")
        folder = recipe.build / "calibration"
        atomic.write_bytes(folder / "fp32.onnx", self.files["fp32.onnx"])
        done = calibrate(
            graph,
            candidates,
            self.dataset.classes,
            recipe.input,
            recipe.calibration,
            seed=recipe.seed,
            folder=folder,
            track=lambda items: console.track(items, "calibration"),
        )
        console.say(
            f"calibration: {done.table.images} of {len(candidates)} {self.dataset.field} training "
            f"images; {'table used again' if done.reused else 'table measured'}: {done.reason}"
        )
        self.table = done.table
        return done.table

    def _fp16(self, graph: onnx.ModelProto) -> FormReport:
        self._refuse_overflow(graph)
        model = to_float16(graph)
        convolutions = [node.name for node in graph.graph.node if node.op_type == "Conv"]
        return self._judge("fp16", model, convolutions, ())

    def _refuse_overflow(self, graph: onnx.ModelProto) -> None:
        """Raise ExportError if half cannot hold what the float graph holds: a CPU hides it."""
        ranges = activation_ranges(graph, np.asarray(self.images[:RANGED]))
        if too_large := overflows(graph) + activation_overflows(ranges):
            raise ExportError(f"{len(too_large)} tensors overflow float16, first: {too_large[0]}")

    def _int8(self, form: str, graph: onnx.ModelProto) -> FormReport:
        """Climb: everything in INT8 first, then the convolution that sees the image left float."""
        table = self._calibrate(graph)
        dialect = onnxruntime_dialect if form == "int8-cpu" else tensorrt_dialect
        if form == "int8-fp16":
            self._refuse_overflow(graph)
        attempts: list[Attempt] = []
        stem = stem_of(graph)
        for kept_float in ((), (stem,)) if stem else ((),):
            emitted = dialect.emit(graph, table, float_nodes=kept_float)
            if not emitted.quantized:
                raise ExportError(
                    "no convolution is left to quantize; transformers gain from fp16, not from INT8"
                )
            model = to_float16(emitted.model) if form == "int8-fp16" else emitted.model
            report = self._judge(form, model, emitted.quantized, kept_float, emitted)
            attempts += report.attempts
            if report.released:
                break
        return msgspec.structs.replace(report, attempts=tuple(attempts))

    def _judge(
        self,
        form: str,
        model: onnx.ModelProto,
        intended: Sequence[str],
        kept_float: tuple[str, ...],
        emitted: Emitted | None = None,
    ) -> FormReport:
        data = model.SerializeToString()
        with OnnxRuntimeEngine(data, form=form) as engine:
            logits = self._logits(engine)
        quality = measure(self.logits, logits, self.labels, seed=self.recipe.seed)
        if np.isfinite(logits).all():
            passed, reason = judge(quality, self.reference, self.recipe.gate)
        else:
            found = first_not_finite(model, np.asarray(self.images[:RANGED]))
            passed, reason = False, f"logits are not finite: {found or 'overflow'}"
        kernels: dict[str, int] = {}
        proof = None
        if passed and form == "int8-cpu" and emitted is not None:
            kernels = dict(check_kernels(emitted))
        elif passed:
            with console.fraction(f"{form}: TensorRT engine") as progress:
                proof = prove_engine(
                    data,
                    form,
                    intended,
                    self.images,
                    logits,
                    min_agreement=self.recipe.gate.min_agreement,
                    progress=progress,
                )
            if not proof.passed:
                passed, reason = False, proof.reason
        attempt = Attempt(
            form=form, kept_float=kept_float, quality=quality, passed=passed, reason=reason
        )
        console.say(
            f"{form}{' with ' + ', '.join(kept_float) + ' float' if kept_float else ''}: "
            f"{'passed' if passed else 'refused'}: {reason}"
        )
        if passed:
            self.files[f"{form}.onnx"] = data
        return FormReport(
            form=form,
            released=passed,
            reason=reason,
            bytes=len(data),
            attempts=(attempt,),
            engine=proof,
            kernels=kernels,
        )

    def _logits(self, engine: OnnxRuntimeEngine) -> npt.NDArray[np.float32]:
        starts = range(0, len(self.images), 16)
        label = f"{engine.form}: held-out images"
        rows = [
            run(engine, np.asarray(self.images[start : start + 16]))
            for start in console.track(starts, label)
        ]
        return np.concatenate(rows)

    def _time_forms(self) -> None:
        """Speed on a CPU is known here; what TensorRT makes of its forms only the device knows."""
        forms = [f for f in ("fp32", "int8-cpu") if f"{f}.onnx" in self.files]
        engines = [
            OnnxRuntimeEngine(self.files[f"{form}.onnx"], form=form, threads=1) for form in forms
        ]
        with console.console.status("timing fp32 against int8-cpu"):
            timings = interleave(engines, np.asarray(self.images[:1]), seconds=4.0)
        speeds = {timing.form: timing.relative_speed for timing in timings}
        self.reports = [
            msgspec.structs.replace(report, relative_speed=speeds.get(report.form))
            for report in self.reports
        ]

    def _write(self, release: Release) -> None:
        recipe = self.recipe
        released = [report for report in self.reports if report.released]
        rows = choose_golden(self.logits, recipe.export.golden)
        images = np.asarray(self.images)[rows]
        golden = {}
        for report in released:
            with OnnxRuntimeEngine(self.files[f"{report.form}.onnx"], form=report.form) as engine:
                golden[report.form] = run(engine, images, batch=1)
        self.files[GOLDEN] = encode_golden(images, golden)
        self.files[RELEASE] = encode_release(release)
        artifacts = [
            Artifact(
                form=report.form,  # type: ignore[arg-type]
                file=f"{report.form}.onnx",
                quality=report.attempts[-1].quality,
                relative_speed=report.relative_speed,
                speed_machine=None if report.relative_speed is None else release.machine,
            )
            for report in released
        ]
        manifest = make_manifest(
            recipe, self.facts, release.checkpoint_sha256, artifacts, self.files
        )
        archive = recipe.build / f"{recipe.name}-{recipe.export.version}.zip"
        write_bundle(recipe.build / "bundle", archive, manifest, self.files)
        _write_samples(recipe.build / "samples", self.dataset, self.held_out)


def _check_trained(recipe: Recipe, dataset: Dataset, facts: CheckpointFacts) -> None:
    """The checkpoint must be what this recipe trains on these images, or figures would lie.

    Above all the splits: held-out images of another split may have been trained on.
    """
    again = "run `make train` (python -m train RECIPE) again"
    for table in ("input", "model"):
        if getattr(recipe, table) != getattr(facts, table):
            raise DataError(f"the checkpoint was trained with another [{table}]; {again}")
    if facts.dataset_sha256 != dataset.sha256:
        raise DataError(f"the images, labels or splits changed since training; {again}")
    if finished(recipe.build / "train", training_key(recipe, dataset)) is None:
        raise DataError(f"seed, [source], [train] or fieldfit changed since training; {again}")


def _write_samples(folder: Path, dataset: Dataset, held_out: Sequence[Example]) -> None:
    """A few held-out images under their labels' names, for a first run."""
    there = [example for example in held_out if Path(example.path).is_file()]
    labels = [name for name in (*dataset.classes, None) if any(e.label == name for e in there)]
    each = max(1, SAMPLES // max(1, len(labels)))
    chosen = [e for name in labels for e in [e for e in there if e.label == name][:each]]
    with atomic.replacing_folder(folder) as temporary:
        for index, example in enumerate(chosen, 1):
            # A label from a CSV file may be no file name.
            word = re.sub(r"[^\w-]+", "_", example.label or "field")[:60]
            suffix = Path(example.path).suffix.lower()
            suffix = suffix if suffix in IMAGE_SUFFIXES else ".png"  # readers go by content
            shutil.copyfile(example.path, temporary / f"{word}-{index}{suffix}")


def _git_revision() -> str | None:
    """Revision of the working directory, if it is a checkout and git is there."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
