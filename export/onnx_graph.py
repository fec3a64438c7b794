"""Checkpoint to the fp32 ONNX graph of the contract: bytes in, logits and features out.

Input ``image`` uint8 [N, H, W, C] with dynamic N; outputs ``logits`` float32 [N, K] and
``features`` float32 [N, D]; opset 20, IR 10, one file. It does not judge: export/parity does.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from onnx import helper, numpy_helper
from onnx.onnx_pb import ModelProto, NodeProto

from runtime.errors import ExportError
from runtime.preprocess import InputSpec
from runtime.version import __version__
from train.checkpoint import CheckpointFacts
from train.model import ImageClassifier

OPSET = 20
"""JetPack 6.1 and later read it."""
IR_VERSION = 10


def to_onnx(model: ImageClassifier, facts: CheckpointFacts) -> ModelProto:
    """The graph of ``model``, checked by onnx.

    Raises ExportError if torch cannot trace the network or the result breaks the contract.
    """
    graph = _trace(model, facts.input)
    _pool_globally(graph)
    _name_nodes(graph)
    _strip(graph)
    graph.ir_version = IR_VERSION
    graph.producer_name, graph.producer_version = "fieldfit", __version__
    helper.set_model_props(
        graph,
        {
            "name": facts.name,
            "labels": json.dumps(list(facts.classes)),
            "temperature": repr(facts.temperature),
            "input": f"uint8 NHWC, {'gray' if facts.input.channels == 1 else 'RGB'}, "
            f"resize {facts.input.resize.value}",
        },
    )
    check_contract(graph, facts)
    return graph


def _trace(model: ImageClassifier, spec: InputSpec) -> ModelProto:
    # Batch 2: a traced batch of 1 is taken for a constant.
    example = torch.zeros((2, *spec.shape), dtype=torch.uint8)
    with _quietly():
        try:
            program = torch.onnx.export(
                model.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["logits", "features"],
                dynamic_shapes={"image": {0: torch.export.Dim("N")}},
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = error.__cause__ or error
            lines = str(reason).strip().splitlines() or [type(reason).__name__]
            raise ExportError(
                f"torch cannot export this architecture to ONNX: {lines[0]}; "
                "choose another [model] architecture"
            ) from error
    if program is None:
        raise ExportError("torch returned no ONNX program")
    return program.model_proto


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch's exporter prints and warns about its own progress; ours has a progress bar."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)


def _pool_globally(model: ModelProto) -> None:
    """ReduceMean over height and width becomes GlobalAveragePool, which INT8 kernels know."""
    constants = {i.name: i for i in model.graph.initializer}
    pooled: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "ReduceMean" and _spatial(node, constants):
            keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
            if not keep:
                continue
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            del node.attribute[:]
            pooled.add(node.output[0])
        elif node.op_type == "Reshape" and node.input[0] in pooled and _flattens(node, constants):
            node.op_type = "Flatten"
            del node.input[1:]
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("axis", 1))


def _spatial(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if len(node.input) < 2 or node.input[1] not in constants:
        return False
    axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
    return sorted(axis % 4 for axis in axes) == [2, 3]


def _flattens(node: NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    """Whether a Reshape after pooling makes ``[N, D]``: a target shape of two numbers."""
    shape = constants.get(node.input[1])
    return shape is None or numpy_helper.to_array(shape).size == 2


def _name_nodes(model: ModelProto) -> None:
    """Layers get the names they have in the checkpoint: people read them in reports."""
    constants = {i.name for i in model.graph.initializer}
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        weights = [name for name in node.input if name in constants and "." in name]
        name = weights[0].rpartition(".")[0] if weights else f"{node.op_type}_{index}"
        if name in taken:
            name = f"{name}_{index}"
        taken.add(name)
        node.name = name


def _strip(model: ModelProto) -> None:
    """Drop what the exporter left: stack traces with paths of this machine, unused constants."""
    del model.metadata_props[:]
    graph = model.graph
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]
    model.graph.name = "fieldfit"
    model.graph.doc_string = model.doc_string = ""
    del model.functions[:]


def check_contract(model: ModelProto, facts: CheckpointFacts) -> None:
    """Raise ExportError unless ``model`` is valid ONNX and keeps the graph contract."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
    inputs = {i.name: _type(i) for i in model.graph.input}
    outputs = {o.name: _type(o) for o in model.graph.output}
    uint8, float32 = onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT
    expected_input = {"image": (uint8, (None, *facts.input.shape))}
    if inputs != expected_input:
        raise ExportError(f"expected the input {expected_input}, got {inputs}")
    logits, features = outputs.get("logits"), outputs.get("features")
    if logits != (float32, (None, len(facts.classes))):
        raise ExportError(f"expected logits float32 [N, {len(facts.classes)}], got {logits}")
    if features is None or features[0] != float32 or len(features[1]) != 2 or features[1][0]:
        raise ExportError(f"expected features float32 [N, D] with dynamic N, got {features}")
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
        raise ExportError("expected one file, got a graph with external data")


def _type(value: onnx.ValueInfoProto) -> tuple[int, tuple[int | None, ...]]:
    tensor = value.type.tensor_type
    sides = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    return tensor.elem_type, tuple(sides)
