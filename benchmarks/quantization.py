"""What INT8 costs in quality: ours, as released, against its peers, on the same graphs and images.

Also what becomes of each if somebody calibrates with the wrong images. It measures no speed
(inference does) and no calibration time (calibration does).
"""

import hashlib
import importlib
import importlib.util
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks import cases, dann
from benchmarks.cases import Case, Ints, UInt8
from benchmarks.harness import Bar, Options, Report, Table
from export import gate, parity
from export.precision_ladder import EMITTERS, PrecisionLadder, Rung, material_of
from runtime import metrics
from runtime.dataset import Example, Split
from runtime.engines.engine import logits_of
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import DataError
from runtime.manifest import Quality
from runtime.preprocess import InputSpec, preprocess_batch
from runtime.recipe import CalibrationSettings, GateSettings

if TYPE_CHECKING:
    import onnx

    from calibration import Calibration

Floats = npt.NDArray[np.float32]

LONG = True
"""Runs only when it is named."""

SEEDS = 0, 1, 2
"""Each draws other calibration and held-out images for ours: luck is part of the figure."""
BATCH = 16
QUICK, WRONG_IMAGES = 16, 64

CPU, TENSORRT = "CPU", "TensorRT"
FORMS = {CPU: "int8-cpu", TENSORRT: "int8"}
CALIBRATED, RELEASED = "fieldfit, as calibrated", "fieldfit, as released"
NNCF = "NNCF, default preset"
BARS = {
    ("efficientnet_lite0", CPU): (0.99, 28.0, None),
    ("efficientnet_lite0", TENSORRT): (0.985, 25.0, None),
    (cases.ARCHITECTURE, CPU): (None, None, 0.01),
}
"""Agreement and SQNR in dB at least, loss of accuracy at most; in the mean over the seeds."""


class Peer(NamedTuple):
    """A way to call onnxruntime's quantize_static."""

    engine: str
    """What its graph is for: onnxruntime's CPU kernels or TensorRT's builder."""
    activations: str
    per_channel: bool
    options: Mapping[str, bool] = {}


PEERS = {
    "quantize_static, defaults": Peer(CPU, "QInt8", per_channel=False),
    "quantize_static, U8S8 per channel": Peer(CPU, "QUInt8", per_channel=True),
    "quantize_static, usual TensorRT recipe": Peer(
        TENSORRT, "QInt8", per_channel=True,
        options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    ),
}  # fmt: skip
"""All with min-max ranges, the default. The last is the only one of them that TensorRT's parser
takes: with QuantizeBias at its default it refuses the int32 bias."""

SILENT = "quantize_static, U8S8 per channel"
"""The peer that is shown the wrong images: the best of them on a CPU."""


class Score(NamedTuple):
    """What a form is worth against the float graph, and how it was made."""

    agreement: float
    sqnr_db: float
    accuracy: float
    lost: float
    """Accuracy of the float graph less its own."""
    interval: tuple[float, float]
    """Of ``lost``, paired: with 95 % confidence it is not above the upper end."""
    said: str = ""
    """Which rung of the ladder it is, if any."""


def measure(options: Options) -> Report:
    """Quantize the bundle's network and MobileNetV2 in every way, then with wrong images.

    Raises DataError or BundleError if an input is missing.
    """
    networks = {"efficientnet_lite0": cases.exported(options.bundle)}
    if not options.quick:
        networks[cases.ARCHITECTURE] = cases.mobilenetv2()
    tables, figures, bars = [], dict[str, object](), list[Bar]()
    for name, case in networks.items():
        judge = Judge.of(case, "test", limit=QUICK if options.quick else None)
        scores = forms(name, case, judge, quick=options.quick)
        tables.append(forms_table(name, case, judge, scores))
        bars += bars_of(name, scores)
        figures[name] = [
            {"engine": engine, "form": form, "seed": seed, **score._asdict()}
            for (engine, form, seed), score in scores.items()
        ]
        if name == "efficientnet_lite0":
            wrong, figures["wrong images"] = _wrong(case, judge, quick=options.quick)
    return Report(
        title="Quality of INT8", tables=(*tables, wrong), figures=figures, bars=tuple(bars)
    )


class Judge(NamedTuple):
    """Held-out images of a field, and what the float graph says to them."""

    images: UInt8
    labels: Ints
    reference: Floats

    @classmethod
    def of(cls, case: Case, split: Split, *, limit: int | None) -> "Judge":
        """All images of ``split``, or the first ``limit``: their order means nothing."""
        examples = case.examples(split)[:limit]
        images = case.pixels(examples)
        return cls(images, case.labels(examples), run(case.graph, images))

    @property
    def accuracy(self) -> float:
        """Accuracy of the float graph."""
        return metrics.accuracy(self.reference.argmax(axis=1), self.labels)

    def quality(self, logits: Floats) -> Quality:
        """What ``logits [N, K]`` are worth in the gate's figures."""
        return parity.measure(self.reference, logits, self.labels, seed=0)

    def score(self, logits: Floats, said: str = "") -> Score:
        """What ``logits [N, K]`` are worth."""
        found = self.quality(logits)
        assert found.accuracy is not None
        assert found.accuracy_drop_interval is not None
        return Score(
            agreement=found.agreement, sqnr_db=found.sqnr_db, accuracy=found.accuracy,
            lost=self.accuracy - found.accuracy, interval=found.accuracy_drop_interval, said=said,
        )  # fmt: skip


def run(graph: "onnx.ModelProto", images: UInt8) -> Floats:
    """Logits ``[N, K]`` as onnxruntime's CPU provider computes them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    starts = range(0, len(images), BATCH)
    rows = [session.run(["logits"], {"image": images[i : i + BATCH]})[0] for i in starts]
    return np.concatenate(rows)


def run_ours(graph: "onnx.ModelProto", images: UInt8) -> Floats:
    """Logits ``[N, K]`` as our runtime computes them on a CPU."""
    with OnnxRuntimeEngine(graph.SerializeToString(), form="int8-cpu") as engine:
        return logits_of(engine, images, BATCH)


def forms(network: str, case: Case, judge: Judge, *, quick: bool) -> "Scores":
    """The score of each form, by engine, name and seed.

    Peers, and ours without the ladder, are calibrated on the images that ours chooses with the
    first seed.
    """
    from calibration.executor import run_exactly

    scores: Scores = {}
    validation = Judge.of(case, "validation", limit=QUICK if quick else None)
    # TensorRT keeps to what the nodes say; onnxruntime's optimisations would rewrite its graphs.
    runs: dict[str, Run] = {CPU: run_ours, TENSORRT: run_exactly}
    calibrations = _calibrations(case, SEEDS[:1] if quick else SEEDS, quick=quick)
    for seed, (calibration, images) in calibrations.items():
        ladder = PrecisionLadder(material_of(case.graph, calibration, case.spec), lambda _: None)
        for engine, form in FORMS.items():
            if seed != SEEDS[0] and (network, engine) not in BARS:
                continue  # one seed shows the order of magnitude
            rung, said = released(ladder, form, runs[engine], validation, judge)
            logits = runs[engine](rung.emitted.model, judge.images)
            scores[engine, RELEASED, seed] = judge.score(logits, said)
        if seed != SEEDS[0]:
            continue
        for engine, form in FORMS.items():
            model = EMITTERS[form](case.graph, calibration.table).model
            scores[engine, CALIBRATED, seed] = judge.score(runs[engine](model, judge.images))
        for name, peer in PEERS.items():
            model = quantize_statically(case.graph, images, peer)
            logits = (run_exactly if peer.engine == TENSORRT else run)(model, judge.images)
            scores[peer.engine, name, seed] = judge.score(logits)
        if importlib.util.find_spec("nncf") is not None:
            scores[CPU, NNCF, seed] = judge.score(_nncf(case.graph, images, judge.images))
    order = [RELEASED, CALIBRATED, *PEERS, NNCF]
    return dict(sorted(scores.items(), key=lambda item: (item[0][0], order.index(item[0][1]))))


Scores: TypeAlias = dict[tuple[str, str, int], Score]
"""By engine, form and seed."""

Run: TypeAlias = Callable[["onnx.ModelProto", UInt8], Floats]


def _calibrations(
    case: Case, seeds: Sequence[int], *, quick: bool
) -> dict[int, tuple["Calibration", UInt8]]:
    """Ours by seed, and the images ``[N, H, W, C]`` that it chose."""
    from calibration import calibrate

    settings = CalibrationSettings(images=QUICK) if quick else CalibrationSettings()
    found = {}
    with tempfile.TemporaryDirectory() as folder:  # one, where features are found again
        for seed in seeds:
            done = calibrate(
                case.graph, case.examples("train")[: 2 * QUICK if quick else None],
                case.dataset.classes, case.spec, settings, seed=seed, folder=Path(folder),
            )  # fmt: skip
            paths = [image.path for image in done.choice.chosen]
            found[seed] = (done, preprocess_batch(paths, case.spec))
    return found


def released(
    ladder: PrecisionLadder, form: str, run: Run, validation: Judge, test: Judge
) -> tuple[Rung, str]:
    """The rung that export would release, as it would find it, and a word on it.

    Without the last rung, which trains. If the gate passes none, the last that was tried.
    """
    for rung in ladder.rungs(form):
        said = rung.name
        if all(
            _passes(judge, run(rung.emitted.model, judge.images)) for judge in (validation, test)
        ):
            return rung, said
    return rung, f"refused by the gate: {said}"


def _passes(judge: Judge, logits: Floats) -> bool:
    return gate.judge(judge.quality(logits), judge.quality(judge.reference), GateSettings()).passed


def quantize_statically(graph: "onnx.ModelProto", images: UInt8, peer: Peer) -> "onnx.ModelProto":
    """``graph`` by onnxruntime's quantizer as its manual says: prepare, then quantize.

    What turns bytes into the first convolution's input is left float, as if it were not in the
    graph: the quantizer would round it twice.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[UInt8] = iter(images)

        def get_next(self) -> dict[str, UInt8] | None:
            image = next(self.rest, None)
            return None if image is None else {"image": image[None]}

    with tempfile.TemporaryDirectory() as folder:
        given, prepared, path = (f"{folder}/{n}.onnx" for n in ("given", "prepared", "int8"))
        onnx.save(graph, given)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, path, Reader(),
            activation_type=QuantType[peer.activations], weight_type=QuantType.QInt8,
            per_channel=peer.per_channel, extra_options=dict(peer.options),
            nodes_to_exclude=before_first_convolution(onnx.load(prepared)),
        )  # fmt: skip
        return onnx.load(path)


def before_first_convolution(graph: "onnx.ModelProto") -> list[str]:
    """Names of the nodes that come before the first convolution."""
    names = []
    for node in graph.graph.node:
        if node.op_type == "Conv":
            break
        names.append(node.name)
    return names


def _nncf(graph: "onnx.ModelProto", calibration: UInt8, images: UInt8) -> Floats:
    """Logits of NNCF's post-training form on OpenVINO; only where somebody installed both."""
    nncf, openvino = map(importlib.import_module, ("nncf", "openvino"))
    core = openvino.Core()
    ignored = nncf.IgnoredScope(names=before_first_convolution(graph), validate=False)
    dataset = nncf.Dataset([image[None] for image in calibration])
    quantized = nncf.quantize(
        core.read_model(graph.SerializeToString()), dataset,
        subset_size=len(calibration), ignored_scope=ignored,
    )  # fmt: skip
    # Else OpenVINO computes what is left float in bfloat16 where the processor can.
    compiled = core.compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled(image[None])["logits"] for image in images])


def forms_table(network: str, case: Case, judge: Judge, scores: Scores) -> Table:
    """One row a form and seed."""
    height, width, _ = case.spec.shape
    rows = [("float", "", "", _percent(judge.accuracy), "", "", "")]
    rows += [
        (
            f"{engine}: {form}{f', seed {seed}' if form == RELEASED else ''}",
            _percent(score.agreement), f"{score.sqnr_db:.1f}", _percent(score.accuracy),
            f"{100 * score.lost:+.2f}", " to ".join(f"{100 * end:+.1f}" for end in score.interval),
            score.said,
        )
        for (engine, form, seed), score in scores.items()
    ]  # fmt: skip
    notes = [
        f"{len(judge.labels)} test images, so that one is {100 / len(judge.labels):.2f} points; "
        "the interval is paired, with 95 % confidence below its upper end. A seed draws "
        "calibration and held-out images; validation images choose the rung, as in export. CPU "
        "forms run as onnxruntime (NNCF's as OpenVINO) runs them, TensorRT forms exactly as their "
        "nodes say. Peers are calibrated on the images that ours chooses."
    ]
    if not any(form == NNCF for _, form, _ in scores):
        notes.append("NNCF was not measured: pip install nncf openvino.")
    return Table(
        title=f"{network}, {height} x {width}",
        columns=("form", "agrees", "SQNR dB", "accuracy", "points lost", "interval", "rung"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def bars_of(network: str, scores: Scores) -> list[Bar]:
    """What is released for each engine, the mean of the seeds, held to the bars of ``network``."""
    bars = []
    for (name, engine), (agreement, sqnr, lost) in BARS.items():
        found = [score for key, score in scores.items() if key[:2] == (engine, RELEASED)]
        if name != network or not found:
            continue
        held = f"{network}, {engine}, released, {len(found)} seeds"
        if agreement is not None and sqnr is not None:
            shares = [100 * score.agreement for score in found]
            bars.append(_bar(f"{held}: agreement", shares, 100 * agreement, " %"))
            bars.append(_bar(f"{held}: SQNR", [s.sqnr_db for s in found], sqnr, " dB"))
        if lost is not None:
            gains = [-100 * score.lost for score in found]
            bars.append(_bar(f"{held}: accuracy gained", gains, -100 * lost, " points"))
    return bars


def _bar(what: str, values: Sequence[float], bar: float, unit: str) -> Bar:
    """The mean of ``values``, their extremes, and whether the mean reaches ``bar``."""
    mean = float(np.mean(values))
    return Bar(
        what=what,
        bar=f"at least {bar:g}{unit}",
        value=f"{mean:.2f}{unit} ({min(values):.2f} to {max(values):.2f})",
        holds=mean >= bar - 1e-9,
    )


def _wrong(case: Case, judge: Judge, *, quick: bool) -> tuple[Table, dict[str, object]]:
    """What becomes of images that nobody should calibrate with."""
    rows, figures = [], dict[str, object]()
    for name, images in wrong_images(case.spec, QUICK if quick else WRONG_IMAGES).items():
        model, said = calibrated_with(case, images)
        ours = None if model is None else judge.score(run(model, judge.images))
        theirs = judge.score(
            run(quantize_statically(case.graph, images, PEERS[SILENT]), judge.images)
        )
        rows.append(
            (f"{len(images)} {name}", _first_sentence(said), *_briefly(ours), *_briefly(theirs))
        )
        figures[name] = {
            "fieldfit said": said, "fieldfit": ours and ours._asdict(), "peer": theirs._asdict()
        }  # fmt: skip
    table = Table(
        title="efficientnet_lite0, calibrated with the wrong images",
        columns=(
            "images", "what fieldfit says", "agrees", "SQNR dB", "agrees: quantize_static",
            "SQNR dB: quantize_static",
        ),
        rows=tuple(rows),
        notes=(
            "CPU forms. quantize_static (U8S8 per channel) says nothing about any of these images.",
        ),
    )  # fmt: skip
    return table, figures


def wrong_images(spec: InputSpec, count: int) -> dict[str, UInt8]:
    """Images ``[count, H, W, C]`` that are not the field's, by what they are."""
    rng = np.random.default_rng(SEEDS[0])
    shape = (count, *spec.shape)
    return {
        "black frames": rng.integers(0, 3, shape, dtype=np.uint8),  # as a sensor without light
        "uniform noise": rng.integers(0, 256, shape, dtype=np.uint8),
        "gaussian noise": rng.normal(128, 48, shape).clip(0, 255).astype(np.uint8),
        "photographs": np.stack(list(itertools.islice(_crops(spec, rng), count))),
    }


def _crops(spec: InputSpec, rng: np.random.Generator) -> Iterator[UInt8]:
    """Random cuts of photographs in the input's size."""
    height, width, channels = spec.shape
    photos = [
        Image.fromarray(p).convert("L" if channels == 1 else "RGB") for p in dann.photographs()
    ]
    while True:
        for photo in photos:
            left = int(rng.integers(photo.width - width + 1))
            top = int(rng.integers(photo.height - height + 1))
            cut = photo.crop((left, top, left + width, top + height))
            yield np.asarray(cut).reshape(spec.shape)


def calibrated_with(case: Case, images: UInt8) -> "tuple[onnx.ModelProto | None, str]":
    """Our CPU form calibrated with ``images``, and what was said; no form if it was refused."""
    from calibration import calibrate, onnxruntime_dialect

    with tempfile.TemporaryDirectory() as place, _Warnings() as warnings:
        folder = Path(place)
        examples = [_example(folder / f"{i}.png", image, case) for i, image in enumerate(images)]
        try:
            done = calibrate(
                case.graph, examples, case.dataset.classes, case.spec, CalibrationSettings(),
                seed=SEEDS[0], folder=folder / "calibration", target=case.examples("validation"),
            )  # fmt: skip
        except DataError as error:
            return None, "refused: " + str(error).replace(f"{folder}/", "")
        said = f"flagged: {'; '.join(warnings.said)}" if warnings.said else "nothing"
        return onnxruntime_dialect.emit(case.graph, done.table).model, said


def _example(path: Path, image: UInt8, case: Case) -> Example:
    Image.fromarray(image.squeeze()).save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Example(path=str(path), sha256=digest, domain=case.dataset.field)


class _Warnings(logging.Handler):
    """What calibration warns of while this is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def __enter__(self) -> "_Warnings":
        logging.getLogger("calibration").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("calibration").removeHandler(self)


def _first_sentence(said: str) -> str:
    """Up to the first of several reasons."""
    first, *more = said.split(";")
    return first + ("; ..." if more else "")


def _briefly(score: Score | None) -> tuple[str, str]:
    return ("", "") if score is None else (_percent(score.agreement), f"{score.sqnr_db:.1f}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
