"""Prove on the workstation that TensorRT builds an artifact, in the precision it was meant for.

Engines are never shipped: they are bound to one GPU and are executable code. What is proven
anywhere is that the graph parses, that it builds for each generation of GPU that industrial PCs
have, and that each convolution that should be INT8 or FP16 is. Where there is a GPU, the engine
also runs on the held-out images and is timed. How a graph is built is not known here.
"""

from collections import Counter
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
from runtime.engines.tensorrt_library import TensorRT, load_library
from runtime.errors import EngineError

TARGETS = ((8, 6), (8, 9), (12, 0))
"""Compute capabilities of the proof that needs no GPU: Ampere (RTX A2000 to A6000, RTX 30), Ada
(RTX 4000 Ada, RTX 40, L4) and Blackwell (RTX PRO, RTX 50)."""

MAX_BATCH = 16

TIMED_SECONDS = 2.0

Progress = Callable[[float, str], None]


class GpuRun(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine of this machine's GPU answered the held-out images."""

    flavour: str
    version: str
    typing: str = "strong"
    attempts: tuple[str, ...] = ()
    """Ways to build it that failed first, and why."""
    agreement: float
    """With the answers of the same artifact on onnxruntime."""
    sqnr_db: float
    wall_ms: dict[str, float]
    """Percentiles of one call at batch 1, in milliseconds."""


class TargetBuild(msgspec.Struct, frozen=True, kw_only=True):
    """What the builder made of one artifact for one generation of GPU."""

    target: str
    """Compute capability, e.g. ``8.6``."""
    seconds: float
    plan_bytes: int
    precisions: dict[str, int]
    """Convolutions by the precision of the kernel that runs them."""


class EngineProof(msgspec.Struct, frozen=True, kw_only=True):
    """What the builder made of one artifact."""

    form: str
    passed: bool
    reason: str
    flavour: str = ""
    version: str = ""
    builds: tuple[TargetBuild, ...] = ()
    """One for each of ``TARGETS``, as far as the proof came."""
    gpu: GpuRun | None = None
    gpu_reason: str = ""
    """Why nothing was run on a GPU."""

    @property
    def built(self) -> bool:
        """Whether there is an engine at all."""
        return bool(self.builds)

    @property
    def targets(self) -> str:
        """The GPUs that it was built for, in words."""
        *others, last = (build.target for build in self.builds)
        return f"SM {', '.join(others)} and {last}" if others else f"SM {last}"

    @property
    def summary(self) -> str:
        """A few words for a table; where GPUs differ, of the one with fewest of the precision."""
        if not self.built:
            return "not built"
        precision = _precision(self.form)
        counts = min(
            (build.precisions for build in self.builds),
            key=lambda precisions: precisions.get(precision, 0),
        )
        words = f"{counts.get(precision, 0)}/{sum(counts.values())} {precision}"
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
    """Build ``model`` for each of TARGETS and read every convolution's precision from the log.

    ``intended`` names the convolutions that must be INT8 (forms ``int8`` and ``int8-fp16``) or
    FP16 (``fp16``). The first GPU that cannot be built for, or gets another precision, ends it.
    ``images`` uint8 ``[N, H, W, C]`` and the ``logits [N, K]`` that onnxruntime gave for them are
    what an engine is compared with where a GPU can run it.

    Where TensorRT-RTX is not installed, e.g. on ARM, the proof says so and does not fail.
    """
    library = load_library("tensorrt-rtx")
    if isinstance(library, str):
        proof = EngineProof(form=form, passed=True, reason=library)
    else:
        proof = _prove_builds(model, form, intended, images.shape[1:], library, progress)
    return _on_gpu(proof, model, images, logits, min_agreement) if proof.passed else proof


def _prove_builds(
    model: bytes,
    form: str,
    intended: Collection[str],
    shape: tuple[int, int, int],
    library: TensorRT,
    progress: Progress | None,
) -> EngineProof:
    proof = EngineProof(
        form=form, passed=False, reason="", flavour=library.flavour, version=library.version
    )
    try:
        for index, target in enumerate(TARGETS):
            built = build(
                model,
                batch=(1, 1, MAX_BATCH),
                shape=shape,
                library=library,
                target_sm=target,
                level=0,  # precisions are those of higher levels; this engine is not timed
                progress=progress and _part(progress, index, _words(target)),
            )
            precisions = conv_precisions(built)
            proof = msgspec.structs.replace(
                proof, builds=(*proof.builds, _record(target, built, precisions))
            )
            if wrong := _wrong(precisions, intended, _precision(form)):
                return msgspec.structs.replace(proof, reason=f"SM {_words(target)}: {wrong}")
    except EngineError as error:
        return msgspec.structs.replace(proof, reason=f"SM {_words(target)}: {error}")
    reason = f"built by {library.flavour} {library.version} for {proof.targets}"
    return msgspec.structs.replace(proof, passed=True, reason=reason)


def _part(progress: Progress, index: int, target: str) -> Progress:
    """Progress of one build among those of TARGETS."""
    return lambda share, phase: progress((index + share) / len(TARGETS), f"SM {target}: {phase}")


def _record(target: tuple[int, int], built: Built, precisions: dict[str, str]) -> TargetBuild:
    return TargetBuild(
        target=_words(target),
        seconds=built.seconds,
        plan_bytes=len(built.plan),
        precisions=dict(Counter(precisions.values())),
    )


def _wrong(precisions: dict[str, str], intended: Collection[str], expected: str) -> str:
    """Which convolutions are not what they should be; empty if all are."""
    wrong = [name for name in intended if precisions.get(name) != expected]
    if not wrong:
        return ""
    first = f"{wrong[0]} is {precisions.get(wrong[0], 'not found')}"
    return f"{len(wrong)} of {len(intended)} convolutions are not {expected}: {first}"


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
            first = np.ascontiguousarray(images[:1])
            (timing,) = interleave([engine], first, seconds=TIMED_SECONDS)
    except EngineError as error:  # TensorRT-RTX refuses some GPUs that CUDA offers
        return without(error)
    answers = np.concatenate(rows)
    run = GpuRun(
        flavour=library.flavour,
        version=library.version,
        typing=built.typing,
        attempts=built.attempts,
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


def _words(target: tuple[int, int]) -> str:
    return f"{target[0]}.{target[1]}"
