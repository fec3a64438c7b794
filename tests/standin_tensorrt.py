"""A module that stands in for ``tensorrt`` as a whole, with onnxruntime and host memory behind it.

It proves **our calls and nothing about TensorRT**: that we build, cache, check, deserialize, bind,
queue, capture, copy and free in the order and with the sizes that TensorRT's documentation asks
for, with real numbers going all the way through. What TensorRT makes of a graph, how fast, how
exact, and whether it accepts it at all, only TensorRT can say.

A plan is the 28-byte header of this version, a length and a JSON of that length, and the ONNX
file. ``install`` puts it into a test, ``environment`` into a process of its own.
"""

import ctypes
import enum
import functools
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, shape_inference

from runtime.engines import cudart, tensorrt_library

HERE = Path(__file__).parent
VERSION = "10.3.0.26"
"""JetPack 6.2's; ``StandIn("11.4.0.106")`` has the newer API, without what 11 dropped."""

_Launch = ctypes.CFUNCTYPE(None, ctypes.c_long)


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, version: str = VERSION
) -> tuple["StandIn", ctypes.CDLL]:
    """Be ``tensorrt`` and the only CUDA runtime of this test; skipped without a C compiler.

    Returns the module, whose attributes make it misbehave, and the CUDA library, which counts:
    ``fakeLive()`` allocations that nobody freed, ``fakeLaunches()`` of graphs, ``fakeCopies()``
    that were queued. The environment variables ``FAKE_CUDA_*`` in fake_cudart.c make that one
    misbehave.
    """
    library = compile_cudart(folder / "libcudart.so.12")
    monkeypatch.setattr(cudart, "_candidates", lambda: iter([str(library)]))
    monkeypatch.setattr(cudart, "_loaded", None)
    module = StandIn(version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.delitem(tensorrt_library._loggers, "tensorrt", raising=False)
    return module, ctypes.CDLL(str(library))


def environment(folder: Path, version: str = VERSION) -> dict[str, str]:
    """Variables that make it ``tensorrt``, and the CUDA runtime, of another Python process."""
    compile_cudart(folder / first_soname())
    (folder / "tensorrt.py").write_text(
        "import sys\n"
        "from tests.standin_tensorrt import StandIn\n"
        f"sys.modules[__name__] = StandIn({version!r})\n"
    )
    return {"PYTHONPATH": f"{folder}:{HERE.parent}", "LD_LIBRARY_PATH": str(folder)}


def first_soname() -> str:
    """The name under which a CUDA runtime library is looked for first."""
    return cudart._SONAMES[0]


def compile_cudart(path: Path) -> Path:
    """fake_cudart.c as a shared library; a copy of its own, since it keeps counts."""
    path.write_bytes(_compiled())
    return path


@functools.cache
def _compiled() -> bytes:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler: the stand-in for libcudart is compiled")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "libcudart.so")
        command = [compiler, "-shared", "-fPIC", "-o", str(made), str(HERE / "fake_cudart.c")]
        subprocess.run(command, check=True)
        return made.read_bytes()


class StandIn(types.ModuleType):
    """The module. Set an attribute to provoke what it says."""

    unsupported: str = ""
    """This ONNX operator cannot be parsed; the parser names the first node of it."""
    refuse_strong_dequantize: bool = False
    """Q/DQ in a strongly typed network cannot be built (NVIDIA/TensorRT#4832)."""
    needs_workspace: int = 0
    """Builds fail with less workspace, in bytes: no engine, and OutOfMemory in the log."""
    refuse_plan: str = ""
    """Deserializing returns None and logs this."""
    refuse_context: str = ""
    """Creating an execution context returns None and logs this."""
    refuse_shapes: bool = False
    nan_outputs: bool = False
    fail_runs: bool = False
    fail_capture: bool = False
    """Queueing fails, but only while the stream is being captured."""
    empty_capture: bool = False
    """While the stream is being captured, queueing logs an error, succeeds, and queues nothing."""
    shares_memory: bool = True
    """False as before 10.1: contexts cannot be given memory of one size."""
    third_tensor: str = "logits"
    """Another name for the output ``logits`` of engines."""
    on_step: Callable[[], object] | None = None
    """Called at each of the builder's steps: sleep in it, or raise, or end the process."""
    on_run: Callable[[], object] | None = None
    """Called at each execution, when it runs on the device."""

    def __init__(self, version: str = VERSION) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.major = int(version.split(".")[0])
        self.logger: Any = None
        self.builds = 0
        """Engines built."""
        self.shapes_told = 0
        """Calls of set_input_shape, by all contexts."""
        self.timed = 0
        """Builds that found nothing in their timing cache."""
        self.runs: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()
        self.launch = _Launch(self._launched)
        self.host_code_allowed = False
        self._define()

    def _define(self) -> None:
        """The enumerations, of which 11 dropped some, and the classes that need the module."""

        def members(kind: str, *names: str) -> Any:
            return enum.IntEnum(kind, [(name, number) for number, name in enumerate(names)])

        old = self.major < 11
        flag = ("EXPLICIT_BATCH",) if old else ()
        self.NetworkDefinitionCreationFlag = members("Flag", *flag, "STRONGLY_TYPED")
        self.BuilderFlag = members("BuilderFlag", *(("FP16", "INT8") if old else ()), "REFIT")
        self.DataType = members("DataType", "FLOAT", "HALF", "INT8", "INT32", "UINT8", "INT64")
        self.MemoryPoolType = members("MemoryPoolType", "WORKSPACE")
        self.ProfilingVerbosity = members("ProfilingVerbosity", "LAYER_NAMES_ONLY", "DETAILED")
        self.LayerInformationFormat = members("LayerInformationFormat", "ONELINE", "JSON")
        self.ExecutionContextAllocationStrategy = members(
            "ExecutionContextAllocationStrategy", "STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"
        )
        self.TensorIOMode = members("TensorIOMode", "NONE", "INPUT", "OUTPUT")
        self.LayerType = members("LayerType", *_LAYER_TYPES.values(), "ELEMENTWISE")

        class Logger:
            Severity = members("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")

        class ProgressMonitor:
            pass

        self.ILogger, self.IProgressMonitor = Logger, ProgressMonitor
        self.Builder = functools.partial(Builder, self)
        self.OnnxParser = functools.partial(OnnxParser, self)
        self.Runtime = functools.partial(Runtime, self)

    @property
    def header(self) -> bytes:
        """What plans of this version start with."""
        numbers = [int(number) for number in self.__version__.split(".")]
        return b"ftrt" + bytes(20) + bytes([*numbers, 0][:4])

    def say(self, words: str) -> None:
        """Log an error."""
        self.logger.log(self.ILogger.Severity.ERROR, words)

    def register(self, logger: Any) -> None:
        """Remember the first logger, as TensorRT does; others are ignored."""
        self.logger = self.logger or logger

    def step(self) -> None:
        if self.on_step is not None:
            self.on_step()

    def queue(self, stream: int, run: Callable[[], None]) -> bool:
        """Let ``run`` happen on the device when ``stream`` gets there."""
        cuda = cudart.load()._library
        number = next(self._numbers)  # of two threads' runs, too
        captured = bool(cuda.fakeCapturing(ctypes.c_void_p(stream)))
        if captured and self.empty_capture:
            self.say("enqueueV3: Error Code 1: Myelin (signal failed)")
            return True

        def once() -> None:
            run()
            if not captured:
                del self.runs[number]

        self.runs[number] = once
        return not cuda.fakeLaunch(ctypes.c_void_p(stream), self.launch, ctypes.c_long(number))

    def _launched(self, number: int) -> None:
        if self.on_run is not None:
            self.on_run()
        self.runs[number]()


_LAYER_TYPES = {
    "Conv": "CONVOLUTION",
    "ConvTranspose": "DECONVOLUTION",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    "Gemm": "MATRIX_MULTIPLY",
    "Cast": "CAST",
}


class Builder:
    def __init__(self, trt: StandIn, logger: Any) -> None:
        self.trt = trt
        trt.register(logger)

    def create_network(self, flags: int = 0) -> "Network":
        strong = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return Network(self.trt, bool(flags & strong) or self.trt.major >= 11)

    def create_builder_config(self) -> "BuilderConfig":
        return BuilderConfig(self.trt)

    def create_optimization_profile(self) -> "Profile":
        return Profile()

    def build_serialized_network(self, network: "Network", config: "BuilderConfig") -> Any:
        trt = self.trt
        if not self._steps(config):
            trt.say("IBuilder::buildSerializedNetwork: Error Code 7: BuildCanceled")
            return None
        if reason := self._refusal(network, config):
            trt.say(reason)
            return None
        if config.cache is not None:
            trt.timed += config.cache.time(network.model)
        verbose = trt.ILogger.Severity.VERBOSE
        trt.logger.log(verbose, "Layers:\n" + "".join(network.describe()))
        trt.builds += 1
        settings = {"profile": config.profile, "strong": network.strong}
        text = json.dumps(settings).encode()
        return trt.header + len(text).to_bytes(4, "little") + text + network.model

    def _refusal(self, network: "Network", config: "BuilderConfig") -> str:
        quantized = any(node.op_type == "DequantizeLinear" for node in network.nodes)
        if config.profile is None:
            return (
                "Network has dynamic or shape inputs, but no optimization profile has been defined"
            )
        if quantized and network.strong and self.trt.refuse_strong_dequantize:
            return (
                "Error Code 9: Skipping tactic 0x0 due to exception [type.cpp: infer_type] Could "
                "not infer output types for operation: dequantize"
            )
        if quantized and not network.strong and self.trt.BuilderFlag.INT8 not in config.flags:
            return "Int8 precision has been set for a layer, but int8 is not configured"
        if config.workspace < self.trt.needs_workspace:
            return f"OutOfMemory (Requested size was {self.trt.needs_workspace} bytes.)"
        return ""

    def _steps(self, config: "BuilderConfig") -> bool:
        """Tell the monitor nested phases as TensorRT has them; False if it wants no more."""
        monitor = config.progress_monitor
        inner = {"Cloning network graph": 3, "Timing tactics": 4}
        root = "Building engine"
        if monitor:
            monitor.phase_start(root, None, len(inner))
        for number, (phase, steps) in enumerate(inner.items()):
            if monitor:
                monitor.phase_start(phase, root, steps)
            for step in range(steps):
                self.trt.step()
                if monitor and not monitor.step_complete(phase, step):
                    return False
            if monitor:
                monitor.phase_finish(phase)
                if not monitor.step_complete(root, number):
                    return False
        if monitor:
            monitor.phase_finish(root)
        return True


class BuilderConfig:
    def __init__(self, trt: StandIn) -> None:
        self.trt = trt
        self.builder_optimization_level = 3
        self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor: Any = None
        self.workspace = 1 << 40
        self.flags: set[int] = set()
        self.profile: list[list[int]] | None = None
        self.cache: TimingCache | None = None

    def set_memory_pool_limit(self, pool: int, size: int) -> None:
        assert pool == self.trt.MemoryPoolType.WORKSPACE
        self.workspace = size

    def set_flag(self, flag: int) -> None:
        self.flags.add(flag)

    def add_optimization_profile(self, profile: "Profile") -> int:
        if "image" not in profile.shapes:
            return -1
        self.profile = profile.shapes["image"]
        return 0

    def create_timing_cache(self, data: bytes) -> "TimingCache | None":
        start = b"timings of " + self.trt.__version__.encode() + b"\n"
        if data and not data.startswith(start):
            self.trt.say("the timing cache is damaged or of another version")
            return None
        return TimingCache(bytes(data) or start)

    def set_timing_cache(self, cache: "TimingCache", ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> "TimingCache | None":
        return self.cache


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def time(self, model: bytes) -> int:
        """1 if this model's kernels had to be timed."""
        entry = hashlib.sha256(model).hexdigest().encode()
        if entry in self.data:
            return 0
        self.data += entry + b"\n"
        return 1

    def serialize(self) -> bytes:
        return self.data


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        assert len(shapes) == 3
        self.shapes[name] = [list(shape) for shape in shapes]


class Network:
    """What the parser read: tensors and layers, which are the nodes."""

    def __init__(self, trt: StandIn, strong: bool) -> None:
        self.trt, self.strong = trt, strong
        self.model = b""
        self.nodes: list[onnx.NodeProto] = []

    def read(self, model: bytes) -> None:
        self.model = bytes(model)
        proto = shape_inference.infer_shapes(onnx.load_model_from_string(self.model))
        graph = proto.graph
        self.nodes = list(graph.node)
        self.inputs = [self._tensor(value) for value in graph.input]
        self.outputs = [self._tensor(value) for value in graph.output]
        values = [*graph.input, *graph.value_info, *graph.output]
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.types |= {value.name: value.data_type for value in graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}

    def _tensor(self, value: Any) -> Any:
        kind = value.type.tensor_type
        shape = tuple(axis.dim_value or -1 for axis in kind.shape.dim)
        return types.SimpleNamespace(name=value.name, shape=shape, dtype=self._type(kind.elem_type))

    def _type(self, element: int) -> Any:
        return self.trt.DataType[_DATA_TYPES.get(element, "FLOAT")]

    @property
    def num_layers(self) -> int:
        return len(self.nodes)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_output(self, index: int) -> Any:
        return self.outputs[index]

    def get_layer(self, index: int) -> Any:
        node = self.nodes[index]
        output = types.SimpleNamespace(
            name=node.output[0], dtype=self._type(self.types.get(node.output[0], TensorProto.FLOAT))
        )
        kind = self.trt.LayerType[_LAYER_TYPES.get(node.op_type, "ELEMENTWISE")]
        return types.SimpleNamespace(name=node.name, type=kind, get_output=lambda _: output)

    def kernels(self) -> Iterator[tuple[str, str, str]]:
        """Name, type of what it reads, and of what it writes, of each node that multiplies."""
        for node in self.nodes:
            if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
                continue
            maker = self.makers.get(node.input[0])
            quantized = maker is not None and maker.op_type == "DequantizeLinear"
            element = self.types.get(node.input[1], TensorProto.FLOAT)
            floats = "Half" if element == TensorProto.FLOAT16 else "Float"
            yield node.name, "Int8" if quantized else floats, floats

    def describe(self) -> Iterator[str]:
        """Lines of the builder's log that list the kernels."""

        def tensors(datatype: str) -> str:
            return f"[ {{ Name: t, Dimensions: [-1,1], Datatype: {datatype}, Format: (Linear) }}]"

        for name, reads, writes in self.kernels():
            yield (
                f"Name: {name}, LayerType: conv, Inputs: {tensors(reads)}, "
                f"Constants: {tensors(reads)}, Outputs: {tensors(writes)}, TacticName: standin, "
                f"StreamId: 0, Metadata: [ONNX Layer: {name}]\n"
            )


_DATA_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.INT8: "INT8",
    TensorProto.INT32: "INT32",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT64: "INT64",
}


class ParserError:
    def __init__(self, words: str, operator: str = "", name: str = "") -> None:
        self.words, self.operator, self.name = words, operator, name

    def desc(self) -> str:
        return self.words

    def node_operator(self) -> str:
        return self.operator

    def node_name(self) -> str:
        return self.name


class OnnxParser:
    def __init__(self, trt: StandIn, network: Network, logger: Any) -> None:
        self.trt, self.network = trt, network
        self.errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def supports_model_v2(self, model: bytes) -> bool:
        return self._read(model)

    def parse(self, model: bytes) -> bool:
        if not self._read(model):
            return False
        self.network.read(model)
        return True

    def _read(self, model: bytes) -> bool:
        self.errors.clear()
        try:
            graph = onnx.load_model_from_string(bytes(model)).graph
        except Exception:  # protobuf's own error, whose class differs between versions
            self.errors.append(ParserError("Failed to parse ONNX model from bytes"))
            return False
        for node in graph.node:
            if node.domain not in ("", "ai.onnx") or node.op_type == self.trt.unsupported:
                words = f"No importer registered for op: {node.op_type}"
                self.errors.append(ParserError(words, node.op_type, node.name))
                return False
        return True


class Runtime:
    def __init__(self, trt: StandIn, logger: Any) -> None:
        self.trt = trt
        trt.register(logger)

    @property
    def engine_host_code_allowed(self) -> bool:
        return self.trt.host_code_allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self.trt.host_code_allowed = value

    def deserialize_cuda_engine(self, plan: bytes) -> "Engine | None":
        trt = self.trt
        header, length = bytes(plan[:28]), int.from_bytes(plan[28:32], "little")
        if trt.refuse_plan:
            trt.say(trt.refuse_plan)
        elif header[:4] != b"ftrt":
            trt.say("header.magicTag == kEXPECTED_MAGIC_TAG failed: incompatible serialization")
        elif header != trt.header:
            trt.say("the engine was built by another version of TensorRT: please rebuild")
        else:
            try:
                settings = json.loads(plan[32 : 32 + length])
                return Engine(trt, settings, bytes(plan[32 + length :]))
            except Exception as error:  # whatever is wrong inside a plan, TensorRT returns None
                trt.say(f"Serialization assertion failed: {type(error).__name__}")
        return None


class Engine:
    """An engine over onnxruntime, of which the profile bounds the batch."""

    def __init__(self, trt: StandIn, settings: dict[str, Any], model: bytes) -> None:
        self.trt, self.settings = trt, settings
        self.network = Network(trt, settings["strong"])
        self.network.read(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        cpu = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(model, options, providers=cpu)
        tensors = [*self.network.inputs, *self.network.outputs]
        self.tensors = {self._name(tensor.name): tensor for tensor in tensors}
        self.num_io_tensors = len(tensors)
        if trt.shares_memory:
            self.device_memory_size_v2 = 512

    def _name(self, name: str) -> str:
        return self.trt.third_tensor if name == "logits" else name

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        is_input = any(tensor.name == name for tensor in self.network.inputs)
        return self.trt.TensorIOMode["INPUT" if is_input else "OUTPUT"]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.tensors[name].shape
        return shape

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert (name, profile) == ("image", 0)
        return [tuple(shape) for shape in self.settings["profile"]]

    def create_execution_context(self, strategy: int = 0) -> "Context | None":
        if self.trt.refuse_context:
            self.trt.say(self.trt.refuse_context)
            return None
        user_managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self, needs_scratch=strategy == user_managed)

    def create_engine_inspector(self) -> Any:
        return types.SimpleNamespace(get_engine_information=self._information)

    def _information(self, form: int) -> str:
        assert form == self.trt.LayerInformationFormat.JSON

        def tensors(datatype: str) -> list[dict[str, Any]]:
            return [{"Name": "t", "Dimensions": [1], "Format/Datatype": datatype}]

        layers = [
            {
                "Name": name,
                "LayerType": "CaskConvolution",
                "Inputs": tensors(reads),
                "Outputs": tensors(writes),
                "Metadata": f"[ONNX Layer: {name}]",
            }
            for name, reads, writes in self.network.kernels()
        ]
        names = list(self.tensors)
        if self.trt.major < 11:
            return json.dumps({"Layers": layers, "Bindings": names})
        return json.dumps({"Layers": layers, "I/O Tensors": [{"Name": name} for name in names]})


class Context:
    """An execution context: what it reads and writes are the addresses that it was given."""

    def __init__(self, engine: Engine, needs_scratch: bool) -> None:
        self.engine, self.needs_scratch = engine, needs_scratch
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.settled = False
        """A plain run with these shapes was queued: only then can one be captured."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.engine.trt.shapes_told += 1
        smallest, _, largest = self.engine.settings["profile"]
        fits = all(a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True))
        if name != "image" or not fits or self.engine.trt.refuse_shapes:
            return False
        self.settled = self.settled and tuple(shape) == self.shape
        self.shape = tuple(shape)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        ctypes.memset(memory, 0, size)
        self.needs_scratch = False

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.tensors

    def execute_async_v3(self, stream: int) -> bool:
        trt = self.engine.trt
        capturing = cudart.load()._library.fakeCapturing(ctypes.c_void_p(stream))
        if trt.fail_runs or self.needs_scratch or not self.shape:
            trt.say("enqueueV3: Error Code 1")
            return False
        if capturing and (trt.fail_capture or not self.settled):
            trt.say("Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)")
            return False
        self.settled = True
        return trt.queue(stream, functools.partial(self._run, self.shape, dict(self.addresses)))

    def _run(self, shape: tuple[int, ...], addresses: dict[str, int]) -> None:
        raw = ctypes.string_at(addresses["image"], int(np.prod(shape)))
        images = np.frombuffer(raw, np.uint8).reshape(shape)
        names = list(addresses)
        names.remove("image")
        outputs = self.engine.session.run(names, {"image": images})
        for name, values in zip(names, outputs, strict=True):
            # A graph whose context was told another shape since has undefined answers.
            if self.engine.trt.nan_outputs or shape != self.shape:
                values[...] = np.nan
            ctypes.memmove(addresses[name], values.tobytes(), values.nbytes)
