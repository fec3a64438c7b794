"""Requests that no client should send, drawn from a seed: the same one gives the same request.

Each is valid but for a few mutations, so that most of them come far before they fail.
"""

import io
import json
import random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.serving_client import encode

_METHODS = (*["POST"] * 40, "GET", "PUT", "HEAD", "OPTIONS", "BREW", "post")
_NAMES = ("image", "imag", "", "\u0000", "💥", "%s%n", "a" * 5000, "../../etc/passwd")
_TYPES = ("UINT8", "BYTES", "FP32", "INT64", "BOOL", "", "uint8", "%d")
_SIDES = (0, 1, 2, 3, 16, 24, 64, 65, -1, 2**31, 2**63, 10**400, 1.5, None, "1", True, [1])
_JUNK: tuple[Any, ...] = (
    None, True, -1, 1e308, 10**40, "", "💥", [], {}, [[]], {"a": {"b": [1]}}, "x" * 3000, [None] * 9
)  # fmt: skip
_HEADERS = (
    ("Inference-Header-Content-Length", ("-1", "0", "x", "9" * 30, "١", "1e3", " 5 ", "+5", "")),
    ("Content-Encoding", ("gzip", "deflate", "br")),
    ("Transfer-Encoding", ("chunked", "gzip, chunked", "identity")),
    ("Content-Length", ("-1", "x", "9" * 25, "1, 2", "0")),
    ("Expect", ("100-continue", "nonsense")),
    ("Connection", ("close", "upgrade", "keep-alive, x")),
    ("Upgrade", ("websocket", "h2c")),
    ("Authorization", ("Bearer", "Bearer \x7f", "Basic " + "A" * 4000)),
    ("Content-Type", ("", "text/html", "multipart/form-data; boundary=" + "x" * 300)),
    ("X-" + "a" * 300, ("b" * 2000,)),
)


class Case(NamedTuple):
    """One request; ``whole`` if it is HTTP as it should be, so that it must be answered."""

    data: bytes
    whole: bool


def fuzzed(seed: int, model: str, shape: tuple[int, int, int]) -> Case:
    """The request of ``seed`` to a model that takes pictures of ``shape``."""
    draw = random.Random(seed)
    path, body, headers = _valid(draw, model, shape)
    whole = True
    for _ in range(draw.randint(1, 4)):
        kind = draw.random()
        if kind < 0.45:
            body = _mutated(draw, body)
        elif kind < 0.6:
            headers = headers | {
                "Inference-Header-Content-Length": str(draw.randint(0, len(body) + 3))
            }
        elif kind < 0.75:
            name, values = draw.choice(_HEADERS)
            headers = headers | {name: draw.choice(values)}
            whole = False
        elif kind < 0.85:
            path = draw.choice((
                f"/v2/models/{model}/versions/{draw.choice(('9', '%00', '%2e%2e'))}/infer",
                f"/v2/models/{'%F0%9F' * draw.randint(1, 9)}/infer", "//v2//", "/v2?" + "a=b&" * 99,
                "/metrics", "/v2/health/ready", f"/v2/models/{model}", "/classify", "*", "/\x7f",
            ))  # fmt: skip
    data = encode(draw.choice(_METHODS), path, body, headers)
    if draw.random() < 0.1:
        data, whole = _flipped(draw, data), False
    if draw.random() < 0.05:
        data, whole = data[: draw.randint(1, len(data))], False
    return Case(data, whole)


def _valid(
    draw: random.Random, model: str, shape: tuple[int, int, int]
) -> tuple[str, bytes, dict[str, str]]:
    kind = draw.choice(("classify", "raw", "encoded", "json", "junk"))
    path = f"/v2/models/{model}/infer"
    if kind == "classify":
        return "/classify", _image(draw), {}
    count = draw.randint(1, 3)
    if kind == "junk":
        return path, _junk_request(draw, shape), {}
    if kind == "json":
        pixels = count * shape[0] * shape[1] * shape[2]
        tensor = {
            "name": "image", "shape": [count, *shape], "datatype": "UINT8",
            "data": [draw.randint(0, 255)] * pixels,
        }  # fmt: skip
        return path, json.dumps({"id": draw.choice(_NAMES), "inputs": [tensor]}).encode(), {}
    if kind == "raw":
        data = draw.randbytes(count * shape[0] * shape[1] * shape[2])
        about: dict[str, Any] = {"shape": [count, *shape], "datatype": "UINT8"}
    else:
        images = [_image(draw) for _ in range(count)]
        data = b"".join(len(one).to_bytes(4, "little") + one for one in images)
        about = {"shape": [count], "datatype": "BYTES"}
    tensor = about | {"name": "image", "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return path, head + data, {"Inference-Header-Content-Length": str(len(head))}


def _junk_request(draw: random.Random, shape: tuple[int, int, int]) -> bytes:
    """JSON of about the right form with about the wrong values."""

    def junk(value: Any) -> Any:
        return draw.choice(_JUNK) if draw.random() < 0.3 else value

    tensor = {
        "name": junk(draw.choice(_NAMES)),
        "shape": junk([draw.choice(_SIDES) for _ in range(draw.randint(0, 6))]),
        "datatype": junk(draw.choice(_TYPES)),
        "parameters": junk({"binary_data_size": draw.choice(_SIDES)}),
        "data": junk([draw.choice(_SIDES) for _ in range(draw.randint(0, 9))]),
    }
    outputs = junk([{"name": draw.choice(_NAMES), "parameters": junk({"binary_data": junk(True)})}])
    request = {
        "inputs": junk([tensor]),
        "outputs": outputs,
        "id": junk("1"),
        "parameters": junk({}),
    }
    kept = {key: value for key, value in request.items() if draw.random() < 0.9}
    return json.dumps(kept).encode()


def _image(draw: random.Random) -> bytes:
    mode = draw.choice(("L", "RGB", "RGBA", "1", "P", "I;16", "CMYK"))
    kind = draw.choice({"CMYK": ("JPEG", "TIFF"), "I;16": ("PNG", "TIFF")}.get(
        mode, ("PNG", "GIF", "TIFF", "BMP") + (("JPEG", "WEBP") if mode in ("L", "RGB") else ())
    ))  # fmt: skip
    size = draw.randint(1, 90), draw.randint(1, 90)
    if mode == "I;16":
        levels = np.frombuffer(draw.randbytes(2 * size[0] * size[1]), np.uint16)
        picture = Image.fromarray(levels.reshape(size))
    else:
        picture = Image.new(mode, size, draw.randint(0, 1 if mode == "1" else 255))
    file = io.BytesIO()
    if kind == "BMP" and mode in ("P", "1", "L", "RGB", "RGBA"):
        picture.save(file, "BMP")
    else:
        picture.save(file, kind)
    return _flipped(draw, file.getvalue()) if draw.random() < 0.5 else file.getvalue()


def _mutated(draw: random.Random, body: bytes) -> bytes:
    kind = draw.randint(0, 4)
    at = draw.randint(0, len(body))
    if kind == 0:
        return body[:at]
    if kind == 1:
        return body[:at] + draw.randbytes(draw.randint(1, 60)) + body[at:]
    if kind == 2:
        return body[:at] + body[at + draw.randint(1, 60) :]
    if kind == 3:
        return body + body[:at]
    return _flipped(draw, body)


def _flipped(draw: random.Random, data: bytes) -> bytes:
    """A few bytes changed."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)
