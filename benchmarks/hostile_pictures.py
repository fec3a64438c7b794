"""Pictures that somebody made to hurt: by kind, each with what must come of it.

They are made here, byte by byte or by Pillow, so that no file of others' is needed. It reads none.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from runtime.preprocess import MAX_PIXELS, MAX_SIDE

Fate = Literal["refused", "read", "either"]
"""``either``: damage that no decoder can tell from a picture; the health checks are for that."""


class Kind(NamedTuple):
    """One way to hurt."""

    name: str
    fate: Fate
    make: Callable[[], bytes]


def kinds() -> tuple[Kind, ...]:
    """All of them; ``make`` costs up to a second for the large ones."""
    width, height = 5120, MAX_PIXELS // 5120
    return (
        Kind("empty file", "refused", bytes),
        Kind("one byte", "refused", lambda: b"\xff"),
        Kind("text called a picture", "refused", lambda: b"hello, this is no picture\n" * 99),
        Kind("zip archive", "refused", lambda: b"PK\x03\x04" + bytes(500)),
        Kind("SVG", "refused", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><a/></svg>'),
        Kind("EPS, which would start Ghostscript", "refused", _eps),
        Kind("JPEG cut in half", "refused", lambda: _half(_encoded(_photo(), "JPEG"))),
        Kind("PNG cut in half", "refused", lambda: _half(_encoded(_photo(), "PNG"))),
        Kind("WebP cut in half", "refused", lambda: _half(_encoded(_photo(), "WEBP"))),
        Kind("JPEG with 400 zeroed bytes", "either", _zeroed_jpeg),
        Kind("JPEG with flipped bits", "either", _flipped_jpeg),
        Kind("PNG with a wrong checksum", "refused", _wrong_checksum),
        Kind("PNG bomb of 20,000x20,000", "refused", _bomb),
        Kind("PNG that claims 2^31-1 squared", "refused", _claim),
        Kind("PNG of 0x0", "refused", lambda: _png_header(0, 0)),
        Kind("PNG with more pixels than it claims", "either", _overrun),
        Kind("PNG with a text chunk of 200 MB", "either", _text_bomb),
        Kind("GIF screen of 65,535x65,535", "refused", _gif_screen),
        Kind("GIF of 1,000 frames", "read", _many_frames),
        Kind("TIFF whose directory points to itself", "either", _looping_tiff),
        Kind("TIFF with strips beyond the file", "refused", _tiff_beyond),
        Kind("TIFF of NaN", "refused", _nan_tiff),
        Kind("BMP with a negative height", "refused", lambda: _bmp(-(2**31))),
        Kind("PPM header of 10^12 pixels", "refused", lambda: b"P6 1000000 1000000 255\n\0"),
        Kind("JPEG 2000 header of 2^32-1", "refused", _jpeg2000_header),
        Kind("JPEG of 3,000 progressive scans", "refused", _many_scans),
        Kind("EXIF that is garbage", "read", _garbled_exif),
        Kind("EXIF turned by 90 degrees", "read", _turned),
        Kind("ICC profile of 8 MB of garbage", "either", _garbled_profile),
        Kind("one row of as many pixels as allowed", "refused", lambda: _flat_png(MAX_PIXELS, 1)),
        Kind("RGBA as wide as allowed", "read", lambda: _flat_png(MAX_SIDE, 400, 8, 6)),
        Kind("CMYK JPEG", "read", lambda: _encoded(_photo().convert("CMYK"), "JPEG")),
        Kind("16-bit gray as large as allowed", "read", lambda: _flat_png(width, height, 16, 0)),
        Kind("16-bit RGBA as large as allowed", "read", lambda: _flat_png(width, height, 16, 6)),
        Kind("RGBA as large as allowed", "read", lambda: _flat_png(width, height, 8, 6)),
        Kind("transparent palette as large as allowed", "read", lambda: _palette(width, height)),
        Kind("1 bit as large as allowed", "read", lambda: _flat_png(width, height, 1, 0)),
        Kind("JPEG as large as allowed, turned", "read", lambda: _large_jpeg(width, height)),
    )  # fmt: skip


def friendly() -> bytes:
    """A picture that hurts nobody."""
    return _encoded(_photo(), "JPEG")


def fuzzed(count: int, seed: int = 0) -> Iterator[bytes]:
    """``count`` small pictures of all formats, cut, flipped, spliced and overwritten."""
    random_ = random.Random(seed)
    photo = _photo(48)
    seeds = [
        *(_encoded(photo, kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")),
        _encoded(photo, "JPEG2000"), _encoded(photo, "JPEG", progressive=True),
        _encoded(photo, "TIFF", compression="tiff_lzw"), _encoded(photo.convert("P"), "PNG"),
        _encoded(photo.convert("CMYK"), "JPEG"), _encoded(photo.convert("RGBA"), "WEBP"),
        _encoded(photo.convert("1"), "PNG"), _encoded(photo.convert("L"), "BMP"),
    ]  # fmt: skip
    for _ in range(count):
        data = bytearray(random_.choice(seeds))
        for _ in range(random_.choice((1, 1, 2, 4, 16))):
            # Headers are where a byte does most.
            at = random_.randrange(min(len(data), random_.choice((64, 512, len(data)))))
            match random_.randrange(5):
                case 0:
                    data[at] ^= 1 << random_.randrange(8)
                case 1:
                    data[at] = random_.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 2:
                    data[at : at + 4] = random_.randbytes(4)
                case 3:
                    other = random_.choice(seeds)
                    start = random_.randrange(len(other))
                    data[at : at + 40] = other[start : start + 40]
                case 4:
                    del data[at : at + random_.choice((1, 8, len(data)))]
            data = data or bytearray(1)
        yield bytes(data)


def _photo(size: int = 256) -> Image.Image:
    levels = np.random.default_rng(0).normal(128, 40, (size // 8, size // 8, 3))
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).resize((size, size))


def _encoded(picture: Image.Image, kind: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    return stream.getvalue()


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _eps() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def _zeroed_jpeg() -> bytes:
    data = bytearray(_encoded(_photo(), "JPEG"))
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    return bytes(data)


def _flipped_jpeg() -> bytes:
    data = bytearray(_encoded(_photo(), "JPEG"))
    for position in range(len(data) // 2, len(data) - 2, 97):
        data[position] ^= 0x10
    return bytes(data)


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def _png(width: int, height: int, depth: int, colour: int, *chunks: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + b"".join(chunks) + _chunk(b"IEND", b"")


def _png_header(width: int, height: int) -> bytes:
    return _png(width, height, 8, 2, _chunk(b"IDAT", b""))


def _flat_png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    samples = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    row = b"\0" + b"\x55" * ((width * samples * depth + 7) // 8)
    packer = zlib.compressobj(1)
    packed = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    return _png(width, height, depth, colour, _chunk(b"IDAT", packed))


def _palette(width: int, height: int) -> bytes:
    row = b"\0" + bytes(width)
    packer = zlib.compressobj(1)
    packed = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    chunks = _chunk(b"PLTE", bytes(range(30))), _chunk(b"tRNS", bytes(range(0, 200, 20)))
    return _png(width, height, 8, 3, *chunks, _chunk(b"IDAT", packed))


def _wrong_checksum() -> bytes:
    data = bytearray(_encoded(_photo(), "PNG"))
    at = data.index(b"IDAT") + 40
    data[at] ^= 0xFF
    return bytes(data)


def _claim() -> bytes:
    return _png_header(2**31 - 1, 2**31 - 1)


def _bomb() -> bytes:
    return _flat_png(20_000, 20_000, 8, 0)


def _garbled_exif() -> bytes:
    return _encoded(_photo(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 900)


def _garbled_profile() -> bytes:
    return _encoded(_photo(), "PNG", icc_profile=random.Random(0).randbytes(8 << 20))


def _overrun() -> bytes:
    packed = zlib.compress((b"\0" + bytes(24)) * 5_000_000, 1)
    return _png(8, 8, 8, 2, _chunk(b"IDAT", packed))


def _text_bomb() -> bytes:
    text = b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9)
    return _png(8, 8, 8, 0, _chunk(b"zTXt", text), _chunk(b"IDAT", zlib.compress(bytes(72))))


def _gif_screen() -> bytes:
    frame = b",\0\0\0\0\xff\xff\xff\xff\0\x08\x02\x4c\x01\0;"
    return b"GIF89a\xff\xff\xff\xff\x80\0\0" + b"\0\0\0\xff\xff\xff" + frame


def _many_frames() -> bytes:
    first = _photo(32)
    frames = [Image.new("RGB", (32, 32), (i % 256, i // 4 % 256, 9)) for i in range(999)]
    return _encoded(first, "GIF", save_all=True, append_images=frames)


def _looping_tiff() -> bytes:
    entries = ((256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
               (273, 4, 1, 8), (278, 3, 1, 8), (279, 4, 1, 64))  # fmt: skip
    body = b"".join(
        struct.pack("<HHI", tag, kind, count)
        + (struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value))
        for tag, kind, count, value in entries
    )
    return b"II*\0\x48\0\0\0" + bytes(64) + struct.pack("<H", len(entries)) + body + b"\x48\0\0\0"


def _tiff_beyond() -> bytes:
    data = bytearray(_encoded(_photo(64), "TIFF"))
    directory = struct.unpack_from("<I", data, 4)[0]
    for index in range(struct.unpack_from("<H", data, directory)[0]):
        entry = directory + 2 + 12 * index
        if struct.unpack_from("<H", data, entry)[0] == TiffImagePlugin.STRIPOFFSETS:
            struct.pack_into("<I", data, entry + 8, 0xFFFFFF00)
    return bytes(data)


def _nan_tiff() -> bytes:
    return _encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF")


def _bmp(height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 100, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 99, 0, 0, 54) + head + bytes(99)


def _jpeg2000_header() -> bytes:
    size = struct.pack(">HIIIIIIIIH", 0, 2**32 - 1, 2**32 - 1, 0, 0, 1, 1, 0, 0, 3) + b"\7\1\1" * 3
    return b"\xff\x4f\xff\x51" + struct.pack(">H", len(size) + 2) + size + bytes(50)


def _many_scans() -> bytes:
    """One scan repeated: each costs a pass over the whole picture and a few bytes of file."""
    data = _encoded(Image.new("L", (4096, MAX_PIXELS // 4096)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * 3_000 + data[-2:]


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded(_photo(), "JPEG", exif=exif)


def _large_jpeg(width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded(Image.new("RGB", (width, height), (9, 99, 199)), "JPEG", exif=exif)
