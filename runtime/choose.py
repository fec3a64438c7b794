"""Choose the engine for a bundle on this machine, and say why the others were passed over.

One engine at a time, fastest kind first; each is opened, asked to replay the golden samples, and
accepted or rejected with a sentence. Nothing steps down in silence, and what is required is never
replaced by something less. It does not know the engines' libraries.
"""

import itertools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy.typing as npt

from runtime import machine
from runtime.bundle import Bundle
from runtime.candidates import EngineName, Kind, Request, Round, plan_rounds
from runtime.engines import cudart
from runtime.engines.engine import BATCHES, Engine
from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.engines.onnxruntime_session import load_onnxruntime, require_gpu
from runtime.engines.plan_cache import PlanCache
from runtime.engines.tensorrt_library import installed
from runtime.errors import EngineError, EngineFault
from runtime.race import Failure, Key, Outcome, Ranking, race, rank, recall, remember
from runtime.selftest import Opened, SelfTest, replay

_log = logging.getLogger(__name__)

_WHOLE_ENGINE: tuple[EngineFault, ...] = ("missing library", "wrong version", "no device")
"""Faults of the machine: they hold for every form, so one sentence is enough."""

_REMEMBERED: tuple[EngineFault, ...] = ("not built", "failed self-test")
"""Faults that cost minutes to find again; they last until something in the key changes."""

Golden = dict[str, npt.NDArray[Any]]


class Step(NamedTuple):
    """One candidate and its fate."""

    engine: str
    form: str
    """Empty if it is about every form."""
    accepted: bool
    reason: str
    fault: EngineFault | None = None

    def __str__(self) -> str:
        name = f"{self.engine}, {self.form}" if self.form else self.engine
        return f"{name}: {'' if self.accepted else 'passed over: '}{self.reason}"


class Choice(NamedTuple):
    """The opened engine, its self-test, and every step that led to it."""

    engine: Engine
    selftest: SelfTest
    steps: tuple[Step, ...]


def choose_engine(
    bundle: Bundle,
    request: Request | None = None,
    *,
    cache: PlanCache | None = None,
    rebuild: bool = False,
) -> Choice:
    """Open the fastest engine that runs ``bundle`` here and answers as proven.

    Forms of one engine are raced against each other the first time, and the outcome is remembered
    in ``cache`` (by default ``PlanCache.default()``), as are TensorRT's plans. ``rebuild`` forgets
    what is remembered.

    Raises EngineError with every candidate's reason if none is left, and if only something less
    than ``request`` or the bundle's manifest requires is to be had.
    """
    negotiation = _Negotiation(bundle, request or Request(), cache or PlanCache.default(), rebuild)
    for around in negotiation.plan():
        opened = negotiation.run(around)
        if opened is not None:
            return negotiation.accept(around.kind, opened)
    raise negotiation.nothing_left()


def open_forms(
    bundle: Bundle, request: Request | None = None, *, cache: PlanCache | None = None
) -> tuple[Engine, ...]:
    """Open every form of ``bundle`` that one engine runs here, to compare them with each other.

    The engine is the one of ``request``, by default the one that ``choose_engine`` would choose.
    Each form has replayed the golden samples; TensorRT's plans are taken from ``cache`` or built
    into it. Forms are in the order of the manifest. The caller closes them.

    Raises EngineError as ``choose_engine`` does.
    """
    negotiation = _Negotiation(
        bundle, request or Request(), cache or PlanCache.default(), rebuild=False
    )
    rounds = negotiation.plan()
    for _, group in itertools.groupby(rounds, lambda around: around.kind):
        opened = {form: each for around in group for form, each in negotiation.run_all(around)}
        if opened:
            forms = (artifact.form for artifact in bundle.manifest.artifacts)
            return tuple(opened[form].engine for form in forms if form in opened)
    raise negotiation.nothing_left()


def prove_on_cpu(bundle: Bundle, form: str, golden: Golden) -> Step:
    """Replay the golden samples of one form on this machine's CPU, whatever else there is."""
    title = "onnxruntime CPU"
    try:
        with OnnxRuntimeEngine(bundle.model(form), form=form) as engine:
            selftest = _prove(engine, golden)
    except EngineError as error:
        return Step(title, form, False, str(error), error.fault)
    return Step(title, form, True, selftest.reason)


def _prove(engine: Engine, golden: Golden) -> SelfTest:
    selftest = replay(engine, golden)
    if not selftest.passed:
        raise EngineError(f"failed its self-test: {selftest.reason}", "failed self-test")
    return selftest


class _Negotiation:
    """One negotiation: what it works on, and the steps so far."""

    def __init__(self, bundle: Bundle, request: Request, cache: PlanCache, rebuild: bool) -> None:
        self.bundle, self.request, self.cache, self.rebuild = bundle, request, cache, rebuild
        self.golden = bundle.golden()
        self.steps: list[Step] = []
        self._gone: set[str] = set()
        """Engines that cannot be had at all."""

    def plan(self) -> list[Round]:
        """The rounds to go through; what is left out becomes a step. Raises EngineError."""
        manifest = self.bundle.manifest
        forms = [artifact.form for artifact in manifest.artifacts]
        try:
            rounds, excluded = plan_rounds(self.request, forms, manifest.required_provider)
        except EngineError as error:
            raise EngineError(f"{self.bundle.path}: {error}", error.fault) from error
        for kind, reason in excluded:
            self.add(Step(kind.title, "", False, reason, "not wanted"))
        return rounds

    def nothing_left(self) -> EngineError:
        """Every candidate's reason, once all have been passed over."""
        need = self.request.require or self.bundle.manifest.required_provider
        what = f"{need} is required and cannot be had" if need else "no engine can run it"
        faults = [step.fault for step in self.steps if step.fault not in (None, "not wanted")]
        # What ails the bundle says more than what this machine was never expected to have.
        faults.sort(key=lambda fault: fault in _WHOLE_ENGINE)
        return EngineError(
            f"{self.bundle.path}: {what} here: {'; '.join(map(str, self.steps))}",
            faults[0] if faults else "not wanted",
        )

    def run(self, around: Round) -> Opened | None:
        """The winner of this round, or None once every form has been passed over."""
        kind = around.kind
        recalled = self._recall(around)
        if recalled is None:
            return None
        key, known = recalled
        failed = dict(known.failed) if known else {}
        times = dict(known.milliseconds) if known else {}
        left = tuple(form for form in around.forms if form not in failed)
        remembered = bool(left) and all(form in times for form in left)
        ranking = self._rank(times, left) if remembered else None
        opened = self._open_in_turn(kind, ranking.order if ranking else left, failed, remembered)
        if kind.name in self._gone:
            return None
        if len(opened) > 1:
            times |= race([each.engine for each in opened.values()], self.golden["images"])
        if (times, failed) != ((known.milliseconds, known.failed) if known else ({}, {})):
            self._remember(key, times, failed)
        if not opened:
            return None
        when = f", measured {known.date}" if ranking and known else ""
        ranking = ranking or self._rank(times, tuple(opened))
        winner = next(form for form in ranking.order if form in opened)
        for form in ranking.order[ranking.order.index(winner) + 1 :]:
            if form in opened:
                opened[form].engine.close()
            self.add(Step(kind.title, form, False, ranking.reasons[form] + when, "too slow"))
        return opened[winner]

    def run_all(self, around: Round) -> list[tuple[str, Opened]]:
        """All of this round that open, in its order; nothing is raced."""
        recalled = self._recall(around)
        if recalled is None:
            return []
        key, known = recalled
        failed = dict(known.failed) if known else {}
        left = tuple(form for form in around.forms if form not in failed)
        opened = self._open_in_turn(around.kind, left, failed, only_first=False)
        if failed != (known.failed if known else {}):
            self._remember(key, dict(known.milliseconds) if known else {}, failed)
        return list(opened.items())

    def _recall(self, around: Round) -> tuple[Key, Outcome | None] | None:
        """What is remembered of this round, and its key; None if its engine cannot be had."""
        kind = around.kind
        if kind.name in self._gone:
            return None
        try:
            key = self._key(kind)
        except EngineError as error:
            self._reject(kind, "", error)
            return None
        known = None if self.rebuild else recall(self.cache.folder, key)
        for form in around.forms:
            if known and form in known.failed:
                failure = known.failed[form]
                when = f"(on {known.date}; fieldfit build --rebuild tries again)"
                self.add(Step(kind.title, form, False, f"{failure.reason} {when}", failure.fault))
        return key, known

    def _open_in_turn(
        self, kind: Kind, forms: tuple[str, ...], failed: dict[str, Failure], only_first: bool
    ) -> dict[str, Opened]:
        """Those that open, by form; into ``failed`` goes what need not be tried again."""
        opened: dict[str, Opened] = {}
        for form in forms:
            result = self._try(kind, form)
            if result is not None:
                opened[form] = result
            elif (fault := self.steps[-1].fault) in _REMEMBERED:
                failed[form] = Failure(fault, self.steps[-1].reason)
            if kind.name in self._gone or (opened and only_first):
                break
        return opened

    def _rank(self, times: Mapping[str, float], forms: tuple[str, ...]) -> Ranking:
        artifacts = self.bundle.manifest.artifacts
        sqnr_db: dict[str, float] = {a.form: a.quality.sqnr_db for a in artifacts}
        return rank({form: times.get(form, 0.0) for form in forms}, sqnr_db)

    def accept(self, kind: Kind, opened: Opened) -> Choice:
        """Close the negotiation with this engine."""
        reason = "; ".join(filter(None, (opened.selftest.reason, opened.how)))
        self.add(Step(kind.title, opened.engine.form, True, reason))
        return Choice(opened.engine, opened.selftest, tuple(self.steps))

    def add(self, step: Step) -> None:
        """Take the step down, and say it."""
        loud = not step.accepted and step.fault not in ("too slow", "not wanted")
        _log.log(logging.WARNING if loud else logging.INFO, "%s", step)
        self.steps.append(step)

    def _try(self, kind: Kind, form: str) -> Opened | None:
        try:
            return self._open(kind, form)
        except EngineError as error:
            self._reject(kind, form, error)
            return None

    def _reject(self, kind: Kind, form: str, error: EngineError) -> None:
        if error.fault in _WHOLE_ENGINE:
            self._gone.add(kind.name)
            form = ""
        self.add(Step(kind.title, form, False, str(error), error.fault))

    def _open(self, kind: Kind, form: str) -> Opened:
        # Engines are imported when it is their turn: a device has a use for one or two.
        model, shape = self.bundle.model(form), self.bundle.manifest.input.shape
        request, cache = self.request, self.cache
        engine: Engine
        match kind.name:
            case "tensorrt":
                from runtime.build import open_tensorrt

                return open_tensorrt(
                    model, form, shape, self._prove,
                    cache=cache, device=request.device, rebuild=self.rebuild,
                )  # fmt: skip
            case "onnxruntime-tensorrt":
                from runtime.engines.onnxruntime_tensorrt_engine import OnnxRuntimeTensorRTEngine

                engine = OnnxRuntimeTensorRTEngine(
                    model, form=form, shape=shape, batch=BATCHES, device=request.device,
                    cache=cache.folder and cache.folder / "onnxruntime",
                )  # fmt: skip
            case "onnxruntime-cuda":
                from runtime.engines.onnxruntime_cuda_engine import OnnxRuntimeCudaEngine

                engine = OnnxRuntimeCudaEngine(model, form=form, device=request.device)
            case "onnxruntime-cpu":
                engine = OnnxRuntimeEngine(model, form=form, threads=request.threads)
        try:
            return Opened(engine, self._prove(engine))
        except BaseException:
            engine.close()
            raise

    def _prove(self, engine: Engine) -> SelfTest:
        return _prove(engine, self.golden)

    def _key(self, kind: Kind) -> Key:
        """Of the race; EngineError if what the engine needs is not to be had on this machine."""
        request = self.request
        version, gpu = _requirements(kind.name, request.device)
        where = f"{machine.platform_tag()}, {machine.cpu_model()}"
        if gpu is not None:
            where += f", compute capability {gpu.capability}, CUDA driver {gpu.driver_version}"
        return Key(
            bundle=self.bundle.manifest.digest,
            engine=kind.name,
            version=version,
            machine=where,
            threads=request.threads or 0,
        )

    def _remember(
        self, key: Key, milliseconds: dict[str, float], failed: dict[str, Failure]
    ) -> None:
        unkept = remember(self.cache.folder, key, milliseconds, failed)
        if unkept:
            _log.warning(
                "what was measured is not kept, and is measured at every start: %s", unkept
            )


def _requirements(engine: EngineName, device: int) -> tuple[str, cudart.Device | None]:
    """The version of the engine's library, and the GPU it runs on; EngineError without them."""
    match engine:
        case "tensorrt":
            if not installed():
                raise EngineError(
                    "neither tensorrt nor tensorrt_rtx is installed", "missing library"
                )
            from runtime.build import ready

            library, gpu = ready(device)
            return f"{library.flavour} {library.version}", gpu
        case "onnxruntime-tensorrt":
            return load_onnxruntime().__version__, require_gpu("tensorrt", device)
        case "onnxruntime-cuda":
            return load_onnxruntime().__version__, require_gpu("cuda", device)
        case "onnxruntime-cpu":
            return load_onnxruntime().__version__, None
