"""Open a form of a bundle as a TensorRT engine on this device: from the plan cache, or built here.

A plan that was just built is kept only once its answers are proven, and until then the plan that
it replaces stays. It says what it does: a build takes minutes on a small board, and whoever waits
should see why. How plans are built, run and kept is in ``runtime.engines``.
"""

import hashlib
import logging
import time

import numpy as np

from runtime import machine
from runtime.benchmark import interleave
from runtime.engines import cudart
from runtime.engines.engine import BATCHES, Engine
from runtime.engines.plan_cache import Plan, PlanCache, PlanKey, Value
from runtime.engines.tensorrt_build import Built, build, check_version
from runtime.engines.tensorrt_engine import Memory, TensorRTEngine
from runtime.engines.tensorrt_inspector import convolution_precisions, parse_inspection
from runtime.engines.tensorrt_library import TensorRT, load_library
from runtime.errors import EngineError
from runtime.selftest import Opened, Prove

_log = logging.getLogger(__name__)

LEVEL = 3
"""TensorRT's own default of its builder optimization level."""

_LOG_SECONDS = 30.0
"""How often a build says that it goes on, where there is no terminal for a progress bar."""


def open_tensorrt(
    model: bytes,
    form: str,
    shape: tuple[int, int, int],
    prove: Prove,
    *,
    cache: PlanCache,
    device: int = 0,
    rebuild: bool = False,
) -> Opened:
    """The engine of the ONNX graph ``model`` on CUDA device ``device``.

    ``shape`` is [H, W, C]. ``rebuild`` builds whatever is in ``cache``.

    Raises EngineError: missing library, wrong version, no device; not built, with what the builder
    said; failed self-test, from ``prove``.
    """
    library, gpu = ready(device)
    key = _key(library, gpu, model, form)
    why = "asked for"
    if not rebuild:
        kept = _open_kept(key, cache, prove, device)
        if isinstance(kept, Opened):
            return kept
        why = kept
    with cache.lock(key, lambda pid: _say_waiting(form, pid)) as unlocked:
        if not rebuild and not unlocked:
            kept = _open_kept(key, cache, prove, device)  # another process may just have built it
            if isinstance(kept, Opened):
                return kept
        return _build(library, gpu, key, model, shape, prove, cache, why)


def _open_kept(key: PlanKey, cache: PlanCache, prove: Prove, device: int) -> Opened | str:
    """The cached plan's engine, or why it is not used."""
    found = cache.find(key)
    if not isinstance(found, Plan):
        return found
    record = found.record
    memory: Memory = "mapped" if record.notes.get("memory") == "mapped" else "pinned"
    try:
        engine = TensorRTEngine(
            found.plan, sha256=record.sha256, form=key.form, device=device, memory=memory
        )
        return _proven(engine, prove, f"plan of {record.built}")
    except EngineError as error:
        return f"the plan of {record.built} is of no use: {error}"


def _build(
    library: TensorRT,
    gpu: cudart.Device,
    key: PlanKey,
    model: bytes,
    shape: tuple[int, int, int],
    prove: Prove,
    cache: PlanCache,
    why: str,
) -> Opened:
    _log.warning(
        "building the %s engine of %s for this GPU, once; it can take minutes (%s)",
        library.flavour, key.form, why,
    )  # fmt: skip
    with _Progress(f"{library.flavour} {key.form}") as progress:
        built = build(
            model,
            batch=BATCHES,
            shape=shape,
            library=library,
            level=LEVEL,
            timing_cache=cache.timing(key.flavour, key.version, key.gpu),
            progress=progress,
            device=gpu.ordinal,
        )
    engine, notes = _open_fastest(built, key.form, gpu)
    opened = _proven(engine, prove, "")
    kernels = _kernels(engine)
    notes |= {"graphs": engine.graph_refusal or "captured", "convolutions": kernels}
    unkept = cache.keep(
        key, built.plan, seconds=built.seconds, typing=built.typing, attempts=built.attempts,
        notes=notes,
    )  # fmt: skip
    if built.timing_cache:
        unkept = unkept or cache.keep_timing(key.flavour, key.version, key.gpu, built.timing_cache)
    how = f"built in {built.seconds:.0f} s ({built.typing}ly typed; convolutions: {kernels})"
    if built.attempts:
        how += f" after: {'; '.join(built.attempts)}"
    if unkept:
        how += f"; not kept, so it is built at every start: {unkept}"
        _log.warning("the plan is not kept, so it is built at every start: %s", unkept)
    return opened._replace(how=how)


def _kernels(engine: TensorRTEngine) -> str:
    """The convolution kernels by precision, as TensorRT's inspector has them: ``47 INT8``."""
    try:
        counts = convolution_precisions(parse_inspection(engine.layer_information()))
    except EngineError as error:  # the golden samples have passed: not knowing is no failure
        return str(error)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none told"


def _proven(engine: Engine, prove: Prove, how: str) -> Opened:
    try:
        return Opened(engine, prove(engine), how)
    except BaseException:
        engine.close()
        raise


def _open_fastest(
    built: Built, form: str, gpu: cudart.Device
) -> tuple[TensorRTEngine, dict[str, Value]]:
    """The engine, and how it was found; where GPU and CPU share memory, both ways are timed."""

    def opened(memory: Memory) -> TensorRTEngine:
        return TensorRTEngine(
            built.plan, sha256=built.sha256, form=form, device=gpu.ordinal, memory=memory
        )

    pinned = opened("pinned")
    if not gpu.integrated:
        return pinned, {"memory": "pinned"}
    try:
        mapped = opened("mapped")
    except EngineError as error:
        return pinned, {"memory": "pinned", "mapped": str(error)}
    image = np.zeros((1, *pinned.shape), np.uint8)
    milliseconds = [t.wall_ms["p50"] for t in interleave([pinned, mapped], image, seconds=0.2)]
    notes: dict[str, Value] = {"pinned_ms": milliseconds[0], "mapped_ms": milliseconds[1]}
    if milliseconds[1] < milliseconds[0]:
        pinned.close()
        return mapped, {"memory": "mapped", **notes}
    mapped.close()
    return pinned, {"memory": "pinned", **notes}


def ready(device: int) -> tuple[TensorRT, cudart.Device]:
    """TensorRT and the GPU. CUDA answers first: some TensorRT builds crash without one.

    Raises EngineError: no device, missing library, wrong version.
    """
    gpu = cudart.require(device)
    library = load_library()
    if isinstance(library, str):
        raise EngineError(f"TensorRT does not load: {library}", "missing library")
    if reason := check_version(library):
        raise EngineError(reason, "wrong version")
    return library, gpu


def _key(library: TensorRT, gpu: cudart.Device, model: bytes, form: str) -> PlanKey:
    return PlanKey(
        flavour=library.flavour,
        version=library.version,
        gpu=gpu.capability,
        platform=machine.platform_tag(),
        cuda=f"{gpu.runtime_version}, driver {gpu.driver_version}",
        model_sha256=hashlib.sha256(model).hexdigest(),
        form=form,
        options={"batch": list(BATCHES), "level": LEVEL},
    )


def _say_waiting(form: str, pid: int | None) -> None:
    _log.warning("waiting for %s, which builds %s", f"process {pid}" if pid else "a process", form)


class _Progress:
    """A bar with phase and elapsed time on a terminal; elsewhere a line now and then."""

    def __init__(self, title: str) -> None:
        from tqdm import tqdm  # a start that builds nothing need not wait for it

        self._bar = tqdm(
            total=100, desc=title, unit="%", leave=False, disable=None,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}",
        )  # fmt: skip
        self._title = title
        self._started = self._said = time.monotonic()

    def __call__(self, share: float, phase: str) -> None:
        self._bar.set_postfix_str(phase, refresh=False)
        self._bar.update(share * 100 - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= _LOG_SECONDS:
            self._said = now
            _log.warning("%s: %.0f %%, %.0f s, %s", self._title, share * 100,
                         now - self._started, phase)  # fmt: skip

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
