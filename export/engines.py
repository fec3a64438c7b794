"""Prove on the workstation that TensorRT builds an artifact, in the precision it was meant for.

Engines are never shipped: they are bound to one GPU and are executable code. What is proven here
is that the graph parses, that it builds, and that each convolution that should be INT8 or FP16 is.
"""

from collections.abc import Callable, Collection

import msgspec

from runtime.engines import cudart
from runtime.engines.tensorrt_build import build, conv_precisions
from runtime.engines.tensorrt_library import load_library
from runtime.errors import EngineError

TARGET = (8, 6)
"""Compute capability to build for where there is no GPU: Ampere, as in RTX A2000 to A6000."""

LEVEL = 0
"""Builder optimization level where the engine will not be timed: precisions are the same."""


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

    @property
    def summary(self) -> str:
        """A few words for a table."""
        if not self.built:
            return "not built"
        total = sum(self.precisions.values())
        best = "INT8" if self.form.startswith("int8") else "FP16"
        return f"{self.precisions.get(best, 0)}/{total} {best}"


def prove_engine(
    model: bytes,
    form: str,
    shape: tuple[int, int, int],
    intended: Collection[str],
    progress: Callable[[float, str], None] | None = None,
) -> EngineProof:
    """Build ``model`` and read the precision of every convolution back from the builder's log.

    ``intended`` names the convolutions that must be INT8 (form ``int8``) or FP16 (``fp16``).
    Where no TensorRT is installed the proof says so and does not fail: ``built`` is False.
    """
    library = load_library()
    if isinstance(library, str):
        return EngineProof(form=form, built=False, passed=True, reason=library)
    gpu = cudart.probe()
    target = TARGET if isinstance(gpu, str) else None
    if target is not None and library.flavour != "tensorrt-rtx":
        reason = f"{library.flavour} builds only where there is a GPU: {gpu}"
        return EngineProof(form=form, built=False, passed=True, reason=reason)
    where = "this GPU" if target is None else f"SM {target[0]}.{target[1]}"
    proof = EngineProof(
        form=form,
        built=False,
        passed=False,
        reason="",
        flavour=library.flavour,
        version=library.version,
        target=where,
    )
    try:
        built = build(
            model,
            batch=(1, 1, 16),
            shape=shape,
            library=library,
            target_sm=target,
            level=LEVEL if target is not None else 3,
            progress=None if progress is None else _forward(progress),
        )
    except EngineError as error:
        return msgspec.structs.replace(proof, reason=str(error))
    precisions = conv_precisions(built)
    counts: dict[str, int] = {}
    for precision in precisions.values():
        counts[precision] = counts.get(precision, 0) + 1
    expected = "INT8" if form.startswith("int8") else "FP16"
    wrong = [n for n in intended if precisions.get(n) != expected]
    if wrong:
        first = f"{wrong[0]} is {precisions.get(wrong[0], 'not found')}"
        reason = f"{len(wrong)} of {len(intended)} convolutions are not {expected}: {first}"
    else:
        reason = f"built by {library.flavour} {library.version} for {where}"
    return msgspec.structs.replace(
        proof,
        built=True,
        passed=not wrong,
        reason=reason,
        seconds=built.seconds,
        plan_bytes=len(built.plan),
        precisions=counts,
    )


def _forward(progress: Callable[[float, str], None]) -> Callable[[float, str], bool]:
    def report(share: float, phase: str) -> bool:
        progress(share, phase)
        return True

    return report
