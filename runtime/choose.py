"""Choose the engine for a bundle on this machine, and say why the others were passed over.

One candidate at a time, fastest first; each is opened, asked to replay the golden samples, and
accepted or rejected with a sentence. Nothing steps down in silence.
"""

import logging
import platform
from typing import Any, NamedTuple

import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.engines.engine import Engine
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.errors import EngineError
from runtime.manifest import Artifact
from runtime.selftest import SelfTest, replay

_log = logging.getLogger(__name__)

_ENGINE = "onnxruntime CPU"

CPU_FORMS = ("int8-cpu", "fp32")
"""Fastest first. fp16 and TensorRT's forms run slower than fp32 on a CPU: not candidates."""


class Step(NamedTuple):
    """One candidate and its fate."""

    engine: str
    form: str
    accepted: bool
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.engine}, {self.form}: {'' if self.accepted else 'passed over: '}{self.reason}"
        )


class Choice(NamedTuple):
    """The opened engine, its self-test, and every step that led to it."""

    engine: Engine
    selftest: SelfTest
    steps: tuple[Step, ...]


def choose_engine(bundle: Bundle, *, form: str | None = None, threads: int | None = None) -> Choice:
    """Open the fastest engine that runs ``bundle`` here and answers as proven.

    A form that export measured to be slower than fp32, on a processor of this architecture, is
    passed over. ``form`` asks for one form, whatever its speed, and makes anything else an error.
    ``threads`` is the number of CPU threads of one call.

    Raises EngineError with every candidate's reason if none is left, or if the manifest requires
    a provider that is not to be had.
    """
    required = bundle.manifest.required_provider
    if required not in (None, "cpu"):
        raise EngineError(
            f"{bundle.path}: requires the {required} provider; this fieldfit runs onnxruntime on "
            "the CPU"
        )
    steps: list[Step] = []
    golden = bundle.golden()
    for candidate in (form,) if form else CPU_FORMS:
        slow = None if form else slower(bundle.manifest.artifact(candidate), platform.machine())
        if slow:
            step, engine, selftest = Step(_ENGINE, candidate, False, slow), None, None
        else:
            step, engine, selftest = try_form(bundle, candidate, threads, golden)
        steps.append(step)
        _log.log(logging.INFO if step.accepted else logging.WARNING, "%s", step)
        if engine is not None and selftest is not None:
            return Choice(engine, selftest, tuple(steps))
    if form:
        raise EngineError(f"{bundle.path}: {steps[0].engine}, {form}: {steps[0].reason}")
    reasons = "; ".join(str(step) for step in steps)
    raise EngineError(f"{bundle.path}: no engine can run it here: {reasons}")


def slower(artifact: Artifact | None, machine: str) -> str:
    """Why ``artifact`` loses time on a CPU of the architecture ``machine``; empty if not known to.

    A processor of another architecture has other instructions: what was measured says nothing.
    """
    if artifact is None or artifact.relative_speed is None or artifact.speed_machine != machine:
        return ""
    if artifact.relative_speed >= 1.0:
        return ""
    return (
        f"slower than fp32 where it was made ({artifact.relative_speed:.2f}x on {machine}); asking "
        "for this form runs it all the same"
    )


def try_form(
    bundle: Bundle, form: str, threads: int | None, golden: dict[str, npt.NDArray[Any]]
) -> tuple[Step, Engine | None, SelfTest | None]:
    if bundle.manifest.artifact(form) is None:
        forms = ", ".join(artifact.form for artifact in bundle.manifest.artifacts)
        return Step(_ENGINE, form, False, f"not in the bundle, which has {forms}"), None, None
    try:
        engine = OnnxRuntimeEngine(bundle.model(form), form=form, threads=threads)
        selftest = replay(engine, golden)
    except EngineError as error:
        return Step(_ENGINE, form, False, str(error)), None, None
    if not selftest.passed:
        engine.close()
        return Step(_ENGINE, form, False, f"failed its self-test: {selftest.reason}"), None, None
    return Step(_ENGINE, form, True, selftest.reason), engine, selftest
