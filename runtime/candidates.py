"""Which engines there are, which forms each can run, and in which order they are tried.

It opens nothing and asks no library: from what the bundle has and what the caller insists on
follow the rounds to go through. What is to be had on this machine is for ``choose`` to find out.
"""

from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

from runtime.errors import EngineError
from runtime.manifest import Form, Minimum

EngineName = Literal["tensorrt", "onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime-cpu"]


class Kind(NamedTuple):
    """One way to run a bundle."""

    name: EngineName
    title: str
    satisfies: tuple[Minimum, ...]
    runs: tuple[Form, ...]
    """Forms that it can run when asked to."""
    tiers: tuple[tuple[Form, ...], ...]
    """Forms that are offered by themselves. Those of one tier are raced against each other; the
    next tier is for bundles, or machines, where none of the tier before is left."""
    opt_in: bool = False
    """Tried only when asked for by name."""


KINDS = (
    Kind(
        "tensorrt",
        "TensorRT",
        ("tensorrt", "cuda"),
        ("int8-fp16", "int8", "fp16", "fp32"),
        (("int8-fp16", "int8", "fp16"), ("fp32",)),
    ),
    # A second builder and a second cache for the same kernels: for models of one's own comparison.
    Kind(
        "onnxruntime-tensorrt",
        "onnxruntime TensorRT",
        ("tensorrt", "cuda"),
        ("int8", "fp16", "fp32"),
        (("int8", "fp16"), ("fp32",)),
        opt_in=True,
    ),
    # It has no INT8 convolution kernels.
    Kind("onnxruntime-cuda", "onnxruntime CUDA", ("cuda",), ("fp16", "fp32"), (("fp16", "fp32"),)),
    # fp16 and TensorRT's INT8 forms are slower than fp32 there: right answers, so on request.
    Kind("onnxruntime-cpu", "onnxruntime CPU", (), get_args(Form), (("int8-cpu", "fp32"),)),
)


class Request(NamedTuple):
    """What the caller insists on; by default everything is left to what is proven here."""

    engine: EngineName | None = None
    """Only this engine."""
    form: str | None = None
    """Only this form, whatever its speed."""
    require: Minimum | None = None
    """Any step below it is an error: ``tensorrt``, or ``cuda`` for any engine on the GPU."""
    threads: int | None = None
    """CPU threads of one call; by default the cores this process may use."""
    device: int = 0
    """Ordinal of the CUDA device."""


class Round(NamedTuple):
    """Forms to race on one engine."""

    kind: Kind
    forms: tuple[str, ...]


class Excluded(NamedTuple):
    """An engine that is no candidate, and why."""

    kind: Kind
    reason: str


def plan_rounds(
    request: Request, forms: Collection[Form], minimum: Minimum | None
) -> tuple[list[Round], list[Excluded]]:
    """The rounds in order, and the engines that are left out, for a bundle that has ``forms``.

    ``minimum`` is what the bundle's manifest requires. Raises EngineError if what is asked for
    contradicts itself, or is not in the bundle.
    """
    _check(request, forms, minimum)
    rounds: list[Round] = []
    excluded: list[Excluded] = []
    for kind in KINDS:
        if request.engine not in (None, kind.name):
            excluded.append(Excluded(kind, f"only {request.engine} was asked for"))
        elif kind.opt_in and request.engine != kind.name:
            continue  # nobody expects it, so nothing was passed over
        elif below := [need for need in (request.require, minimum) if _below(kind, need)]:
            excluded.append(Excluded(kind, f"below the {below[0]} that is required"))
        elif request.form:
            chosen = tuple(form for form in kind.runs if form == request.form)
            if chosen:
                rounds.append(Round(kind, chosen))
            else:
                excluded.append(Excluded(kind, f"cannot run {request.form}"))
        else:
            tiers = [tuple(form for form in tier if form in forms) for tier in kind.tiers]
            rounds += [Round(kind, tier) for tier in tiers if tier]
            if not any(tiers):
                excluded.append(Excluded(kind, f"runs none of {', '.join(forms)}"))
    return rounds, excluded


def _check(request: Request, forms: Collection[Form], minimum: Minimum | None) -> None:
    if request.form and request.form not in forms:
        raise EngineError(
            f"expected one of the bundle's forms, {', '.join(forms)}, got {request.form}",
            "not wanted",
        )
    named = next((kind for kind in KINDS if kind.name == request.engine), None)
    if request.engine and named is None:
        names = ", ".join(kind.name for kind in KINDS)
        raise EngineError(f"expected an engine of {names}, got {request.engine}", "not wanted")
    for need in (request.require, minimum):
        if named and _below(named, need):
            raise EngineError(
                f"{need} is required, and {named.name} is not that; ask for one of the two",
                "not wanted",
            )
    if named and request.form and request.form not in named.runs:
        raise EngineError(
            f"{named.title} runs {', '.join(named.runs)}, not {request.form}", "not wanted"
        )


def _below(kind: Kind, need: Minimum | None) -> bool:
    return need is not None and need not in kind.satisfies
