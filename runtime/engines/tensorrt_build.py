"""Build a TensorRT engine from ONNX bytes: one path for TensorRT 10.3 to 11 and TensorRT-RTX.

The types in the ONNX file decide what runs: FP16 and Q/DQ are in the graph, no builder flag or
calibrator chooses. A plan is bound to this TensorRT, GPU and platform, so devices build their own.
TensorRT-RTX also builds for another GPU, on a machine that has none (``target_sm``).

It keeps nothing: where plans are cached, and under which key, is the caller's business.
"""

import hashlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from runtime.engines import cudart
from runtime.engines.tensorrt_layers import Layer, node_precisions, parse_layers
from runtime.engines.tensorrt_library import (
    Flavour,
    Heard,
    TensorRT,
    listening,
    load_library,
    logger,
)
from runtime.errors import EngineError

Progress = Callable[[float, str], bool | None]
"""Told the share done in [0, 1] and the builder's phase; returning False cancels the build."""


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

    @property
    def sha256(self) -> str:
        """Digest of the plan; record it, and let nothing else be deserialized."""
        return hashlib.sha256(self.plan).hexdigest()


def build(
    model: bytes,
    *,
    batch: tuple[int, int, int],
    shape: tuple[int, int, int],
    library: TensorRT | None = None,
    target_sm: tuple[int, int] | None = None,
    workspace_bytes: int = 1 << 30,
    level: int = 3,
    strongly_typed: bool = True,
    progress: Progress | None = None,
) -> Built:
    """Build an engine from the ONNX graph ``model``.

    ``batch`` is the smallest, the usual and the largest N; ``shape`` is [H, W, C] of ``image``.
    ``target_sm`` is the compute capability to build for, e.g. (8, 6), by default this machine's
    GPU. ``workspace_bytes`` bounds the kernels' scratch memory; a Jetson shares it with the CPU.
    ``level`` is TensorRT's builder optimization level, 0 to 5. ``strongly_typed=False`` lets
    TensorRT 8 and 10 choose between the types by builder flags: a fallback for Q/DQ graphs that
    a strongly typed network refuses (NVIDIA/TensorRT#4832).

    Raises EngineError, with the logger's text, if there is no TensorRT or GPU, if the graph does
    not parse (naming the node) or build, and if ``progress`` cancelled it. What ``progress``
    raises comes through.
    """
    library = library or _any_library()
    _check_target(library, target_sm)
    started = time.perf_counter()
    with listening(library) as heard:
        builder = _create_builder(library, heard)
        # The network borrows the parser's weights: both must live until it is built.
        network, parser = _parse(library, builder, model, strongly_typed=strongly_typed)
        config = _configure(library, builder, network, workspace_bytes, level, strongly_typed)
        if target_sm is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(_capability(library, target_sm), 0)
        _add_profile(builder, network, config, batch, shape)
        monitor = _watch(library, config, progress)
        plan = builder.build_serialized_network(network, config)
        if monitor is not None:
            monitor.reraise()
        if plan is None:
            raise EngineError(f"{library.flavour} {library.version}: no engine: {heard.reason()}")
        del parser
        return Built(
            plan=bytes(memoryview(plan)),
            layers=parse_layers(heard.layers),
            convolutions=_convolutions(library, network),
            flavour=library.flavour,
            version=library.version,
            seconds=time.perf_counter() - started,
        )


def conv_precisions(built: Built) -> dict[str, str]:
    """What each convolution of the ONNX graph computes in, by node name (see node_precisions)."""
    return node_precisions(built.layers, built.convolutions)


def _any_library() -> TensorRT:
    library = load_library()
    if isinstance(library, str):
        raise EngineError(f"expected TensorRT or TensorRT-RTX, got neither: {library}")
    return library


def _check_target(library: TensorRT, target_sm: tuple[int, int] | None) -> None:
    """Some TensorRT builds crash without a GPU, so CUDA is asked before they are."""
    if target_sm is None:
        device = cudart.probe()
        if isinstance(device, str):
            raise EngineError(f"{library.flavour}: no GPU to build for: {device}")
    elif library.flavour != "tensorrt-rtx":
        raise EngineError(
            f"{library.flavour}: builds only for the GPU it runs on, got {_sm(target_sm)}; "
            "install tensorrt-rtx-cu13 to build for another"
        )
    else:
        _capability(library, target_sm)


def _capability(library: TensorRT, target_sm: tuple[int, int]) -> Any:
    known = library.module.ComputeCapability.__members__
    if _sm(target_sm) not in known:
        names = ", ".join(name for name in known if name.startswith("SM"))
        raise EngineError(f"{library.flavour}: expected one of {names}, got {_sm(target_sm)}")
    return known[_sm(target_sm)]


def _sm(capability: tuple[int, int]) -> str:
    return f"SM{capability[0]}{capability[1]}"


def _create_builder(library: TensorRT, heard: Heard) -> Any:
    try:
        return library.module.Builder(logger(library))
    except TypeError as error:  # the bindings' way to say that the library returned nothing
        raise EngineError(f"{library.flavour}: no builder: {heard.reason()}") from error


def _parse(
    library: TensorRT, builder: Any, model: bytes, *, strongly_typed: bool
) -> tuple[Any, Any]:
    trt = library.module
    known = trt.NetworkDefinitionCreationFlag
    flags = 0
    if hasattr(known, "STRONGLY_TYPED") and strongly_typed:  # 11 and RTX are so anyway
        flags |= 1 << int(known.STRONGLY_TYPED)
    elif hasattr(known, "EXPLICIT_BATCH"):  # gone in 11
        flags |= 1 << int(known.EXPLICIT_BATCH)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger(library))
    if not model or not parser.parse(model):  # no bytes are a valid, empty message
        errors = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineError(
            f"{library.flavour} {library.version}: cannot read the ONNX graph: "
            f"{'; '.join(errors[:3]) or 'not an ONNX file'}"
        )
    return network, parser


def _describe(error: Any) -> str:
    words = " ".join(error.desc().split())
    if hasattr(error, "node_operator") and error.node_operator():  # absent in 8
        return f"{error.node_operator()} node {error.node_name()}: {words}"
    return words


def _configure(
    library: TensorRT,
    builder: Any,
    network: Any,
    workspace_bytes: int,
    level: int,
    strongly_typed: bool,
) -> Any:
    trt = library.module
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.builder_optimization_level = level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if strongly_typed and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return config
    if not hasattr(trt.BuilderFlag, "INT8"):
        raise EngineError(
            f"{library.flavour} {library.version}: always strongly typed; build with "
            "strongly_typed=True"
        )
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    quantized = any(layer.type == trt.LayerType.DEQUANTIZE for layer in layers)
    half = any(layer.get_output(0).dtype == trt.DataType.HALF for layer in layers)
    if quantized:
        config.set_flag(trt.BuilderFlag.INT8)
    if quantized or half:
        config.set_flag(trt.BuilderFlag.FP16)
    return config


def _add_profile(
    builder: Any,
    network: Any,
    config: Any,
    batch: tuple[int, int, int],
    shape: tuple[int, int, int],
) -> None:
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise EngineError(f"expected batch sizes 1 <= smallest <= usual <= largest, got {batch}")
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    shapes = {tensor.name: tuple(tensor.shape) for tensor in inputs}
    if list(shapes) != ["image"] or shapes["image"][1:] != shape:
        raise EngineError(f"expected one input, image [N, {str(list(shape))[1:]}, got {shapes}")
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *((count, *shape) for count in batch))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(
            f"the graph's image is {shapes['image']}: no profile for batch sizes {batch}; export "
            "it with a dynamic batch axis"
        )


def _convolutions(library: TensorRT, network: Any) -> tuple[str, ...]:
    kinds = (library.module.LayerType.CONVOLUTION, library.module.LayerType.DECONVOLUTION)
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return tuple(layer.name for layer in layers if layer.type in kinds)


def _watch(library: TensorRT, config: Any, progress: Progress | None) -> Any:
    """Attach a progress monitor and return it; None if there is nobody to tell, or no way to."""
    if progress is None or not hasattr(library.module, "IProgressMonitor"):  # 8 has none
        return None
    config.progress_monitor = monitor = _make_monitor(library.module, progress)
    return monitor


def _make_monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[int]] = {}  # open phases, outermost first: [done, steps]
            self.raised: BaseException | None = None
            self.cancelled = False
            self.share = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.phases[phase] = [0, max(steps, 1)]

        def phase_finish(self, phase: str) -> None:
            self.phases.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.phases:
                self.phases[phase][0] = step + 1
            self.share = max(self.share, _share(self.phases.values()))
            try:
                # Raising here would only print a traceback: it is kept until the build returns.
                if progress(self.share, next(reversed(self.phases), phase)) is False:
                    self.cancelled = True
            except BaseException as error:
                self.raised = error
            return not self.cancelled and self.raised is None

        def reraise(self) -> None:
            if self.raised is not None:
                raise self.raised
            if self.cancelled:
                raise EngineError("no engine: the build was cancelled")

    return Monitor()


def _share(phases: Any) -> float:
    """Share done of nested phases: each inner one is a part of one step of the outer."""
    share, width = 0.0, 1.0
    for done, steps in phases:
        width /= steps
        share += done * width
    return min(share, 1.0)
