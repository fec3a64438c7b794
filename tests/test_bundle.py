"""A bundle is opened whole or not at all, as a folder and as a zip."""

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime import Classifier
from runtime.__main__ import main as fieldfit
from runtime.bundle import Bundle, encode_zip
from runtime.errors import BundleError
from runtime.manifest import encode


def contents(bundle: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in bundle.iterdir()}


def zipped(bundle: Path, files: dict[str, bytes] | None = None) -> Path:
    path = bundle.with_suffix(".zip")
    path.write_bytes(encode_zip(files or contents(bundle)))
    return path


def test_folder_and_zip_are_the_same_bundle(quick: Path) -> None:
    folder = Bundle.open(quick / "build" / "quick" / "bundle")
    archive = Bundle.open(quick / "build" / "quick" / "quick-0.1.0.zip")
    assert folder.manifest == archive.manifest
    for entry in folder.manifest.files:
        assert folder.read(entry.name) == archive.read(entry.name)
    golden = folder.golden()
    assert golden["images"].dtype == np.uint8
    for artifact in folder.manifest.artifacts:
        assert golden[f"logits.{artifact.form}"].shape == (len(golden["images"]), 2)


def test_the_zip_is_stored_and_starts_with_the_manifest(quick: Path) -> None:
    with zipfile.ZipFile(quick / "build" / "quick" / "quick-0.1.0.zip") as archive:
        infos = archive.infolist()
    assert infos[0].filename == "manifest.json"
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}


def test_a_flipped_byte_anywhere_is_refused(bundle: Path) -> None:
    """Some positions of every file: start, end, and spread between."""
    for file in sorted(bundle.iterdir()):
        size = file.stat().st_size
        for position in {0, size - 1, *range(0, size, max(1, size // 7))}:
            with flipped(file, position, 0x10), pytest.raises(BundleError):
                Bundle.open(bundle)
    Bundle.open(bundle)


@contextlib.contextmanager
def flipped(path: Path, position: int, bits: int) -> Iterator[None]:
    """One byte of a large file is another meanwhile."""
    with path.open("r+b", buffering=0) as file:
        (byte,) = os.pread(file.fileno(), 1, position)
        os.pwrite(file.fileno(), bytes([byte ^ bits]), position)
        yield
        os.pwrite(file.fileno(), bytes([byte]), position)


def test_a_start_reads_what_it_needs_and_no_byte_of_that_unverified(bundle: Path) -> None:
    """Hashing every form would make a device read a hundred megabytes for ten, at each start."""
    with flipped(bundle / "fp32.onnx", 1000, 0x10):
        with Classifier.open(bundle, form="int8-cpu") as classifier:
            assert classifier.selftest.passed
        with pytest.raises(BundleError, match=r"fp32\.onnx: changed since export"):
            Classifier.open(bundle, form="fp32")
        assert fieldfit(["verify", str(bundle)]) == 1
    for needed in ("int8-cpu.onnx", "golden.npz", "manifest.json"):
        with flipped(bundle / needed, 1000, 0x10), pytest.raises(BundleError):
            Classifier.open(bundle, form="int8-cpu")
    short = bundle / "fp32.onnx"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"fp32.onnx: expected [\d,]+ bytes"):
        Classifier.open(bundle, form="int8-cpu")


def test_a_flipped_byte_anywhere_in_the_zip_is_refused(bundle: Path) -> None:
    path = zipped(bundle)
    size = path.stat().st_size
    tail = range(size - 800, size, 7)  # the zip's own directory
    for position in [*range(0, size, max(1, size // 60)), *range(0, 60, 3), *tail]:
        with flipped(path, position, 0x04), pytest.raises(BundleError):
            Bundle.open(path)


@pytest.mark.parametrize("junk", [b"before", b"after"])
def test_bytes_that_belong_to_no_file_are_refused(bundle: Path, junk: bytes) -> None:
    path = zipped(bundle)
    data = path.read_bytes()
    path.write_bytes(junk + data if junk == b"before" else data + junk)
    with pytest.raises(BundleError):
        Bundle.open(path)


def add_link(bundle: Path) -> None:
    (bundle / "link.onnx").symlink_to("fp32.onnx")


def truncate(bundle: Path) -> None:
    os.truncate(bundle / "fp32.onnx", 1000)


def grow(bundle: Path) -> None:
    with (bundle / "fp32.onnx").open("ab") as file:
        file.write(b"x")


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda b: (b / "int8-cpu.onnx").unlink(), r"missing int8-cpu\.onnx; copy the bundle again"),
    (lambda b: (b / "manifest.json").unlink(), r"has no manifest\.json"),
    (lambda b: (b / "extra.txt").write_text("x"), r"extra\.txt is not in the manifest"),
    (lambda b: (b / "folder").mkdir(), "got a folder"),
    (add_link, "got a link"),
    (truncate, r"fp32\.onnx: expected [\d,]+ bytes, got 1,000"),
    (grow, r"fp32\.onnx: expected [\d,]+ bytes, got more"),
    (lambda b: (b / "manifest.json").write_bytes(b"{"), "manifest: damaged"),
    (lambda b: (b / "manifest.json").write_bytes(b" " * 2_000_000), "the limit is"),
    (lambda b: (b / "manifest.json").write_bytes(b'{"format":99}'), "format 99 is newer than 1"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_refused_with_one_line_and_exit_code_1(
    bundle: Path,
    damage: Callable[[Path], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)
    assert fieldfit(["verify", str(bundle)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fieldfit: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", ["../evil.txt", "folder/evil.txt", "folder/", "..\\evil.txt"])
def test_a_zip_with_paths_is_refused(bundle: Path, name: str) -> None:
    path = zipped(bundle, {**contents(bundle), name: b"evil"})
    with pytest.raises(BundleError, match="is a path"):
        Bundle.open(path)


def test_a_compressed_zip_is_refused(bundle: Path) -> None:
    path = bundle.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("manifest.json", *sorted(set(contents(bundle)) - {"manifest.json"})):
            archive.write(bundle / name, name)
    with pytest.raises(BundleError, match="is compressed"):
        Bundle.open(path)


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip" * 100])
def test_what_is_no_zip_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bundle.zip"
    path.write_bytes(data)
    with pytest.raises(BundleError):
        Bundle.open(path)


def test_a_missing_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="`make train export` writes build/NAME/bundle"):
        Bundle.open(tmp_path / "none")


def test_a_bundle_for_a_newer_runtime_is_refused(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import msgspec

    manifest = msgspec.structs.replace(Bundle.open(bundle).manifest, minimum_runtime="99.0")
    (bundle / "manifest.json").write_bytes(encode(manifest))
    assert fieldfit(["classify", str(bundle), str(bundle / "golden.npz")]) == 1
    assert "needs fieldfit 99.0 or newer" in capsys.readouterr().err


def test_a_required_provider_that_is_missing_is_an_error(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import msgspec

    manifest = msgspec.structs.replace(Bundle.open(bundle).manifest, required_provider="tensorrt")
    (bundle / "manifest.json").write_bytes(encode(manifest))
    assert fieldfit(["doctor", str(bundle), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)["bundle"]
    assert report["engine"] == "none"
    assert "tensorrt is required" in report["reasons"][0]
