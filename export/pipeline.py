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

from calibration import Emitted, calibrate, check_kernels
from calibration.sensitivity import SENSITIVITY
from export.answers import ANSWERS, CHECKPOINT, encode_answers
from export.engines import prove_engine
from export.float16 import (
    activation_overflows,
    activation_ranges,
    overflows,
    to_float16,
)
from export.gate import without_int8
from export.golden import choose_golden
from export.held_out import HeldOut, answers, ask_checkpoint, examine
from export.onnx_graph import to_onnx
from export.parity import check_batches, check_checkpoint, measure
from export.precision_ladder import EMITTERS, Material, PrecisionLadder, Rung, material_of
from export.reference import make_reference
from export.release import (
    RELEASE,
    Attempt,
    FormReport,
    ReferenceReport,
    Release,
    encode_release,
    judged_sha256,
)
from export.selective import Abstention, choose, measure_threshold, scored
from export.teach import teach
from export.write_bundle import GOLDEN, adaptation_of, encode_golden, make_manifest, write_bundle
from runtime import atomic
from runtime.benchmark import interleave
from runtime.dataset import Dataset, Example, Split, read_dataset
from runtime.engines.engine import logits_of
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import DataError, EngineError, ExportError
from runtime.manifest import Artifact
from runtime.monitoring.reference import REFERENCE, encode
from runtime.preprocess import IMAGE_SUFFIXES
from runtime.recipe import Recipe
from runtime.version import __version__
from train import console
from train.checkpoint import CheckpointFacts, read_checkpoint
from train.pipeline import CACHE
from train.pixels import UInt8, load_pixels
from train.record import finished, training_key

SAMPLES = 6
"""Held-out images copied to ``samples/`` for `make run`."""

SELECTIVE_RISK = "selective-risk.png"

TIMED_SECONDS = 4.0
"""How long the forms of a CPU are timed against each other."""

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
        self.test = ask_checkpoint(self.model, self.dataset, "test", recipe)
        self.validation: HeldOut | None = None
        """Chooses between rungs; without one the test images do it all."""
        if self.dataset.select(self.dataset.field, "validation"):
            self.validation = ask_checkpoint(self.model, self.dataset, "validation", recipe)
        self.ladder: PrecisionLadder | None = None
        self.files: dict[str, bytes] = {}
        self.logits: dict[str, npt.NDArray[np.float32]] = {}
        """Of the test images, by form that passed."""
        self.reports: list[FormReport] = []

    def run(self, *, allow_fp16_only: bool) -> Release:
        recipe = self.recipe
        with console.console.status("exporting to ONNX"):
            graph = to_onnx(self.model, self.facts)
        parity = self._fp32(graph)
        for form in recipe.export.forms:
            self.reports.append(self._make(form, graph))
        self._time_forms()
        self._keep_answers()
        statistics = self._reference()
        release = Release(
            name=recipe.name,
            version=recipe.export.version,
            field=self.dataset.field,
            adaptation=adaptation_of(self.facts),
            reference=self.test.reference,
            parity_db=parity,
            forms=tuple(self.reports),
            checkpoint_sha256=hashlib.sha256(self.path.read_bytes()).hexdigest(),
            recipe_sha256=recipe.sha256,
            dataset_sha256=self.dataset.sha256,
            judged_sha256=judged_sha256((e.sha256, e.label) for e in self.held_out),
            gate=recipe.gate,
            abstention=self._abstention(),
            statistics=statistics,
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
            logits = answers(engine, self.test)
            parity = check_checkpoint(self.test.logits, logits)
            check_batches(engine, np.asarray(self.test.images[:33]))
        quality = measure(self.test.logits, logits, self.test.labels, seed=self.recipe.seed)
        self.files["fp32.onnx"] = data
        self.logits["fp32"] = logits
        reason = f"is the checkpoint ({parity:.0f} dB), batches 1, 2, 5 and 33 agree"
        attempt = Attempt(form="fp32", quality=quality, passed=True, reason=reason)
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

    def _ladder(self, graph: onnx.ModelProto) -> PrecisionLadder:
        """What all INT8 forms climb; the table that they are written from is measured once."""
        if self.ladder is None:
            self.ladder = PrecisionLadder(self._calibrate(graph, "calibration"), self._teach)
        return self.ladder

    def _calibrate(self, graph: onnx.ModelProto, name: str) -> Material:
        recipe = self.recipe
        candidates = self.dataset.select(self.dataset.field, "train")
        folder = recipe.build / name
        atomic.write_bytes(folder / "fp32.onnx", graph.SerializeToString())
        done = calibrate(
            graph, candidates, self.dataset.classes, recipe.input, recipe.calibration,
            seed=recipe.seed, folder=folder,
            target=self.dataset.select(self.dataset.field, "validation"),
            track=lambda items: console.track(items, name),
        )  # fmt: skip
        console.say(
            f"{name}: {done.table.images} of {len(candidates)} {self.dataset.field} training "
            f"images; {'table used again' if done.reused else 'table measured'}: {done.reason}"
        )
        return material_of(graph, done, recipe.input)

    def _teach(self, emitted: Emitted) -> Material | None:
        """The last rung before FP16: a network that was taught to be rounded, calibrated anew."""
        taught = teach(self.model, emitted, self.dataset, self.recipe)
        if taught is None:
            return None
        with console.console.status("exporting the taught network to ONNX"):
            graph = to_onnx(taught, self.facts)
        return self._calibrate(graph, "calibration-taught")

    def _fp16(self, graph: onnx.ModelProto) -> FormReport:
        ranges = activation_ranges(graph, np.asarray(self.test.images[:RANGED]))
        if too_large := [*overflows(graph), *activation_overflows(ranges)]:
            reason = f"{len(too_large)} tensors overflow float16, first: {too_large[0]}"
            return FormReport(form="fp16", released=False, reason=reason, bytes=0, attempts=())
        layers = [node.name for node in graph.graph.node if node.op_type == "Conv"]
        return self._judge("fp16", to_float16(graph), layers)

    def _int8(self, form: str, graph: onnx.ModelProto) -> FormReport:
        """Climb until a rung is proven; validation images choose it, test images prove it."""
        attempts: list[Attempt] = []
        for rung in self._ladder(graph).rungs(form):
            model = to_float16(rung.emitted.model) if form == "int8-fp16" else rung.emitted.model
            report = self._judge(form, model, rung.emitted.quantized, rung)
            attempts += report.attempts
            if report.released:
                break
        return msgspec.structs.replace(report, attempts=tuple(attempts))

    def _judge(
        self, form: str, model: onnx.ModelProto, intended: Sequence[str], rung: Rung | None = None
    ) -> FormReport:
        data = model.SerializeToString()
        with OnnxRuntimeEngine(data, form=form) as engine:
            chosen = None
            if rung is not None and self.validation is not None:
                chosen, logits = examine(engine, model, self.validation, self.recipe)
            if chosen is None or chosen.passed:
                judged, logits = examine(engine, model, self.test, self.recipe)
            else:
                judged = chosen
        kernels: dict[str, int] = {}
        proof = None
        if judged.passed and form == "int8-cpu" and rung is not None:
            kernels = dict(check_kernels(rung.emitted))
        elif judged.passed:
            with console.fraction(f"{form}: TensorRT engine") as progress:
                proof = prove_engine(
                    data, form, intended, self.test.images, logits,
                    min_agreement=self.recipe.gate.min_agreement, progress=progress,
                )  # fmt: skip
            if not proof.passed:
                judged = judged._replace(passed=False, reason=proof.reason)
        attempt = Attempt(
            form=form, rung=rung.name if rung else "", split=judged.split,
            kept_float=dict(rung.kept_float) if rung else {}, made=rung.reason if rung else "",
            quality=judged.quality, passed=judged.passed, reason=judged.reason,
        )  # fmt: skip
        console.say(
            f"{form}{f', {rung.name}' if rung else ''}: "
            f"{'passed' if judged.passed else 'refused'} on {judged.split} images: {judged.reason}"
        )
        if judged.passed:
            self.files[f"{form}.onnx"] = data
            self.logits[form] = logits
        return FormReport(
            form=form, released=judged.passed, reason=judged.reason, bytes=len(data),
            attempts=(attempt,), engine=proof, kernels=kernels,
        )  # fmt: skip

    def _keep_answers(self) -> None:
        """What only a report asks for, beside the records."""
        logits = {CHECKPOINT: self.test.logits, **self.logits}
        atomic.write_bytes(self.recipe.build / ANSWERS, encode_answers(self.test.labels, logits))
        if self.ladder is not None:
            forms = [r.form for r in self.reports if r.form in EMITTERS and r.attempts]
            layers = {form: self.ladder.sensitivities(form) for form in forms}
            data = msgspec.json.format(msgspec.json.encode(layers), indent=1)
            atomic.write_bytes(self.recipe.build / "calibration" / SENSITIVITY, data)

    def _time_forms(self) -> None:
        """Speed on a CPU is known here; what TensorRT makes of its forms only the device knows."""
        forms = [f for f in ("fp32", "int8-cpu") if f"{f}.onnx" in self.files]
        engines = [
            OnnxRuntimeEngine(self.files[f"{form}.onnx"], form=form, threads=1) for form in forms
        ]
        with console.console.status("timing fp32 against int8-cpu"):
            timings = interleave(engines, np.asarray(self.test.images[:1]), seconds=TIMED_SECONDS)
        timed = {timing.form: timing for timing in timings}
        self.reports = [
            msgspec.structs.replace(
                report,
                relative_speed=timed[report.form].relative_speed,
                cpu_ms=timed[report.form].wall_ms,
            )
            if report.form in timed
            else report
            for report in self.reports
        ]

    def _reference(self) -> ReferenceReport:
        train = self.dataset.select(self.dataset.field, "train")
        images: dict[Split, UInt8] = {
            "train": load_pixels(train, self.recipe.input, CACHE),
            "test": self.test.images,
        }
        if self.validation is not None:
            images["validation"] = self.validation.images
        with OnnxRuntimeEngine(self.files["fp32.onnx"], form="fp32") as engine:
            reference, report = make_reference(
                engine, self.facts.classes, images, temperature=self.facts.temperature
            )
        self.files[REFERENCE] = encode(reference)
        return report

    def _abstention(self) -> Abstention:
        """Chosen on the checkpoint's answers to validation images, measured on all forms'."""
        temperature = self.facts.temperature
        logits, labels = self.test.logits[:0], self.test.labels[:0]
        if self.validation is not None:
            logits, labels = self.validation.logits, self.validation.labels
        chosen = choose(scored(logits, labels, temperature), self.recipe.export.max_error_accepted)
        if chosen.chosen is not None and (self.test.labels >= 0).any():
            tested = tuple(
                measure_threshold(
                    form, scored(answered, self.test.labels, temperature), chosen.abstain_below
                )
                for form, answered in self.logits.items()
            )
            chosen = msgspec.structs.replace(chosen, tested=tested)
        if chosen.curve:
            from export.plots import write_selective_risk  # drawing takes a second to load

            write_selective_risk(self.recipe.build / SELECTIVE_RISK, chosen)
        return chosen

    def _write(self, release: Release) -> None:
        recipe = self.recipe
        released = [report for report in self.reports if report.released]
        rows = choose_golden(self.test.logits, recipe.export.golden)
        images = np.asarray(self.test.images)[rows]
        golden = {}
        for report in released:
            with OnnxRuntimeEngine(self.files[f"{report.form}.onnx"], form=report.form) as engine:
                golden[report.form] = logits_of(engine, images, batch=1)
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
            recipe, self.facts, release.checkpoint_sha256, artifacts, self.files,
            abstain_below=release.abstention.abstain_below if release.abstention else 0.0,
        )  # fmt: skip
        write_bundle(recipe.build / "bundle", recipe.build / release.archive, manifest, self.files)
        _write_samples(recipe.build / "samples", self.dataset, self.held_out)


def _check_trained(recipe: Recipe, dataset: Dataset, facts: CheckpointFacts) -> None:
    """The checkpoint must be what this recipe trains on these images, or figures would lie.

    Above all the splits: held-out images of another split may have been trained on.
    """
    again = "run `make train` (python -m train RECIPE) again"
    for label in recipe.export.ok:
        if label not in facts.classes:
            raise DataError(
                f"[export] ok: expected labels of the model, {', '.join(facts.classes)}; got "
                f"{label!r}"
            )
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
