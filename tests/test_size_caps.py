"""What a file declares costs no memory: every reader asks how much is there before it takes any.

The files here are small or sparse and lie about their size; what a reader took is counted.
"""

import hashlib
import io
import os
import re
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from runtime import npz, race
from runtime.bundle import MAX_ZIP_BYTES, Bundle
from runtime.delivery import channel, device_status, fleet, floor, slots, update
from runtime.delivery.identity import device
from runtime.engines.plan_cache import PlanCache
from runtime.errors import BundleError, FleetError, UpdateError
from runtime.manifest import MAX_FILE_BYTES, Manifest, decode, encode
from tests.model_zips import model_zip
from tests.plan_files import KEY
from tests.signed_devices import NOW, new_identity

LITTLE = 12 * 1024 * 1024
HUGE = 3 * 1024 * 1024 * 1024


@contextmanager
def little_memory(most: int = LITTLE) -> Iterator[None]:
    """Fails if more than ``most`` bytes were taken at any moment; NumPy's count as well."""
    tracemalloc.start()
    try:
        yield
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < most, f"{taken:,} bytes"


def sparse(path: Path, size: int = HUGE) -> Path:
    """A file of this size that takes no room on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)
    os.truncate(path, size)
    return path


def test_what_is_counted_here_is_seen(tmp_path: Path) -> None:
    file = sparse(tmp_path / "x", LITTLE)
    with pytest.raises(AssertionError), little_memory():
        file.read_bytes()
    with pytest.raises(AssertionError), little_memory():
        np.empty(LITTLE, np.uint8)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A sound bundle, as a folder."""
    return model_zip(tmp_path, "1.0.0").with_suffix("")


def golden_of(tiny: Path, data: bytes) -> Path:
    """The same bundle with other golden samples, rightly listed."""
    (tiny / "golden.npz").write_bytes(data)
    manifest = decode((tiny / "manifest.json").read_bytes())
    return listed(tiny, manifest, "golden.npz", len(data), hashlib.sha256(data).hexdigest())


def listed(tiny: Path, manifest: Manifest, name: str, size: int, sha256: str) -> Path:
    files = tuple(
        msgspec.structs.replace(entry, size=size, sha256=sha256) if entry.name == name else entry
        for entry in manifest.files
    )
    (tiny / "manifest.json").write_bytes(encode(msgspec.structs.replace(manifest, files=files)))
    return tiny


def test_a_small_bundle_costs_what_it_is(tmp_path: Path) -> None:
    """And not what a bundle may be: four gigabytes once were asked for here."""
    archive = model_zip(tmp_path, "1.0.0")
    with little_memory():
        Bundle.open(archive).golden()
        Bundle.open(archive.with_suffix("")).golden()


def test_a_file_that_is_declared_larger_than_it_is(tiny: Path) -> None:
    manifest = decode((tiny / "manifest.json").read_bytes())
    listed(tiny, manifest, "fp32.onnx", MAX_FILE_BYTES, "0" * 64)
    with little_memory():
        with pytest.raises(BundleError, match="expected 2,147,483,648 bytes"):
            Bundle.open(tiny)
        with pytest.raises(BundleError, match="expected 2,147,483,648 bytes"):
            Bundle.open(tiny, whole=False)


def test_files_of_a_folder_that_are_larger_than_declared(tiny: Path) -> None:
    sparse(tiny / "fp32.onnx")
    with little_memory(), pytest.raises(BundleError, match="got more"):
        Bundle.open(tiny)


def test_a_huge_manifest(tiny: Path) -> None:
    sparse(tiny / "manifest.json")
    with little_memory(), pytest.raises(BundleError, match="the limit is"):
        Bundle.open(tiny)


def test_a_zip_above_the_limit(tmp_path: Path) -> None:
    with little_memory(), pytest.raises(BundleError, match="larger than the limit"):
        Bundle.open(sparse(tmp_path / "x.zip", MAX_ZIP_BYTES + 1))


def test_a_zip_whose_members_declare_gigabytes(tmp_path: Path) -> None:
    data = bytearray(model_zip(tmp_path, "1.0.0").read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # the last of its central directory: both sizes at 20
    data[entry + 20 : entry + 28] = (HUGE.to_bytes(4, "little")) * 2
    path = tmp_path / "liar.zip"
    path.write_bytes(data)
    with little_memory(), pytest.raises(BundleError, match=r"damaged zip|changed since"):
        Bundle.open(path)


def declaring(shape: tuple[int, ...], *, descr: str = "|u1", body: bytes = b"x" * 10) -> bytes:
    """Golden samples whose images declare this shape and have this body."""
    array, file = io.BytesIO(), io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(array, header)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", array.getvalue() + body)
    return file.getvalue()


def compressed() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, images=np.zeros(50_000_000, np.uint8))
    return file.getvalue()


GOLDEN: dict[str, Callable[[], bytes]] = {
    "a terabyte": lambda: declaring((10**12,)),
    "ten gigabytes": lambda: declaring((10**10,)),
    "more than a number holds": lambda: declaring((2**40, 2**40)),
    "less than nothing": lambda: declaring((-1, 10)),
    "objects": lambda: declaring((1,), descr="|O"),
    "compressed": compressed,
    "no zip": lambda: b"PK\x03\x04" + b"x" * 100,
}


@pytest.mark.parametrize("data", GOLDEN.values(), ids=GOLDEN)
def test_golden_samples_that_declare_more_than_there_is(
    tiny: Path, data: Callable[[], bytes]
) -> None:
    bundle = Bundle.open(golden_of(tiny, data()))
    with little_memory(), pytest.raises(BundleError, match="golden samples cannot be read"):
        bundle.golden()


def test_arrays_are_read_as_numpy_wrote_them() -> None:
    random = np.random.default_rng(1)
    arrays: dict[str, npt.NDArray[Any]] = {
        "images": random.integers(0, 256, (3, 4, 5, 1), dtype=np.uint8),
        "logits.fp32": random.normal(size=(3, 2)).astype(np.float32),
        "none": np.zeros((0, 7), np.float32),
        "scalar": np.array(3.5),
    }
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    found = npz.read_npz(file.getvalue())
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert found[name].flags.writeable


# --- the small files of a device; a huge one is refused, or as good as none


def read_status_file(folder: Path) -> None:
    identity = new_identity(folder)
    sparse(folder / "status.json")
    device_status.report(folder, identity)


def read_metadata(folder: Path) -> None:
    sparse(folder / "root.json")
    assert device_status.expiries(folder) == {}


def read_race(folder: Path) -> None:
    key = race.Key(bundle="0" * 64, engine="x", version="1", machine="m", threads=0)
    sparse(folder / "races" / f"{key.digest}.json")
    assert race.recall(folder, key) is None


def read_plan(folder: Path) -> None:
    (folder / "plans").mkdir(mode=0o700)
    sparse(folder / "plans" / f"{KEY.digest}.json")
    assert isinstance(PlanCache(folder).find(KEY), str)


def read_reports(folder: Path) -> None:
    (folder / "devices").mkdir()
    sparse(folder / "status" / "x.json")
    (row,) = fleet.read_fleet(folder, NOW).rows
    assert "this has more" in row.health.reasons[0]


def read_state(folder: Path) -> None:
    sparse(folder / "state.json")
    assert slots.Slots(folder).status().problems


def read_floor(folder: Path) -> None:
    floors = floor.Floors(sparse(folder / "floor.json").parent, folder / "second")
    with pytest.raises(UpdateError, match="damaged"):
        floors.read()


def read_identity(folder: Path) -> None:
    sparse(folder / "device.json")
    with pytest.raises(FleetError, match=r"device\.json"):
        device(folder)


def read_key(folder: Path) -> None:
    sparse(folder / "devices" / f"{'0' * 32}.pub.json")
    with pytest.raises(FleetError, match="more than"):
        fleet.read_keys(folder / "devices")


def read_seen(folder: Path) -> None:
    with pytest.raises(FleetError, match="too large"):
        fleet.read_seen(sparse(folder / "seen.json"))


def read_settings(folder: Path) -> None:
    sparse(folder / update.SETTINGS)
    with pytest.raises(UpdateError, match="remove it"):
        update.read_settings(folder)


READERS = [
    read_status_file, read_metadata, read_race, read_plan, read_reports, read_state, read_floor,
    read_identity, read_key, read_settings,
]  # fmt: skip


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_huge_file_in_a_device_s_folder(read: Callable[[Path], None], tmp_path: Path) -> None:
    with little_memory():
        read(tmp_path)


def test_a_huge_memory_of_replays(tmp_path: Path) -> None:
    with little_memory(64 * 1024 * 1024):
        read_seen(tmp_path)


def test_a_huge_channel_is_refused() -> None:
    with pytest.raises(UpdateError, match=re.escape("65,536")):
        channel.decode(b" " * (channel.MAX_CHANNEL_BYTES + 1))
