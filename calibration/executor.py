"""Run a graph piece by piece over a batch of images, and let a caller look at or replace tensors.

It does not know what is quantized. No piece is optimised, so Quantize and Dequantize nodes compute
what ONNX says they do: without stops this is the exact reference for what TensorRT is given, which
onnxruntime would rewrite otherwise. A run costs about one pass of the unfused graph.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper

from runtime.preprocess import UInt8

Array: TypeAlias = npt.NDArray[Any]

Visit: TypeAlias = Callable[[str, dict[str, Array]], None]
"""Gets the name of a stop that was just computed, and all tensors ``[N, ...]`` that are still to
be read, the stop among them. It may replace them."""

BATCH = 4
"""Images that go through a piece at a time: temporary memory is that of one batch a core."""

GROUP = 16
"""Images whose tensors are in memory at once where nothing needs all of them together."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Consecutive nodes as a model of their own."""

    stops: tuple[str, ...]
    """The tensors of its last node that the caller is shown."""
    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]
    """Tensors that nothing reads after this piece."""


class Executor:
    """Runs ``model``, pausing wherever a tensor of ``stops`` has been computed.

    ``model`` has one input, images. Sessions have one thread each and batches run side by side, so
    the result does not depend on the number of cores.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        *,
        stops: Collection[str] = (),
        outputs: Sequence[str] = ("logits",),
        given: Collection[str] = (),
    ) -> None:
        """``given`` names computed tensors that the caller has; what makes them is not run."""
        self.outputs = tuple(outputs)
        self._pieces = [
            (piece, _session(piece.model)) for piece in _cut(model, stops, outputs, given)
        ]

    def run(self, values: dict[str, Array], visit: Visit | None = None) -> dict[str, Array]:
        """The outputs ``[N, ...]`` for the inputs ``[N, ...]`` in ``values``, by name.

        ``values`` is taken over: what is no longer needed is removed from it.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for piece, session in self._pieces:
                values.update(_run(piece, session, values, pool))
                for tensor in piece.dead:
                    values.pop(tensor, None)
                if visit is not None:
                    for stop in piece.stops:
                        visit(stop, values)
        return {name: values[name] for name in self.outputs}


def groups(images: UInt8) -> Iterator[UInt8]:
    """``images`` a few at a time, for what may be summed up over several runs."""
    for start in range(0, len(images), GROUP):
        yield images[start : start + GROUP]


def run_exactly(model: onnx.ModelProto, images: UInt8) -> npt.NDArray[np.float32]:
    """The logits ``[N, K]`` of ``images`` ``[N, H, W, C]``, with no optimisation of any kind."""
    return Executor(model).run({model.graph.input[0].name: images})["logits"]


def _run(
    piece: _Piece,
    session: onnxruntime.InferenceSession,
    values: dict[str, Array],
    pool: ThreadPoolExecutor,
) -> dict[str, Array]:
    fed = {name: values[name] for name in piece.inputs}
    count = len(next(iter(fed.values())))

    def batch(start: int) -> list[Array]:
        feeds = {name: value[start : start + BATCH] for name, value in fed.items()}
        return list(session.run(list(piece.outputs), feeds))

    results: dict[str, Array] = {}
    starts = range(0, count, BATCH)
    for start, made in zip(starts, pool.map(batch, starts), strict=True):
        for name, part in zip(piece.outputs, made, strict=True):
            if name not in results:
                results[name] = np.empty((count, *part.shape[1:]), part.dtype)
            results[name][start : start + BATCH] = part
    return results


def _cut(
    model: onnx.ModelProto,
    stops: Collection[str],
    outputs: Sequence[str],
    given: Collection[str],
) -> Iterator[_Piece]:
    """The pieces of ``model`` that ``outputs`` need, in graph order."""
    light = _light(model)
    runs: list[list[onnx.NodeProto]] = [[]]
    for node in _needed(model, outputs, given):
        if light.issuperset(node.output):
            continue
        runs[-1].append(node)
        if not set(stops).isdisjoint(node.output):
            runs.append([])
    runs = [nodes for nodes in runs if nodes]
    whole = [_with_light(model, nodes, light) for nodes in runs]
    read = [_read(model, nodes) for nodes in whole]
    last = {tensor: index for index, tensors in enumerate(read) for tensor in tensors}
    types = _types(model)
    for index, (nodes, inputs) in enumerate(zip(runs, read, strict=True)):
        shown = tuple(tensor for tensor in nodes[-1].output if tensor in stops)
        made = [tensor for node in nodes for tensor in node.output if tensor]
        kept = [t for t in made if t in outputs or t in shown or last.get(t, -1) > index]
        yield _Piece(
            stops=shown,
            model=_model(model, whole[index], inputs, kept, types).SerializeToString(),
            inputs=tuple(inputs),
            outputs=tuple(kept),
            dead=tuple(t for t in inputs if last[t] == index and t not in outputs),
        )


def _light(model: onnx.ModelProto) -> set[str]:
    """What does not depend on the images' content: dequantized weights, shapes.

    It has no row for each image, so it never goes from one piece to another but is computed anew.
    """
    light = {tensor.name for tensor in model.graph.initializer} | {""}
    for node in model.graph.node:
        if node.op_type == "Shape" or light.issuperset(node.input):
            light.update(node.output)
    return light


def _needed(
    model: onnx.ModelProto, outputs: Sequence[str], given: Collection[str]
) -> list[onnx.NodeProto]:
    """The nodes behind ``given`` that ``outputs`` depend on, in graph order."""
    wanted, kept = set(outputs), []
    for node in reversed(model.graph.node):
        if (wanted - set(given)).intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _with_light(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], light: Collection[str]
) -> list[onnx.NodeProto]:
    """``nodes`` and the light ones that they read, in graph order."""
    wanted = {tensor for node in nodes for tensor in node.input}
    names, kept = {node.name for node in nodes}, []
    for node in reversed(model.graph.node):
        if node.name in names or any(t in wanted and t in light for t in node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _read(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """The tensors that ``nodes`` read and do not make, without initializers."""
    own = {tensor for node in nodes for tensor in node.output}
    own |= {tensor.name for tensor in model.graph.initializer} | {""}
    return list(dict.fromkeys(t for node in nodes for t in node.input if t not in own))


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    known = [*graph.value_info, *graph.input, *graph.output]
    return {info.name: info.type.tensor_type.elem_type for info in known}


def _model(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[str],
    outputs: Sequence[str],
    types: Mapping[str, int],
) -> onnx.ModelProto:
    used = {tensor for node in nodes for tensor in node.input}
    graph = helper.make_graph(
        nodes,
        "piece",
        [helper.make_tensor_value_info(name, types[name], None) for name in inputs],
        [helper.make_tensor_value_info(name, types[name], None) for name in outputs],
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
