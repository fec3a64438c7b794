"""The image policy, case by case, and what is refused."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime import preprocess as preprocess_module
from runtime.errors import DataError
from runtime.preprocess import ImageLike, InputSpec, Resize, decode, preprocess, preprocess_batch

RGB = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
GRAY = RGB[:, :, 0]


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def levels(image: Any, **options: Any) -> npt.NDArray[np.uint8]:
    return np.asarray(decode(image, **options))


# --- modes


def test_gray_and_rgb_come_back_unchanged() -> None:
    assert np.array_equal(levels(encoded(Image.fromarray(GRAY))), GRAY)
    assert np.array_equal(levels(encoded(Image.fromarray(RGB))), RGB)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_mapped_from_the_window(kind: str) -> None:
    deep = np.array([[0, 128, 129, 1000, 3000, 4000, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(deep), kind)
    assert levels(data).tolist() == [[0, 0, 1, 4, 12, 16, 255]]
    # never stretched by the picture's own extremes; what lies outside is clipped
    assert levels(data, window=(1000, 4000)).tolist() == [[0, 0, 0, 0, 170, 255, 255]]


def test_every_sixteen_bit_level_of_eight_bits_returns() -> None:
    deep = np.arange(256, dtype=np.uint16)[None] * 257
    assert np.array_equal(levels(deep), np.arange(256, dtype=np.uint8)[None])


def test_a_dark_sixteen_bit_picture_stays_dark() -> None:
    assert levels(np.full((4, 4), 300, dtype=np.uint16)).max() == 1


def palette_picture() -> Image.Image:
    picture = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return picture


def test_palette_becomes_rgb() -> None:
    expected = [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    assert levels(encoded(palette_picture())).tolist() == expected


def test_palette_transparency_is_composited_on_black() -> None:
    data = encoded(palette_picture(), transparency=bytes([255, 0, 128]))
    assert levels(data).tolist() == [[[10, 20, 30], [0, 0, 0], [35, 40, 45]]]


@pytest.mark.parametrize(
    ("picture", "key", "expected"),
    [
        (Image.fromarray(np.array([[7, 9]], dtype=np.uint8)), 7, [[0, 9]]),
        (
            Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)),
            (1, 2, 3),
            [[[0, 0, 0], [4, 5, 6]]],
        ),
        (Image.new("1", (2, 1), 1), 255, [[0, 0]]),
    ],
    ids=["gray", "rgb", "one-bit"],
)
def test_a_transparent_colour_becomes_black(picture: Image.Image, key: Any, expected: Any) -> None:
    assert levels(encoded(picture, transparency=key)).tolist() == expected


def test_alpha_is_composited_on_black() -> None:
    light = np.array([[[200, 0], [200, 128], [200, 255]]], dtype=np.uint8)
    assert levels(encoded(Image.fromarray(light))).tolist() == [[0, 100, 200]]
    colour = np.array([[[200, 100, 50, 0], [200, 100, 50, 255]]], dtype=np.uint8)
    assert levels(encoded(Image.fromarray(colour))).tolist() == [[[0, 0, 0], [200, 100, 50]]]
    assert np.array_equal(levels(colour), levels(encoded(Image.fromarray(colour))))


def test_one_bit_becomes_black_and_white() -> None:
    picture = Image.fromarray(GRAY > 127)
    assert np.array_equal(levels(encoded(picture)), np.where(GRAY > 127, 255, 0))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "PA", "La"])
def test_other_modes_become_rgb_or_gray(mode: str) -> None:
    source = Image.fromarray(RGB)
    if mode == "RGBa":
        source = source.convert("RGBA")
    picture = Image.new("La", (24, 20)) if mode == "La" else source.convert(mode)
    result = decode(picture)
    assert (result.mode, result.size) == ("L" if mode == "La" else "RGB", (24, 20))


def test_cmyk_jpeg_has_about_the_colour_it_shows() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(levels(encoded(red, "JPEG")).astype(int) - [255, 0, 0]).max() < 12


def test_floating_point_is_refused() -> None:
    with pytest.raises(DataError, match="8- or 16-bit"):
        decode(encoded(Image.new("F", (4, 4)), "TIFF"))


# --- orientation and frames


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    stored = {
        1: GRAY,
        2: GRAY[:, ::-1],
        3: GRAY[::-1, ::-1],
        4: GRAY[::-1],
        5: GRAY.T,
        6: np.rot90(GRAY),
        7: GRAY[::-1, ::-1].T,
        8: np.rot90(GRAY, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    assert np.array_equal(levels(data), GRAY)


def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says so, too
        assert levels(data).shape == RGB.shape


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("L", (8, 8), level) for level in (50, 200)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert set(levels(data).ravel().tolist()) == {50}


# --- the forms of input


def test_path_bytes_picture_and_array_are_the_same(tmp_path: Path) -> None:
    spec = InputSpec(size=(16, 18))
    picture = Image.fromarray(RGB)
    file = tmp_path / "a.png"
    file.write_bytes(encoded(picture))
    forms: list[ImageLike] = [file, str(file), file.read_bytes(), picture, RGB, RGB[::-1][::-1]]
    batch = preprocess_batch(forms, spec)
    assert batch.dtype == np.uint8
    assert batch.shape == (6, 16, 18, 3)
    assert (batch == batch[0]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 1), (20, 24, 3), (20, 24, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_all_shapes(dtype: Any, shape: tuple[int, ...], channels: int) -> None:
    array = np.full(shape, 255, dtype=dtype) * (257 if dtype is np.uint16 else 1)
    result = preprocess(array.astype(dtype), InputSpec(size=(16, 16), channels=channels))
    assert result.shape == (16, 16, channels)
    assert (result == 255).all()


def test_channels_are_in_rgb_order_and_gray_is_luma() -> None:
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert preprocess(red, InputSpec(size=(16, 16)))[0, 0].tolist() == [255, 0, 0]
    assert preprocess(red, InputSpec(size=(16, 16), channels=1))[0, 0].tolist() == [76]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), dtype=np.float32),
        np.zeros((4, 4), dtype=np.int64),
        np.zeros((4, 4), dtype=bool),
        np.zeros(4, dtype=np.uint8),
        np.zeros((4, 4, 2), dtype=np.uint8),
        np.zeros((1, 4, 4, 3), dtype=np.uint8),
        np.zeros((0, 4), dtype=np.uint8),
    ],
    ids=lambda array: f"{array.dtype}-{list(array.shape)}",
)
def test_other_arrays_are_refused(array: Any) -> None:
    with pytest.raises(DataError, match="expected an array"):
        preprocess(array, InputSpec())


def test_other_types_are_refused() -> None:
    with pytest.raises(DataError, match="got list"):
        preprocess([RGB], InputSpec())  # type: ignore[arg-type]


# --- size


def ramp() -> Image.Image:
    return Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1)))  # 64 wide, 32 high


def test_squash_keeps_the_whole_picture() -> None:
    row = preprocess(ramp(), InputSpec(size=(32, 32), channels=1))[16, :, 0]
    assert row[0] < 8
    assert row[-1] > 244
    assert (np.diff(row.astype(int)) > 0).all()


def test_center_cuts_the_middle_out() -> None:
    spec = InputSpec(size=(32, 32), channels=1, resize=Resize.CENTER)
    row = preprocess(ramp(), spec)[16, :, 0]
    assert row.tolist() == list(range(64, 192, 4))


def test_border_pads_with_the_mean() -> None:
    spec = InputSpec(size=(32, 32), channels=1, resize=Resize.BORDER, mean=99)
    result = preprocess(ramp(), spec)[:, :, 0]
    assert (result[:8] == 99).all()
    assert (result[24:] == 99).all()
    assert (np.diff(result[16].astype(int)) > 0).all()
    assert (preprocess(ramp().convert("RGB"), InputSpec(size=(32, 32), mean=99))[:, 0] < 99).all()


@pytest.mark.parametrize("resize", list(Resize))
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1)])
def test_very_long_pictures_fit(resize: Resize, shape: tuple[int, int]) -> None:
    spec = InputSpec(size=(16, 20), resize=resize)
    assert preprocess(np.zeros(shape, dtype=np.uint8), spec).shape == (16, 20, 3)


# --- what is refused, with the file's name


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for name, words in [
        ("missing.png", "cannot be read"),
        ("empty.png", "empty file"),
        ("", "a folder"),
        ("zero\0byte.png", "cannot be read"),
    ]:
        with pytest.raises(DataError, match=words) as caught:
            decode(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(DataError, match="0 bytes"):
        decode(b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP"])
def test_truncated_files_are_refused(kind: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(np.tile(RGB, (8, 8, 1))), kind)
    file = tmp_path / "half"
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="half"):
        decode(file)


def test_garbage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.png"
    file.write_text("not a picture")
    with pytest.raises(DataError, match=r"notes\.png: not an image; expected one of BMP"):
        decode(file)


def test_formats_that_run_other_programs_are_refused() -> None:
    with pytest.raises(DataError, match="not an image"):
        decode(encoded(Image.fromarray(RGB), "EPS"))


def header(width: int, height: int) -> bytes:
    """A PNG of that size with no pixels in it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [60_000, 10_000])  # above and below Pillow's own error
@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_giants_are_refused_from_the_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("pixels were allocated")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with warnings.catch_warnings(record=True), pytest.raises(DataError, match="the limit is"):
        decode(header(side, side))


def test_giant_files_are_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "sparse.tiff"
    with file.open("wb") as stream:
        stream.truncate(preprocess_module.MAX_FILE_BYTES + 1)
    with pytest.raises(DataError, match=r"sparse\.tiff: .* limit"):
        decode(file)


# --- whatever comes

SEEDS = [
    encoded(Image.fromarray(RGB)),
    encoded(Image.fromarray(GRAY.astype(np.uint16) * 257)),
    encoded(palette_picture(), transparency=bytes([255, 0, 128])),
    encoded(Image.fromarray(RGB), "JPEG", exif=Image.Exif()),
    encoded(Image.fromarray(RGB), "TIFF"),
    encoded(Image.fromarray(RGB), "PPM"),
    encoded(Image.fromarray(RGB), "GIF"),
]
EDIT = st.tuples(st.integers(0, 10_000), st.integers(0, 255))


def answer_or_refuse(data: bytes) -> None:
    spec = InputSpec(size=(16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks about odd files
        try:
            result = preprocess(data, spec)
        except DataError as error:
            assert str(error)  # noqa: PT017  # both outcomes are right
        else:
            assert result.shape == (16, 16, 3)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes(data: bytes) -> None:
    answer_or_refuse(data)


@given(st.sampled_from(SEEDS), st.lists(EDIT, min_size=1, max_size=6), st.integers(0, 60))
@settings(max_examples=600, deadline=None)
def test_mutated_files(data: bytes, edits: list[tuple[int, int]], cut: int) -> None:
    changed = bytearray(data)
    for position, value in edits:
        changed[position % (200 if position % 2 else len(changed)) % len(changed)] = value
    answer_or_refuse(bytes(changed[: len(changed) - cut]) or b"\0")


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n\0\0\0\x05IHDR12345" + struct.pack(">I", zlib.crc32(b"IHDR12345")),
        b"P6\n2\xff 2\n255\n" + bytes(12),
    ],
    ids=["short PNG header", "letters for a PPM's width"],
)
def test_damage_that_pillow_reports_as_a_value_error(data: bytes) -> None:
    with pytest.raises(DataError):
        decode(data)


# --- JPEGs of a camera's size


def camera_jpeg() -> bytes:
    fine = np.random.default_rng(0).normal(128, 40, (30, 40, 3))
    smooth = Image.fromarray(np.clip(fine, 0, 255).astype(np.uint8))
    return encoded(smooth.resize((640, 480), Image.Resampling.BICUBIC), "JPEG", quality=92)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_scaled_jpeg_is_nearly_the_same_picture_from_fewer_pixels(channels: int) -> None:
    exact = InputSpec(size=(60, 80), channels=channels)
    scaled = InputSpec(size=(60, 80), channels=channels, scaled_jpeg=True)
    assert decode(camera_jpeg(), for_spec=exact).size == (640, 480)
    assert decode(camera_jpeg(), for_spec=scaled).size == (160, 120)
    one, other = preprocess(camera_jpeg(), exact), preprocess(camera_jpeg(), scaled)
    difference = np.abs(one.astype(int) - other)
    assert 0 < difference.max() <= 12
    assert difference.mean() < 2


def test_only_jpegs_are_scaled() -> None:
    scaled = InputSpec(size=(8, 8), scaled_jpeg=True)
    data = encoded(Image.open(io.BytesIO(camera_jpeg())))
    assert decode(data, for_spec=scaled).size == (640, 480)
