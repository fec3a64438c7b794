"""A body to images that the model takes, beside the loop and the engine, in bounded memory.

It knows the protocol and the one preprocessing; no HTTP.
"""

import io
from typing import NamedTuple

from PIL import Image

from runtime.engines.engine import UInt8
from runtime.errors import DataError
from runtime.preprocess import FORMATS, InputSpec, preprocess_batch
from runtime.serving.gate import Held, Workspace
from runtime.serving.protocol import InferRequest, json_length, parse
from runtime.serving.refusal import Refusal, bad_request

_JSON_COST = 6
"""Bytes that a byte of JSON may become while it is parsed, as measured by benchmarks/serving.py."""

_PIXEL_COST = {"L": 6, "RGB": 8}
"""Bytes that a pixel may take at its worst, by Pillow's mode: RGB is kept in four, and what turns a
picture upright copies it."""

_OTHER_PIXEL_COST = 24
"""Transparency and 16 bits go through further copies."""

_SLIM_FORMATS = ("BMP", "DIB", "JPEG", "PNG", "PPM")
_DECODER_COST, _PROGRESSIVE_COST = 12, 6
"""What decoders of other formats keep of each pixel, and libjpeg of a progressive file's."""


class Ready(NamedTuple):
    """A request whose images the engine can take."""

    request: InferRequest
    images: UInt8


def ready(
    body: bytes,
    header_length: str | None,
    spec: InputSpec,
    most_images: int,
    held: Held,
    workspace: Workspace,
) -> Ready:
    """Parse an infer request and decode its images. Raises Refusal."""
    with workspace.take(_JSON_COST * json_length(len(body), header_length)):
        request = parse(body, header_length, spec.shape, most_images)
        if not isinstance(request.images, list):
            return Ready(request, request.images)
    return Ready(request, decoded(request.images, spec, held, workspace))


def decoded(images: list[bytes], spec: InputSpec, held: Held, workspace: Workspace) -> UInt8:
    """Encoded images as uint8 ``[N, H, W, C]``. Raises Refusal."""
    height, width, channels = spec.shape
    held.add(len(images) * height * width * channels)
    costs = [_cost(image, workspace.total) for image in images]
    with workspace.take(max(costs)):
        try:
            return preprocess_batch(images, spec)
        except DataError as error:
            raise bad_request(str(error)) from None


def _cost(image: bytes, most: int) -> int:
    """What decoding will take, by the header. Raises Refusal if that is more than there is."""
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            each = _pixel_cost(picture)
            pixels = picture.width * picture.height
    except Exception:  # what is wrong with it, preprocess says in a sentence
        return len(image)
    if pixels * each > most:
        raise Refusal(
            413, "too large",
            f"expected at most {most // each:,} pixels of {picture.mode} in {picture.format}, got "
            f"{pixels:,}",
        )  # fmt: skip
    return pixels * each


def _pixel_cost(picture: Image.Image) -> int:
    transparent = "transparency" in picture.info
    each = _OTHER_PIXEL_COST if transparent else _PIXEL_COST.get(picture.mode, _OTHER_PIXEL_COST)
    if picture.format not in _SLIM_FORMATS:
        each += _DECODER_COST
    if picture.info.get("progressive"):
        each += _PROGRESSIVE_COST
    return each
