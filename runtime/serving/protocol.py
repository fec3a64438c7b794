"""The Open Inference Protocol, version 2, with binary tensors: bytes in, tensors out, and back.

KServe's "Open Inference Protocol (REST)" and Triton's "Binary Tensor Data Extension". The one input
is ``image``: UINT8 ``[N, H, W, C]``, the graph's own, or BYTES ``[N]``, encoded images; in JSON,
which has no bytes, those are base64. It knows no server and no model beyond the shape it takes.
"""

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from runtime import metrics
from runtime.engines.engine import Outputs, UInt8
from runtime.manifest import Manifest
from runtime.serving.refusal import Refusal, bad_request

INPUT = "image"
HEADER_LENGTH = "Inference-Header-Content-Length"

Datatype = Literal["BOOL", "BYTES", "FP32", "UINT8"]
OutputName = Literal["label", "probabilities", "abstained", "logits", "features"]

OUTPUTS: Mapping[OutputName, Datatype] = {
    "label": "BYTES",
    "probabilities": "FP32",
    "abstained": "BOOL",
    "logits": "FP32",
    "features": "FP32",
}
"""What may be asked for, and in which order it is answered."""

ON_REQUEST = "features"
"""Of OUTPUTS, what a request that names none does not get."""

_TEXT_PER_VALUE = 16
"""Characters of JSON that one value of a tensor may take, brackets and spaces included."""

_Side = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class Wanted(NamedTuple):
    """One output that a request asks for, and whether as binary data."""

    name: OutputName
    binary: bool


class InferRequest(NamedTuple):
    """What a request says: its images, raw or encoded, and what is to be told of them."""

    id: str | None
    images: UInt8 | list[bytes]
    """uint8 ``[N, H, W, C]``, or N encoded images."""
    outputs: tuple[Wanted, ...]


class _TensorParameters(msgspec.Struct):
    binary_data_size: Annotated[int, msgspec.Meta(ge=0)] | None = None
    shared_memory_region: msgspec.Raw = msgspec.Raw()


class _Tensor(msgspec.Struct):
    name: str
    shape: Annotated[list[_Side], msgspec.Meta(max_length=8)]
    datatype: str
    parameters: _TensorParameters | None = None
    data: msgspec.Raw = msgspec.Raw()


class _OutputParameters(msgspec.Struct):
    binary_data: bool | None = None
    classification: msgspec.Raw = msgspec.Raw()
    shared_memory_region: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct):
    name: str
    parameters: _OutputParameters | None = None


class _Parameters(msgspec.Struct):
    binary_data_output: bool = False


class _Request(msgspec.Struct):
    inputs: Annotated[list[_Tensor], msgspec.Meta(max_length=16)]
    id: str | None = None
    parameters: _Parameters | None = None
    outputs: Annotated[list[_Output], msgspec.Meta(max_length=16)] | None = None


_decode = msgspec.json.Decoder(_Request).decode
_decode_levels = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, le=255)]]).decode
_decode_texts = msgspec.json.Decoder(list[str]).decode
_NOT_FLAT = bytes.maketrans(b"", b""), b"[] \t\r\n"


def json_length(body_length: int, header_length: str | None) -> int:
    """How many bytes of a body are JSON; the rest is binary data.

    Raises Refusal for a header that is no number, or more than there is.
    """
    if header_length is None:
        return body_length
    number = header_length.strip()
    if not (number.isascii() and number.isdecimal() and len(number) < 12):
        raise bad_request(f"{HEADER_LENGTH}: expected a number of bytes, got {number[:40]!r}")
    if int(number) > body_length:
        raise bad_request(
            f"{HEADER_LENGTH}: expected at most the {body_length:,} bytes of the body, got {number}"
        )
    return int(number)


def parse(
    body: bytes, header_length: str | None, shape: tuple[int, int, int], most_images: int
) -> InferRequest:
    """Read the body of an infer request for a model that takes pictures of ``shape`` (H, W, C).

    Raises Refusal with a sentence for whatever is not such a request.
    """
    length = json_length(len(body), header_length)
    view = memoryview(body)
    try:
        request = _decode(view[:length])
    except msgspec.ValidationError as error:
        raise bad_request(f"expected an infer request of the protocol: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"expected an infer request in JSON: {error}") from None
    outputs = _wanted(request)
    return InferRequest(request.id, _images(request, view[length:], shape, most_images), outputs)


def _wanted(request: _Request) -> tuple[Wanted, ...]:
    binary = request.parameters is not None and request.parameters.binary_data_output
    if not request.outputs:
        return tuple(Wanted(name, binary) for name in OUTPUTS if name != ON_REQUEST)
    return tuple(_wanted_output(output, binary) for output in request.outputs)


def _wanted_output(output: _Output, binary: bool) -> Wanted:
    name = next((name for name in OUTPUTS if name == output.name), None)
    if name is None:
        raise bad_request(
            f"outputs: expected some of {', '.join(OUTPUTS)}, got {output.name[:40]!r}"
        )
    parameters = output.parameters or _OutputParameters()
    if bytes(parameters.shared_memory_region):
        raise bad_request("shared memory is not offered; leave shared_memory_region out")
    if bytes(parameters.classification):
        raise bad_request("classification is not offered; ask for label and probabilities")
    return Wanted(name, binary if parameters.binary_data is None else parameters.binary_data)


def _images(
    request: _Request, binary: memoryview, shape: tuple[int, int, int], most: int
) -> UInt8 | list[bytes]:
    expected = f"expected one input {INPUT!r}, UINT8 [N, {', '.join(map(str, shape))}] or BYTES [N]"
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
        names = ", ".join(repr(tensor.name[:40]) for tensor in request.inputs) or "none"
        raise bad_request(f"{expected}, got {names}")
    (tensor,) = request.inputs
    count = tensor.shape[0] if tensor.shape else 0
    raw = tensor.datatype == "UINT8" and tuple(tensor.shape[1:]) == shape
    encoded = tensor.datatype == "BYTES" and tensor.shape[1:] in ([], [1])
    if not (raw or encoded):
        raise bad_request(f"{expected}, got {tensor.datatype[:40]} {tensor.shape}")
    if not 1 <= count <= most:
        raise bad_request(f"{expected} with N of 1 to {most}, got {count:,}")
    parameters = tensor.parameters or _TensorParameters()
    if bytes(parameters.shared_memory_region):
        raise bad_request("shared memory is not offered; send the data itself")
    size = parameters.binary_data_size
    if (size or 0) != len(binary):
        raise bad_request(
            f"binary_data_size of {INPUT}: expected the {len(binary):,} bytes after the JSON, got "
            f"{'none' if size is None else f'{size:,}'}"
        )
    if size is None:
        if raw:
            return _levels(tensor.data, (count, *shape))
        return _texts(tensor.data, count)
    if bytes(tensor.data):
        raise bad_request(f"{INPUT}: expected data or binary_data_size, got both")
    if raw:
        return _raw(binary, (count, *shape))
    return _elements(binary, count)


def _raw(binary: memoryview, shape: tuple[int, ...]) -> UInt8:
    if len(binary) != math.prod(shape):
        raise bad_request(
            f"{INPUT}: expected {math.prod(shape):,} bytes for {list(shape)}, got {len(binary):,}"
        )
    return np.frombuffer(binary, np.uint8).reshape(shape)


def _levels(data: msgspec.Raw, shape: tuple[int, ...]) -> UInt8:
    """Numbers in row-major order, flat or nested (the protocol leaves that to the client)."""
    text, count = bytes(data), math.prod(shape)
    if not text.startswith(b"["):
        raise bad_request(f"{INPUT}: expected data, a list of {count:,} numbers")
    if len(text) > _TEXT_PER_VALUE * count + 64:
        raise bad_request(f"{INPUT}: expected data of {count:,} numbers, got far more text")
    # Brackets and spaces alone: that this was JSON is known, and "1 2" is none.
    try:
        levels = _decode_levels(b"[" + text.translate(*_NOT_FLAT) + b"]")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise bad_request(f"{INPUT}: expected data of whole numbers from 0 to 255") from None
    if len(levels) != count:
        raise bad_request(
            f"{INPUT}: expected data of {count:,} numbers for {list(shape)}, got {len(levels):,}"
        )
    return np.array(levels, np.uint8).reshape(shape)


def _texts(data: msgspec.Raw, count: int) -> list[bytes]:
    try:
        texts = _decode_texts(bytes(data) or b"null")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise bad_request(f"{INPUT}: expected data, a flat list of base64 texts") from None
    if len(texts) != count:
        raise bad_request(f"{INPUT}: expected {count:,} images, got {len(texts):,}")
    try:
        return [base64.b64decode(text, validate=True) for text in texts]
    except (binascii.Error, ValueError):
        raise bad_request(
            f"{INPUT}: expected encoded images as base64, or as binary data after the JSON"
        ) from None


def _elements(binary: memoryview, count: int) -> list[bytes]:
    """Each element is its length, four bytes little endian, and its bytes."""
    elements: list[bytes] = []
    at = 0
    while at < len(binary):
        if len(elements) == count:
            raise bad_request(
                f"{INPUT}: expected {count:,} elements, got more bytes than they have"
            )
        if len(binary) - at < 4:
            raise bad_request(f"{INPUT}: element {len(elements)}: its length is cut short")
        (size,) = struct.unpack_from("<I", binary, at)
        at += 4
        if size > (left := len(binary) - at):
            raise bad_request(
                f"{INPUT}: element {len(elements)}: expected {size:,} bytes, got {left:,}"
            )
        elements.append(bytes(binary[at : at + size]))
        at += size
    if len(elements) != count:
        raise bad_request(f"{INPUT}: expected {count:,} elements, got {len(elements):,}")
    return elements


class Body(NamedTuple):
    """The body of an answer, and how much of it is JSON if the rest is binary data."""

    data: bytes
    json_length: int | None


def answer(
    request_id: str | None, wanted: Sequence[Wanted], outputs: Outputs, manifest: Manifest
) -> Body:
    """The body of an infer response."""
    tensors: list[dict[str, object]] = []
    binary: list[bytes] = []
    values = _values(outputs, manifest)
    for name, as_binary in wanted:
        value = values[name]
        tensor: dict[str, object] = {
            "name": name, "shape": list(value.shape), "datatype": OUTPUTS[name]
        }  # fmt: skip
        if as_binary:
            binary.append(_binary(value))
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            tensor["data"] = value.reshape(-1).tolist()
        tensors.append(tensor)
    said: dict[str, object] = {"model_name": manifest.name, "model_version": manifest.version}
    if request_id is not None:
        said["id"] = request_id
    head = msgspec.json.encode({**said, "outputs": tensors})
    return Body(b"".join([head, *binary]), len(head) if binary else None)


def _values(outputs: Outputs, manifest: Manifest) -> dict[OutputName, npt.NDArray[Any]]:
    probabilities = metrics.softmax(outputs.logits, temperature=manifest.temperature)
    scores = probabilities.max(axis=1)
    labels = np.array(manifest.labels, dtype=object)[probabilities.argmax(axis=1)]
    return {
        "label": labels,
        "probabilities": probabilities.astype(np.float32),
        "abstained": scores < manifest.abstain_below,
        "logits": outputs.logits,
        "features": outputs.features,
    }


def _binary(value: npt.NDArray[Any]) -> bytes:
    if value.dtype != object:
        return value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    texts = [str(text).encode() for text in value]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def model_metadata(manifest: Manifest) -> dict[str, object]:
    """What the model takes and answers; -1 is any number."""
    classes = len(manifest.labels)
    shapes = {"label": [-1], "abstained": [-1], "features": [-1, -1]}
    return {
        "name": manifest.name,
        "versions": [manifest.version],
        "platform": "fieldfit_bundle",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *manifest.input.shape]}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shapes.get(name, [-1, classes])}
            for name, datatype in OUTPUTS.items()
        ],
    }


def too_large(most: int) -> Refusal:
    """A body of more than ``most`` bytes."""
    return Refusal(
        413, "too large",
        f"expected a body of at most {most:,} bytes; send fewer or smaller images at a time",
    )  # fmt: skip
