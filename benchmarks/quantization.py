"""What INT8 costs in quality: ours against its peers, on one graph and the same images.

Also what becomes of each if somebody calibrates with the wrong images. It measures no speed
(inference does) and no calibration time (calibration does).
"""

import hashlib
import importlib
import importlib.util
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks import cases, dann
from benchmarks.cases import Case, Ints, UInt8
from benchmarks.harness import Options, Report, Table
from runtime import metrics
from runtime.dataset import Example
from runtime.errors import DataError
from runtime.preprocess import InputSpec
from runtime.recipe import CalibrationSettings

if TYPE_CHECKING:
    import onnx

Floats = npt.NDArray[np.float32]

LONG = True
"""Runs only when it is named."""

SEED = 0
BATCH = 16
QUICK, WRONG_IMAGES = 16, 64

TUNING, HELD_OUT = 64, 128
"""Training images that layers are tuned on, and that tuning is judged by."""

CPU, TENSORRT = "CPU", "TensorRT"
CALIBRATED, TUNED = "fieldfit, as calibrated", "fieldfit, tuned"
NNCF = "NNCF, default preset"
BARS = {
    ("efficientnet_lite0", CPU): (0.99, 28.0, None),
    ("efficientnet_lite0", TENSORRT): (0.985, 25.0, None),
    (cases.ARCHITECTURE, CPU): (None, None, 0.01),
}
"""Agreement and SQNR in dB at least, loss of accuracy at most."""


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
    """What a form is worth against the float graph."""

    agreement: float
    sqnr_db: float
    accuracy: float
    lost: float
    """Accuracy of the float graph less its own."""


def measure(options: Options) -> Report:
    """Quantize the bundle's network and MobileNetV2 in every way, then with wrong images.

    Raises DataError or BundleError if an input is missing.
    """
    networks = {"efficientnet_lite0": cases.exported(options.bundle)}
    if not options.quick:
        networks[cases.ARCHITECTURE] = cases.mobilenetv2()
    tables, figures = [], dict[str, object]()
    for name, case in networks.items():
        judge = Judge.of(case, limit=QUICK if options.quick else None)
        scores = forms(case, judge, quick=options.quick)
        tables.append(forms_table(name, case, judge, scores))
        figures[name] = {form: score._asdict() for (_, form), score in scores.items()}
        if name == "efficientnet_lite0":
            wrong, figures["wrong images"] = _wrong(case, judge, quick=options.quick)
    return Report(title="Quality of INT8", tables=(*tables, wrong), figures=figures)


class Judge(NamedTuple):
    """Held-out test images of a field, and what the float graph says to them."""

    images: UInt8
    labels: Ints
    reference: Floats

    @classmethod
    def of(cls, case: Case, *, limit: int | None) -> "Judge":
        """All test images of ``case``, or the first ``limit``: their order means nothing."""
        examples = case.examples("test")[:limit]
        images = case.pixels(examples)
        return cls(images, case.labels(examples), run(case.graph, images))

    @property
    def accuracy(self) -> float:
        """Accuracy of the float graph."""
        return metrics.accuracy(self.reference.argmax(axis=1), self.labels)

    def score(self, logits: Floats) -> Score:
        """What ``logits [N, K]`` are worth."""
        accuracy = metrics.accuracy(logits.argmax(axis=1), self.labels)
        return Score(
            agreement=metrics.agreement(self.reference, logits),
            sqnr_db=metrics.sqnr_db(self.reference, logits),
            accuracy=accuracy,
            lost=self.accuracy - accuracy,
        )


def run(graph: "onnx.ModelProto", images: UInt8) -> Floats:
    """Logits ``[N, K]`` as onnxruntime's CPU provider computes them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    starts = range(0, len(images), BATCH)
    rows = [session.run(["logits"], {"image": images[i : i + BATCH]})[0] for i in starts]
    return np.concatenate(rows)


def forms(case: Case, judge: Judge, *, quick: bool) -> dict[tuple[str, str], Score]:
    """The score of each form, by engine and name; all calibrated on the images ours chooses.

    No test image is seen before a form is judged: tuning holds training images out for its own
    verdicts.
    """
    from calibration import calibrate, onnxruntime_dialect, tensorrt_dialect
    from calibration.executor import run_exactly
    from calibration.images import held_out
    from calibration.tune import learn, tune

    training = case.examples("train")[: 2 * QUICK if quick else None]
    settings = CalibrationSettings(images=QUICK) if quick else CalibrationSettings()
    with tempfile.TemporaryDirectory() as folder:
        done = calibrate(
            case.graph, training, case.dataset.classes, case.spec, settings,
            seed=SEED, folder=Path(folder),
        )  # fmt: skip
    by_digest = {example.sha256: example for example in training}
    images = case.pixels([by_digest[digest] for digest in done.choice.digests])
    spare = held_out(training, done.choice, count=HELD_OUT, spec=case.spec, seed=SEED)
    # TensorRT keeps to what the nodes say; onnxruntime's optimisations would rewrite its graphs.
    runs: dict[str, Callable[[onnx.ModelProto, UInt8], Floats]] = {CPU: run, TENSORRT: run_exactly}
    few, unseen = images[:TUNING], case.pixels(spare)
    learned = learn(case.graph, few)
    graphs = {}
    for engine, dialect in ((CPU, onnxruntime_dialect), (TENSORRT, tensorrt_dialect)):
        graphs[engine, CALIBRATED] = dialect.emit(case.graph, done.table).model
        tuned = tune(case.graph, done.table, dialect.emit, few, unseen, learned=learned)
        graphs[engine, TUNED] = tuned.emitted.model
    for name, peer in PEERS.items():
        graphs[peer.engine, name] = quantize_statically(case.graph, images, peer)
    scores = {key: judge.score(runs[key[0]](graph, judge.images)) for key, graph in graphs.items()}
    if importlib.util.find_spec("nncf") is not None:
        scores[CPU, NNCF] = judge.score(_nncf(case.graph, images, judge.images))
    return dict(sorted(scores.items(), key=lambda item: item[0][0]))


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


def forms_table(
    network: str, case: Case, judge: Judge, scores: Mapping[tuple[str, str], Score]
) -> Table:
    """One row a form, and whether ours meets its bars."""
    height, width, _ = case.spec.shape
    rows = [("float", "", "", _percent(judge.accuracy), "")]
    rows += [
        (
            f"{engine}: {form}", _percent(score.agreement), f"{score.sqnr_db:.1f}",
            _percent(score.accuracy), f"{100 * score.lost:+.2f}",
        )
        for (engine, form), score in scores.items()
    ]  # fmt: skip
    notes = [
        f"{len(judge.labels)} test images, so that one is {100 / len(judge.labels):.2f} points; "
        "all forms are calibrated on the images that ours chooses. CPU forms run as onnxruntime "
        "(NNCF's as OpenVINO) runs them, TensorRT forms exactly as their nodes say."
    ]
    if (CPU, NNCF) not in scores:
        notes.append("NNCF was not measured: pip install nncf openvino.")
    return Table(
        title=f"{network}, {height} x {width}",
        columns=("form", "agrees", "SQNR dB", "accuracy", "points lost"),
        rows=tuple(rows),
        notes=(*notes, *_verdicts(network, scores)),
    )


def _verdicts(network: str, scores: Mapping[tuple[str, str], Score]) -> list[str]:
    verdicts = []
    for (name, engine), (agreement, sqnr, lost) in BARS.items():
        score = scores.get((engine, TUNED))
        if name != network or score is None:
            continue
        bars = []
        if agreement is not None and sqnr is not None:
            bars.append((f"agreement {_percent(agreement)}", score.agreement >= agreement))
            bars.append((f"{sqnr:g} dB", score.sqnr_db >= sqnr))
        if lost is not None:
            bars.append((f"{100 * lost:g} points lost", score.lost <= lost + 1e-9))
        said = ", ".join(f"{bar} {'holds' if held else 'does not hold'}" for bar, held in bars)
        verdicts.append(f"The bars of {engine}, tuned: {said}.")
    return verdicts


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
    rng = np.random.default_rng(SEED)
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
                seed=SEED, folder=folder / "calibration",
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
