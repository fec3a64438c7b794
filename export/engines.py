"""Prove on the workstation that TensorRT builds an artifact, in the precision it was meant for.

Engines are never shipped: they are bound to one GPU and are executable code. What is proven
anywhere is that the graph parses, that it builds, and that each convolution that should be INT8
or FP16 is. Where there is a GPU, the engine also runs on the held-out images and is timed.
"""

from collections.abc import Callable, Collection
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import metrics
from runtime.benchmark import interleave
from runtime.engines import cudart
from runtime.engines.tensorrt_build import Built, build, conv_precisions
from runtime.engines.tensorrt_engine import TensorRTEngine
from runtime.engines.tensorrt_library import load_library
from runtime.errors import EngineError

TARGET = (8, 6)
"""Compute capability of the proof that needs no GPU: Ampere, as in RTX A2000 to A6000."""

MAX_BATCH = 16

Progress = Callable[[float, str], None]


class GpuRun(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine of this machine's GPU answered the held-out images."""

    flavour: str
    version: str
    agreement: float
    """With the answers of the same artifact on onnxruntime."""
    sqnr_db: float
    wall_ms: dict[str, float]
    """Percentiles of one call at batch 1, in milliseconds."""


class EngineProof(msgspec.Struct, frozen=True, kw_only=True):
    """What the builder made of one artifact."""

    form: str
    built: bool
    passed: bool
    reason: str
    flavour: str = ""
    version: str = ""
    target: str = ""
    seconds: float = 0.0
    plan_bytes: int = 0
    precisions: dict[str, int] = {}
    """Convolutions by the precision of the kernel that runs them."""
    gpu: GpuRun | None = None
    gpu_reason: str = ""
    """Why nothing was run on a GPU."""

    @property
    def summary(self) -> str:
        """A few words for a table."""
        if not self.built:
            return "not built"
        total = sum(self.precisions.values())
        words = f"{self.precisions.get(_precision(self.form), 0)}/{total} {_precision(self.form)}"
        return f"{words}, {self.gpu.wall_ms['p50']:.2f} ms" if self.gpu else words


def prove_engine(
    model: bytes,
    form: str,
    intended: Collection[str],
    images: npt.NDArray[np.uint8],
    logits: npt.NDArray[np.float32],
    *,
    min_agreement: float,
    progress: Progress | None = None,
) -> EngineProof:
    """Build ``model`` and read the precision of every convolution back from the builder's log.

    ``intended`` names the convolutions that must be INT8 (form ``int8``) or FP16 (``fp16``).
    ``images`` uint8 ``[N, H, W, C]`` and the ``logits [N, K]`` that onnxruntime gave for them are
    what an engine is compared with where a GPU can run it.

    Where TensorRT-RTX is not installed, e.g. on ARM, the proof says so and does not fail.
    """
    library = load_library("tensorrt-rtx")
    if isinstance(library, str):
        proof = EngineProof(form=form, built=False, passed=True, reason=library)
    else:
        proof = EngineProof(
            form=form,
            built=False,
            passed=False,
            reason="",
            flavour=library.flavour,
            version=library.version,
            target=f"SM {TARGET[0]}.{TARGET[1]}",
        )
        try:
            built = build(
                model,
                batch=(1, 1, MAX_BATCH),
                shape=images.shape[1:],
                library=library,
                target_sm=TARGET,
                level=0,  # precisions are those of higher levels; this engine is not timed
                progress=progress,
            )
        except EngineError as error:
            return msgspec.structs.replace(proof, reason=str(error))
        proof = _judge(proof, built, intended)
    return _on_gpu(proof, model, images, logits, min_agreement) if proof.passed else proof


def _judge(proof: EngineProof, built: Built, intended: Collection[str]) -> EngineProof:
    precisions = conv_precisions(built)
    counts: dict[str, int] = {}
    for precision in precisions.values():
        counts[precision] = counts.get(precision, 0) + 1
    expected = _precision(proof.form)
    wrong = [name for name in intended if precisions.get(name) != expected]
    if wrong:
        first = f"{wrong[0]} is {precisions.get(wrong[0], 'not found')}"
        reason = f"{len(wrong)} of {len(intended)} convolutions are not {expected}: {first}"
    else:
        reason = f"built by {built.flavour} {built.version} for {proof.target}"
    return msgspec.structs.replace(
        proof,
        built=True,
        passed=not wrong,
        reason=reason,
        seconds=built.seconds,
        plan_bytes=len(built.plan),
        precisions=counts,
    )


def _on_gpu(
    proof: EngineProof,
    model: bytes,
    images: npt.NDArray[np.uint8],
    logits: npt.NDArray[np.float32],
    min_agreement: float,
) -> EngineProof:
    """Run the artifact on this machine's GPU, by full TensorRT where it is installed."""

    def without(reason: Any) -> EngineProof:
        return msgspec.structs.replace(proof, gpu_reason=str(reason))

    gpu = cudart.probe()
    if isinstance(gpu, str):
        return without(gpu)
    library = load_library()
    if isinstance(library, str):
        return without(library)
    try:
        built = build(model, batch=(1, 1, MAX_BATCH), shape=images.shape[1:], library=library)
        with TensorRTEngine(built.plan, sha256=built.sha256, form=proof.form) as engine:
            rows = [
                engine.infer(np.ascontiguousarray(images[start : start + MAX_BATCH])).logits
                for start in range(0, len(images), MAX_BATCH)
            ]
            (timing,) = interleave([engine], np.ascontiguousarray(images[:1]), seconds=2.0)
    except EngineError as error:  # TensorRT-RTX refuses some GPUs that CUDA offers
        return without(error)
    answers = np.concatenate(rows)
    run = GpuRun(
        flavour=library.flavour,
        version=library.version,
        agreement=metrics.agreement(logits, answers),
        sqnr_db=min(metrics.sqnr_db(logits, answers), 200.0),
        wall_ms=timing.wall_ms,
    )
    if run.agreement >= min_agreement:
        return msgspec.structs.replace(proof, gpu=run)
    reason = (
        f"its {library.flavour} engine agrees with onnxruntime on {run.agreement:.2%} of the "
        f"images, expected {min_agreement:.2%}"
    )
    return msgspec.structs.replace(proof, gpu=run, passed=False, reason=reason)


def _precision(form: str) -> str:
    return "INT8" if form.startswith("int8") else "FP16"
