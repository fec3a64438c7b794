"""Build a TensorRT engine from ONNX bytes: one path for TensorRT 10.3 to 11 and TensorRT-RTX.

The types in the ONNX file decide what runs: FP16 and Q/DQ are in the graph, no calibrator and, but
for one last resort, no builder flag chooses. A plan is bound to this TensorRT, GPU and platform,
so devices build their own. TensorRT-RTX also builds for another GPU, on a machine that has none.

A graph is built on the first of these rungs that takes it; each one that fails is recorded:

1. Strongly typed: TensorRT 10, 11 and RTX. 11 and RTX know nothing else.
2. Weakly typed, with the builder flags INT8 and FP16: only Q/DQ graphs, only on TensorRT 10, and
   only where its parser or builder refused the first rung. TensorRT 10.16.2 on Orin is reported to
   refuse float16 scales ("Could not infer output types for operation: dequantize",
   NVIDIA/TensorRT#4832); ``int8`` has float32 scales, so whoever chooses between forms has it to
   fall back on, and then ``fp16``. With flags TensorRT may round more than the file says: the
   golden samples must pass, as everywhere. TensorRT 8 has no other rung (best effort, untested).

What else goes wrong, such as too little memory, is no better on another rung and ends the build.
Engines carry no code but TensorRT's own kernels: never VERSION_COMPATIBLE, which embeds host code,
never plugins. Where plans are cached, and under which key, is the caller's business.
"""

import contextlib
import hashlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from runtime.engines import cudart
from runtime.engines.engine import has_node, refuse_compiled_code
from runtime.engines.tensorrt_layers import Layer, node_precisions, parse_layers
from runtime.engines.tensorrt_library import (
    Flavour,
    Heard,
    TensorRT,
    listening,
    load_library,
    logger,
)
from runtime.errors import EngineError, EngineFault

_log = logging.getLogger(__name__)

Progress = Callable[[float, str], bool | None]
"""Told the share done in [0, 1], which never shrinks, and the builder's phase; returning False
cancels the build. Called where one of the two changed, and by one thread at a time."""

Typing = Literal["strong", "weak"]

OLDEST = (8, 6)
"""TensorRT that is tried at all: before it there is no builder optimization level."""

OLDEST_TESTED = (10, 3)
"""JetPack 6.1's."""

WORKSPACE = 1 << 30
"""The most scratch memory that kernels are allowed, in bytes."""

LEAST_WORKSPACE = 1 << 28
"""What they are allowed even where less seems free. (TensorRT-RTX 1.7 builds EfficientNet-Lite0 for
16 images of 160 x 160 within 64 MiB in fp32 and fp16, within 128 MiB in int8.)"""


class Built(NamedTuple):
    """A serialized engine and what is known about it."""

    plan: bytes
    layers: tuple[Layer, ...]
    """Its kernels; empty where the builder's log does not list them."""
    convolutions: tuple[str, ...]
    """Names of the graph's Conv and ConvTranspose nodes."""
    flavour: Flavour
    version: str
    seconds: float
    typing: Typing
    attempts: tuple[str, ...]
    """A sentence for each rung that failed before this one, with the reason."""
    timing_cache: bytes
    """Makes the next build on this GPU and TensorRT faster; empty from TensorRT-RTX, which measures
    nothing while it builds."""
    workspace_bytes: int
    """The most scratch memory that its kernels were allowed."""
    batch: tuple[int, int, int]

    @property
    def sha256(self) -> str:
        """Digest of the plan; record it, and let nothing else be deserialized."""
        return hashlib.sha256(self.plan).hexdigest()


class _Order(NamedTuple):
    """What every rung is asked for."""

    model: bytes
    batch: tuple[int, int, int]
    shape: tuple[int, int, int]
    target_sm: tuple[int, int] | None
    workspace_bytes: int
    level: int
    timing_cache: bytes


class _Refusal(NamedTuple):
    """The parser or the builder does not take this network; typed otherwise it might be taken."""

    reason: str
    fault: EngineFault


def build(
    model: bytes,
    *,
    batch: tuple[int, int, int],
    shape: tuple[int, int, int],
    library: TensorRT | None = None,
    target_sm: tuple[int, int] | None = None,
    workspace_bytes: int | None = None,
    level: int = 3,
    typing: Literal["auto"] | Typing = "auto",
    timing_cache: bytes = b"",
    progress: Progress | None = None,
    device: int = 0,
) -> Built:
    """Build an engine from the ONNX graph ``model``.

    ``batch`` is the smallest, the usual and the largest N; ``shape`` is [H, W, C] of ``image``.
    ``target_sm`` is the compute capability to build for, e.g. (8, 6), by default that of the CUDA
    device with the ordinal ``device``. ``workspace_bytes`` bounds the kernels' scratch memory, by
    default as ``workspace_for`` says. ``level`` is TensorRT's builder optimization level, 0 to 5.
    ``typing`` is one rung of the ladder above; by default it is climbed. ``timing_cache`` is what
    an earlier build left; one that does not fit is dropped with a line in the log.

    Raises EngineError, with the logger's text, if there is no TensorRT or GPU, if the graph does
    not parse (naming the nodes) or build, and if ``progress`` cancelled it. What ``progress``
    raises comes through, and so does Ctrl-C, as KeyboardInterrupt, at the builder's next step.
    """
    library = library or _any_library()
    if reason := check_version(library):
        raise EngineError(reason, "wrong version")
    if library.flavour == "tensorrt" and _number(library) < OLDEST_TESTED:
        _log.warning("tensorrt %s: untested, 10.3 and newer are", library.version)
    refuse_compiled_code(model)
    gpu = _check_target(library, target_sm, device)
    if workspace_bytes is None:
        workspace_bytes, reason = workspace_for(gpu) if gpu else (WORKSPACE, "for another GPU")
        _log.info("%s: %s", library.flavour, reason)
    started = time.perf_counter()
    order = _Order(model, batch, shape, target_sm, workspace_bytes, level, timing_cache)
    attempts: list[str] = []
    with listening(library) as heard, _holding_interrupts() as interrupted:
        monitor = _make_monitor(library.module, progress, interrupted)
        for rung in _rungs(library, typing, model):
            if attempts:
                words = f"{library.flavour} {library.version}: {attempts[-1]}"
                _log.warning("%s; trying a %sly typed network", words, rung)
            result = _build(library, order, rung, heard, monitor)
            if isinstance(result, Built):
                seconds = time.perf_counter() - started
                return result._replace(attempts=tuple(attempts), seconds=seconds)
            attempts.append(f"{rung}ly typed: {result.reason}")
            fault = result.fault
    raise _unbuilt(library, model, attempts, fault)


def preflight(model: bytes, library: TensorRT | None = None) -> tuple[str, ...]:
    """What this TensorRT's parser cannot read of ``model``: a sentence for each node, or nothing.

    It takes a fraction of a build's time, but the builder has the last word. Raises EngineError
    if there is no TensorRT, no GPU where TensorRT needs one to parse, or if ``model`` carries
    compiled code.
    """
    library = library or _any_library()
    if reason := check_version(library):
        raise EngineError(reason, "wrong version")
    refuse_compiled_code(model)
    if library.flavour == "tensorrt":
        _check_target(library, None, 0)
    with listening(library) as heard:
        builder = _create_builder(library, heard)
        network = _create_network(library, builder, _typings(library)[0])
        parser = library.module.OnnxParser(network, logger(library))
        supports = getattr(parser, "supports_model_v2", parser.parse)  # 8 has no second version
        if model and supports(model):
            return ()
        return _said_by_parser(parser, heard)


def conv_precisions(built: Built) -> dict[str, str]:
    """What each convolution of the ONNX graph computes in, by node name (see node_precisions)."""
    return node_precisions(built.layers, built.convolutions)


def check_version(library: TensorRT) -> str:
    """Why this library builds nothing that is worth trying; empty if it may."""
    if not hasattr(library.module, "Builder"):
        return (
            f"{library.flavour} {library.version} only runs engines (the lean or dispatch "
            "runtime): expected one that builds them; install the full TensorRT"
        )
    if library.flavour == "tensorrt" and _number(library) < OLDEST:
        return (
            f"expected TensorRT 8.6 or newer, better 10.3, got {library.version}; a newer JetPack "
            "or the pip package tensorrt brings it"
        )
    return ""


def workspace_for(device: cudart.Device) -> tuple[int, str]:
    """How much scratch memory kernels may take on ``device``, in bytes, and the reason.

    Where CPU and GPU share one memory, what the builder takes the operating system loses, so it
    gets a smaller part. CUDA counts as free there only what is free right now, not what the system
    could give back (CUDA for Tegra, "Estimating Total Allocatable Device Memory on an Integrated
    GPU Device"): hence the least.
    """
    part, whose = (4, "memory that CPU and GPU share") if device.integrated else (2, "GPU memory")
    size = min(WORKSPACE, max(LEAST_WORKSPACE, device.free_bytes // part))
    bound = {WORKSPACE: ", and that is the most", LEAST_WORKSPACE: ", and that is the least"}
    return size, (
        f"up to {size >> 20:,} MiB of scratch memory: {device.free_bytes >> 20:,} MiB of {whose} "
        f"are free, of which one part in {part} may be used{bound.get(size, '')}"
    )


def _any_library() -> TensorRT:
    library = load_library()
    if isinstance(library, str):
        raise EngineError(
            f"expected TensorRT or TensorRT-RTX, got neither: {library}", "missing library"
        )
    return library


def _number(library: TensorRT) -> tuple[int, ...]:
    return tuple(int(part) for part in library.version.split(".")[:2])


def _check_target(
    library: TensorRT, target_sm: tuple[int, int] | None, device: int
) -> cudart.Device | None:
    """The GPU to build for, made the current one; None if it is that of another machine.

    Some TensorRT builds crash without a GPU, so CUDA is asked before they are.
    """
    if target_sm is None:
        gpu = cudart.probe(device)
        if isinstance(gpu, str):
            raise EngineError(f"{library.flavour}: no GPU to build for: {gpu}", "no device")
        return gpu
    if library.flavour != "tensorrt-rtx":
        raise EngineError(
            f"{library.flavour}: builds only for the GPU it runs on, got {_sm(target_sm)}; "
            "install tensorrt-rtx-cu13 to build for another",
            "no device",
        )
    _capability(library, target_sm)
    return None


def _capability(library: TensorRT, target_sm: tuple[int, int]) -> Any:
    known = library.module.ComputeCapability.__members__
    if _sm(target_sm) not in known:
        names = ", ".join(name for name in known if name.startswith("SM"))
        raise EngineError(
            f"{library.flavour}: expected one of {names}, got {_sm(target_sm)}", "no device"
        )
    return known[_sm(target_sm)]


def _sm(capability: tuple[int, int]) -> str:
    return f"SM{capability[0]}{capability[1]}"


def _typings(library: TensorRT) -> tuple[Typing, ...]:
    """How this TensorRT can type networks, the better way first."""
    strong = hasattr(library.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # not in 8
    weak = hasattr(library.module.BuilderFlag, "INT8")  # gone in 11, never in RTX
    found: tuple[tuple[Typing, bool], ...] = (("strong", strong), ("weak", weak))
    return tuple(typing for typing, there in found if there)


def _rungs(library: TensorRT, typing: Literal["auto"] | Typing, model: bytes) -> tuple[Typing, ...]:
    known = _typings(library)
    if typing == "auto":
        return known if has_node(model, "DequantizeLinear") else known[:1]
    if typing not in known:
        raise EngineError(
            f"{library.flavour} {library.version}: networks are always {known[0]}ly typed; build "
            f'with typing="auto"',
            "wrong version",
        )
    return (typing,)


def _build(
    library: TensorRT, order: _Order, rung: Typing, heard: Heard, monitor: Any
) -> Built | _Refusal:
    """One rung."""
    builder = _create_builder(library, heard)
    network = _create_network(library, builder, rung)
    # The network borrows the parser's weights: both must live until it is built.
    parser = library.module.OnnxParser(network, logger(library))
    if not order.model or not parser.parse(order.model):  # no bytes are a valid, empty message
        return _unread(_said_by_parser(parser, heard))
    config = _configure(library, builder, network, order, rung)
    _add_profile(builder, network, config, order)
    if monitor is not None:
        config.progress_monitor = monitor
    _set_timing_cache(library, config, order.timing_cache, heard)
    plan = builder.build_serialized_network(network, config)
    if monitor is not None:
        monitor.reraise()
    if plan is None:
        return _no_engine(order, heard)
    del parser
    return Built(
        plan=bytes(memoryview(plan)),
        layers=parse_layers(heard.layers),
        convolutions=_convolutions(library, network),
        flavour=library.flavour,
        version=library.version,
        seconds=0.0,
        typing=rung,
        attempts=(),
        timing_cache=_get_timing_cache(library, config),
        workspace_bytes=order.workspace_bytes,
        batch=order.batch,
    )


def _unbuilt(
    library: TensorRT, model: bytes, attempts: list[str], fault: EngineFault
) -> EngineError:
    words = "; ".join(attempts)
    if has_node(model, "DequantizeLinear") and "weak" not in _typings(library):
        words += f" ({library.flavour} {library.version} has no weakly typed networks to try next)"
    return EngineError(f"{library.flavour} {library.version}: {words}", fault)


def _unread(reasons: tuple[str, ...]) -> _Refusal:
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    message = f"cannot read the ONNX graph: {'; '.join(reasons[:3])}{more}"
    named = any(" node " in reason for reason in reasons)
    return _Refusal(message, "not built" if named else "refused artifact")


def _no_engine(order: _Order, heard: Heard) -> _Refusal:
    """Raises EngineError for want of memory, which no rung has more of."""
    reason = heard.reason()
    # As TensorRT and Myelin, the compiler inside it, spell it.
    if not any(word in reason.lower() for word in ("outofmemory", "out of memory", "workspace")):
        return _Refusal(f"no engine: {reason}", "not built")
    raise EngineError(
        f"no engine: {reason}; kernels were allowed {order.workspace_bytes:,} bytes of scratch "
        f"memory for batches of up to {order.batch[2]}: build for smaller batches, free memory "
        "(close other programs, add swap), or allow more by workspace_bytes",
        "not built",
    )


def _create_builder(library: TensorRT, heard: Heard) -> Any:
    try:
        return library.module.Builder(logger(library))
    except TypeError as error:  # the bindings' way to say that the library returned nothing
        raise EngineError(
            f"{library.flavour}: no builder: {heard.reason()}", "not built"
        ) from error


def _create_network(library: TensorRT, builder: Any, typing: Typing) -> Any:
    flags = library.module.NetworkDefinitionCreationFlag
    if typing == "strong":
        return builder.create_network(1 << int(flags.STRONGLY_TYPED))
    return builder.create_network(1 << int(flags.EXPLICIT_BATCH))


def _said_by_parser(parser: Any, heard: Heard) -> tuple[str, ...]:
    """Its errors, a sentence each; what only the logger was told if it has none."""
    logged = heard.errors and heard.reason()
    errors = (parser.get_error(index) for index in range(parser.num_errors))
    found = tuple(dict.fromkeys(_describe(error) for error in errors))
    return found or (logged or "not an ONNX file",)


def _describe(error: Any) -> str:
    words = " ".join(error.desc().split())
    if hasattr(error, "node_operator") and error.node_operator():  # absent in 8
        return f"{error.node_operator()} node {error.node_name()}: {words}"
    return words


def _configure(library: TensorRT, builder: Any, network: Any, order: _Order, rung: Typing) -> Any:
    trt = library.module
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.workspace_bytes)
    config.builder_optimization_level = order.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if order.target_sm is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(library, order.target_sm), 0)
    if rung == "strong":
        return config
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    quantized = any(layer.type == trt.LayerType.DEQUANTIZE for layer in layers)
    half = any(layer.get_output(0).dtype == trt.DataType.HALF for layer in layers)
    if quantized:
        config.set_flag(trt.BuilderFlag.INT8)
    if quantized or half:
        config.set_flag(trt.BuilderFlag.FP16)
    return config


def _set_timing_cache(library: TensorRT, config: Any, data: bytes, heard: Heard) -> None:
    if library.flavour != "tensorrt":  # RTX takes one, warns of deprecation, and ignores it
        return
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        _log.warning(
            "tensorrt %s: the timing cache of %s bytes is damaged, or of another GPU or TensorRT: "
            "dropped (%s)",
            library.version,
            f"{len(data):,}",
            heard.reason(),
        )
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _get_timing_cache(library: TensorRT, config: Any) -> bytes:
    if library.flavour != "tensorrt":
        return b""
    return bytes(memoryview(config.get_timing_cache().serialize()))


def _add_profile(builder: Any, network: Any, config: Any, order: _Order) -> None:
    batch, shape = order.batch, order.shape
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise EngineError(
            f"expected batch sizes 1 <= smallest <= usual <= largest, got {batch}", "not built"
        )
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    shapes = {tensor.name: tuple(tensor.shape) for tensor in inputs}
    if list(shapes) != ["image"] or shapes["image"][1:] != shape:
        raise EngineError(
            f"expected one input, image [N, {str(list(shape))[1:]}, got {shapes}",
            "refused artifact",
        )
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *((count, *shape) for count in batch))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(
            f"the graph's image is {shapes['image']}: no profile for batch sizes {batch}; export "
            "it with a dynamic batch axis",
            "refused artifact",
        )


def _convolutions(library: TensorRT, network: Any) -> tuple[str, ...]:
    kinds = (library.module.LayerType.CONVOLUTION, library.module.LayerType.DECONVOLUTION)
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return tuple(layer.name for layer in layers if layer.type in kinds)


@contextlib.contextmanager
def _holding_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until the end, and tell meanwhile whether it came.

    Raised in one of the builder's callbacks, most of all the logger, it would be printed and lost.
    Handlers of the program's own stay: they need not raise.
    """
    came: list[int] = []
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt


def _make_monitor(
    trt: Any, progress: Progress | None, interrupted: Callable[[], bool]
) -> Any | None:
    """A progress monitor that tells ``progress``, if any, and cancels; None where 8 has none."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    lock = threading.Lock()  # several of the builder's threads may call

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[int]] = {}  # open phases, outermost first: [done, steps]
            self.raised: BaseException | None = None
            self.cancelled = False
            self.told = (-1.0, "")

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with lock:
                self.phases[phase] = [0, max(steps, 1)]

        def phase_finish(self, phase: str) -> None:
            with lock:
                self.phases.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            with lock:
                if phase in self.phases:
                    self.phases[phase][0] = step + 1
                # Never backwards, not even where a second rung starts over.
                share = max(self.told[0], _share(self.phases.values()))
                self._tell((share, next(reversed(self.phases), phase)))
                return not (self.cancelled or self.raised is not None or interrupted())

        def _tell(self, news: tuple[float, str]) -> None:
            over = self.cancelled or self.raised is not None
            if progress is None or over or news == self.told:
                return
            self.told = news
            try:
                # Raising would only print a traceback: it is kept until the build returns.
                self.cancelled = progress(*news) is False
            except BaseException as error:
                self.raised = error

        def reraise(self) -> None:
            if self.raised is not None:
                raise self.raised
            if interrupted():
                raise KeyboardInterrupt
            if self.cancelled:
                raise EngineError("no engine: the build was cancelled", "not wanted")

    return Monitor()


def _share(phases: Iterable[list[int]]) -> float:
    """Share done of nested phases: each inner one is a part of one step of the outer."""
    share, width = 0.0, 1.0
    for done, steps in phases:
        width /= steps
        share += done * width
    return min(share, 1.0)
