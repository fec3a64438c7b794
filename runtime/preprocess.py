"""Pixels in, model input out: the one definition that every room and the device share.

It does not know the model. Normalisation is inside the exported graph, so what this module returns
is the raw uint8 picture that the graph takes.

**Image policy**, in this order:

1. One of FORMATS, the first frame of a multi-frame file; EXIF orientation applied.
2. Sixteen-bit gray is mapped linearly from ``window`` (default 0..65535) to 0..255 and rounded,
   never stretched by an image's own minimum and maximum: a dark image stays dark. Of 16-bit
   colour files Pillow keeps the high byte; ``window`` does not apply to them.
3. Palette, 1-bit, CMYK, YCbCr and Lab become RGB or gray; transparency is composited on black.
4. ``channels = 1`` takes ITU-R 601 luma, ``channels = 3`` repeats gray.
5. Resize with Pillow's antialiased filters. It stays outside the graph because TensorRT has no
   antialiased Resize, and a different resize on the device is the commonest way to lose accuracy.
"""

import contextlib
import enum
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.errors import DataError

UInt8 = npt.NDArray[np.uint8]
ImageLike = str | Path | bytes | Image.Image | npt.NDArray[Any]

MAX_PIXELS = 5120 * 5120
"""Pictures above this many pixels are refused from their header, before any memory is taken: the
largest of the common factory cameras. None costs more than 256 MB while it is read.
"""

MAX_SIDE = 65_535
"""Longer sides are refused as well: tables of the resize, and single rows, would be that large."""

MAX_SCANS = 32
"""Passes over a JPEG. Encoders make a dozen of a progressive one; a file of under a megabyte that
repeats its last scan would otherwise keep the decoder busy for minutes.
"""

_STRIP = 1 << 20
"""Pixels that are converted at once, where a whole copy would double the memory."""

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})
# fmt: on
"""What counts as an image when a folder is searched, in training and on the device."""

MAX_FILE_BYTES = 512 * 1024 * 1024
"""Encoded files above this size are refused before they are read."""


FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, whatever the file is called. Pillow knows more formats, some of which start other
programs (EPS) or are seldom tested, and files may come from outside."""


_JPEG = ("JPEG", "MPO")
"""What Pillow calls them; MPO holds several, as phones write it."""

_START_OF_SCAN = b"\xff\xda"  # ITU-T T.81, table B.1


_COMMON = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM")
"""Those of FORMATS that ``Image.preinit`` brings."""

_BY_SUFFIX = {".png": ("PNG",), ".jpg": ("JPEG",), ".jpeg": ("JPEG",)}
"""What a name promises; it need not be kept."""


class Resize(str, enum.Enum):
    """How a picture is brought to the model's size (timm's crop modes)."""

    SQUASH = "squash"
    """Stretch the whole picture; nothing is lost, the aspect ratio may change."""
    CENTER = "center"
    """Scale the shorter side to fit, cut the middle out."""
    BORDER = "border"
    """Scale the longer side to fit, pad with mid-gray (the level ``mean``)."""


class Interpolation(str, enum.Enum):
    """Pillow's resampling filter, antialiased when shrinking."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    LANCZOS = "lanczos"


Side = Annotated[int, msgspec.Meta(ge=16, le=4096)]
Level = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the model sees, from the recipe's ``[input]`` table; travels unchanged to the device.

    ``mean`` is one whole 8-bit level for all channels. The graph computes ``(byte - mean) / std``,
    so the raw byte already *is* the quantized value (scale ``1/std``, zero point ``mean``) and
    INT8 engines need no Quantize node at their input.
    """

    size: tuple[Side, Side] = (224, 224)
    """Height and width in pixels."""
    channels: Annotated[int, msgspec.Meta(ge=1, le=3)] = 3
    """1 for gray sensors, 3 for RGB."""
    resize: Resize = Resize.SQUASH
    """Stretch to the size, cut the middle out, or pad the shorter side."""
    interpolation: Interpolation = Interpolation.BILINEAR
    """Filter of the resize, antialiased when shrinking."""
    mean: Annotated[int, msgspec.Meta(ge=0, le=255)] = 128
    """Subtracted from every byte, in 8-bit levels."""
    std: Annotated[float, msgspec.Meta(gt=0, le=255)] = 128.0
    """Divides the result, in 8-bit levels."""
    window: tuple[Level, Level] = (0, 65535)
    """Levels of a 16-bit image that become 0 and 255."""
    scaled_jpeg: bool = False
    """Decode JPEGs that are 2, 4 or 8 times too large at a half, a quarter or an eighth of their
    size, by their own cosine transform: several times cheaper for a camera's pictures. It moves
    levels by up to four, so decide before training."""

    def __post_init__(self) -> None:
        if self.channels == 2:
            raise ValueError("channels must be 1 (gray) or 3 (RGB), got 2")
        if self.window[0] >= self.window[1]:
            low, high = self.window
            raise ValueError(f"window must be [low, high] with low < high, got [{low}, {high}]")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one preprocessed picture."""
        return (*self.size, self.channels)


def preprocess(image: ImageLike, spec: InputSpec) -> UInt8:
    """Return ``image`` as the uint8 ``[H, W, C]`` array that the model takes.

    ``image`` is a path, encoded bytes, a PIL image, or an array: uint8 or uint16, ``[H, W]``,
    ``[H, W, 1]``, ``[H, W, 3]`` in RGB order or ``[H, W, 4]`` in RGBA order.

    Raises DataError, naming the file, if it cannot be read or is not such a picture.
    """
    picture = decode(image, window=spec.window, for_spec=spec)
    picture = _to_channels(picture, spec.channels)
    picture = _to_size(picture, spec)
    array = np.array(picture, dtype=np.uint8)  # a copy: Pillow lends read-only memory
    return array.reshape(spec.shape)


def preprocess_batch(images: Sequence[ImageLike], spec: InputSpec) -> UInt8:
    """Return ``images`` as one uint8 ``[N, H, W, C]`` array."""
    batch = np.empty((len(images), *spec.shape), dtype=np.uint8)
    for row, image in zip(batch, images, strict=True):
        row[:] = preprocess(image, spec)
    return batch


def decode(
    image: ImageLike, *, window: tuple[int, int] = (0, 65535), for_spec: InputSpec | None = None
) -> Image.Image:
    """Return ``image`` as an upright 8-bit PIL image of mode ``L`` or ``RGB``.

    With ``for_spec`` a JPEG may come smaller, never below that size, if it says ``scaled_jpeg``.

    Raises DataError for anything that is not a readable picture of at most MAX_PIXELS.
    """
    if isinstance(image, np.ndarray):
        return _flatten(_from_array(image, window), window, "array")
    if isinstance(image, Image.Image):
        return _read(image, window, "PIL image", lent=True)
    if isinstance(image, bytes):
        if not image:
            raise DataError("expected an encoded image, got 0 bytes")
        return _open(io.BytesIO(image), window, f"{len(image):,} bytes", for_spec)
    if isinstance(image, str | Path):
        path = Path(image)
        try:
            size, regular = path.stat().st_size, path.is_file()
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"{path}: cannot be read: {reason}") from error
        if not regular:
            raise DataError(f"{path}: expected an image file, got a folder or device")
        if size == 0:
            raise DataError(f"{path}: expected an image, got an empty file")
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path}: {size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
        return _open(path, window, str(path), for_spec)
    raise DataError(
        f"expected a path, bytes, PIL image or array, got {type(image).__name__}; "
        "pass a list of those for several images"
    )


def _open(
    source: Path | io.BytesIO, window: tuple[int, int], name: str, for_spec: InputSpec | None
) -> Image.Image:
    try:
        picture = _identify(source)
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image; expected one of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name}: the limit is {MAX_PIXELS:,} pixels; shrink it") from error
    except Exception as error:
        raise DataError(f"{name}: cannot be decoded: {error}") from error
    with picture:
        return _read(picture, window, name, for_spec=for_spec)


def _identify(source: Path | io.BytesIO) -> Image.Image:
    """Try first what costs least to import: a first answer waits for the reader of its format.

    That is the one that the name promises, then those that ``Image.preinit`` brings, then all.
    """
    if isinstance(source, Path) and (promised := _BY_SUFFIX.get(source.suffix.lower())):
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(source, formats=promised)
    Image.preinit()
    try:
        return Image.open(source, formats=_COMMON)
    except UnidentifiedImageError:
        return Image.open(source, formats=FORMATS)


def _read(
    picture: Image.Image,
    window: tuple[int, int],
    name: str,
    *,
    lent: bool = False,
    for_spec: InputSpec | None = None,
) -> Image.Image:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width}x{height} pixels, the limit is {MAX_PIXELS:,}; shrink it")
    if max(width, height) > MAX_SIDE:
        raise DataError(f"{name}: {width}x{height} pixels, the limit of a side is {MAX_SIDE:,}")
    if width * height == 0:
        raise DataError(f"{name}: expected a picture, got {width}x{height} pixels")
    try:
        if picture.format in _JPEG and (scans := _count_scans(picture)) > MAX_SCANS:
            raise DataError(f"{name}: {scans:,} scans, the limit is {MAX_SCANS}; save it again")
        if picture.format in _JPEG and for_spec and for_spec.scaled_jpeg:
            side = max(for_spec.size)  # EXIF may exchange height and width
            picture.draft("L" if for_spec.channels == 1 else None, (side, side))
        picture.load()
        upright = picture
        with contextlib.suppress(Exception):  # a damaged EXIF block must not cost a good picture
            if lent:
                upright = ImageOps.exif_transpose(picture)
            else:
                ImageOps.exif_transpose(picture, in_place=True)
        return _flatten(upright, window, name)
    except DataError:
        raise
    except Exception as error:
        # Decoders raise a dozen types for damaged files; all mean "this picture is broken".
        raise DataError(f"{name}: cannot be decoded: {error}") from error


def _count_scans(picture: Image.Image) -> int:
    """How often the decoder would go over the JPEG; its file is left where it was."""
    stream = getattr(picture, "fp", None)
    if stream is None:
        return 0  # decoded already
    here, found, last = stream.tell(), 0, b""
    stream.seek(0)
    while block := stream.read(1 << 16):
        # Compressed data never holds this pair: there a zero byte follows every 0xFF.
        found += (last + block).count(_START_OF_SCAN)
        last = block[-1:]
    stream.seek(here)
    return found


def _flatten(picture: Image.Image, window: tuple[int, int], name: str) -> Image.Image:
    """Any Pillow mode to ``L`` or ``RGB``."""
    mode = picture.mode
    transparent = "transparency" in picture.info
    if mode in ("L", "RGB") and not transparent:
        return picture
    if mode == "1" and not transparent:
        return picture.convert("L")
    if mode.startswith("I"):  # I;16 and friends, and I, which Pillow uses for some 16-bit PNGs
        return _window(np.asarray(picture), window)
    if mode == "F":
        raise DataError(
            f"{name}: expected 8- or 16-bit pixels, got floating point; save it as 16-bit PNG"
        )
    if mode in ("1", "L", "LA", "La"):
        return _on_black(picture, "L")
    if mode in ("RGBA", "RGBa", "PA") or transparent:
        return _on_black(picture, "RGB")
    return picture.convert("RGB")  # P, CMYK, YCbCr, LAB, HSV, RGBX


def _on_black(picture: Image.Image, mode: str) -> Image.Image:
    black = Image.new(mode, picture.size)
    rows = max(1, _STRIP // picture.width)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        with_alpha = strip.convert("LA" if mode == "L" else "RGBA")
        black.paste(with_alpha.convert(mode), (0, top), with_alpha.getchannel("A"))
    return black


def _window(levels: npt.NDArray[Any], window: tuple[int, int]) -> Image.Image:
    low, high = window
    result = np.empty(levels.shape, np.uint8)
    rows = max(1, _STRIP // levels.shape[1])
    for top in range(0, len(levels), rows):
        strip = slice(top, top + rows)
        scaled = (levels[strip].astype(np.float32) - low) * (255.0 / (high - low))
        result[strip] = np.rint(np.clip(scaled, 0, 255))
    return Image.fromarray(result)


def _from_array(array: npt.NDArray[Any], window: tuple[int, int]) -> Image.Image:
    if array.dtype not in (np.uint8, np.uint16):
        raise DataError(f"expected an array of uint8 or uint16 levels, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        shape = list(array.shape)
        raise DataError(f"expected an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], got {shape}")
    if array.shape[0] * array.shape[1] > MAX_PIXELS or max(array.shape[:2]) > MAX_SIDE:
        raise DataError(
            f"array {list(array.shape)}: the limit is {MAX_PIXELS:,} pixels, {MAX_SIDE:,} a side"
        )
    if array.dtype == np.uint16:
        if array.ndim == 2:
            return _window(array, window)
        planes = [_window(array[:, :, index], window) for index in range(array.shape[2])]
        return Image.merge("RGB" if len(planes) == 3 else "RGBA", planes)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_channels(picture: Image.Image, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _to_size(picture: Image.Image, spec: InputSpec) -> Image.Image:
    height, width = spec.size
    if picture.size == (width, height):
        return picture
    method = Image.Resampling[spec.interpolation.name]
    if spec.resize is Resize.SQUASH:
        return picture.resize((width, height), method)
    if spec.resize is Resize.CENTER:
        return ImageOps.fit(picture, (width, height), method)
    scale = min(width / picture.width, height / picture.height)
    # Not ImageOps.pad: it rounds the short side of a very long picture to nothing.
    inner = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    level = spec.mean if spec.channels == 1 else (spec.mean,) * 3
    canvas = Image.new(picture.mode, (width, height), level)
    canvas.paste(picture.resize(inner, method), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas
