"""A device's id and key: made once, whole or not at all, and the key is nobody else's to read."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime.delivery import identity
from runtime.delivery.identity import Identity, PublicKey, device, encode_public, read_public
from runtime.errors import FleetError


def test_id_and_key_stay_the_same(tmp_path: Path) -> None:
    first = Identity.open(tmp_path / "state", "line 1")
    again = Identity.open(tmp_path / "state")
    assert again.device == first.device
    assert again.public == first.public
    assert device(tmp_path / "state").id == first.device.id
    assert Identity.open(tmp_path / "other").device.id != first.device.id


def test_a_name_can_be_changed_and_the_id_stays(tmp_path: Path) -> None:
    first = device(tmp_path, "line 1")
    assert device(tmp_path, "line 2, säge") == identity.Device(id=first.id, name="line 2, säge")
    assert device(tmp_path).name == "line 2, säge"


@pytest.mark.parametrize("name", ["", "two\nlines", "\x1b[31mred", "x" * 81])
def test_a_name_that_cannot_be_shown_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FleetError, match="printable characters"):
        device(tmp_path, name)
    assert not (tmp_path / "device.json").exists()


def test_the_key_is_private_and_no_draft_of_it_is_left(tmp_path: Path) -> None:
    Identity.open(tmp_path)
    assert (tmp_path / "device.key").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.json", "device.key"]


def test_many_who_come_first_at_once_get_one_identity(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Identity.open(tmp_path).public, range(16)))
    assert len(set(map(encode_public, found))) == 1


CRASHES = """
import os, sys
from pathlib import Path
from runtime.delivery.identity import Identity, device

Identity.open(Path(sys.argv[1]) / "imports")  # everything is loaded before the first fork
ended = 0
for name in ("open", "fdopen", "fsync", "link", "unlink"):
    for nth in range(8):
        state = Path(sys.argv[1]) / f"{name}-{nth}"
        if (child := os.fork()) == 0:
            real, left = getattr(os, name), nth
            def dying(*arguments, **options):
                global left
                left -= 1
                if left < 0: os._exit(9)
                return real(*arguments, **options)
            setattr(os, name, dying)
            Identity.open(state)
            os._exit(0)
        ended += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        files = ("device.json", "device.key")
        before = [p.read_bytes() if (p := state / file).exists() else None for file in files]
        after = Identity.open(state)  # whole, or made now
        assert after.public.verify(after.sign(b"x"), b"x")
        for file, data in zip(files, before):
            assert data in (None, (state / file).read_bytes()), (name, nth, file)
print(ended)
"""


def test_a_crash_at_any_call_leaves_a_whole_identity_or_none(tmp_path: Path) -> None:
    """Two files, each opened, synced, linked, unlinked: at least two crashes at each call."""
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10


def test_signatures_hold_for_the_same_bytes_and_key_alone(tmp_path: Path) -> None:
    one, other = Identity.open(tmp_path / "1"), Identity.open(tmp_path / "2")
    signature = one.sign(b"data")
    assert one.public.verify(signature, b"data")
    assert not one.public.verify(signature, b"Data")
    assert not other.public.verify(signature, b"data")
    for short in (b"", signature[:63], signature + b"\0"):
        assert not one.public.verify(short, b"data")


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    Identity.open(tmp_path)
    (tmp_path / "device.key").chmod(0o640)
    with pytest.raises(FleetError, match="other users can read this private key; run: chmod 600"):
        Identity.open(tmp_path)


def test_a_key_behind_a_link_is_refused(tmp_path: Path) -> None:
    Identity.open(tmp_path / "state")
    key = tmp_path / "state" / "device.key"
    key.rename(tmp_path / "elsewhere")
    key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FleetError, match="expected a small plain file of this user"):
        Identity.open(tmp_path / "state")


@pytest.mark.parametrize("damage", [b"", b"-----BEGIN PRIVATE KEY-----\n", b"\0" * 119])
def test_a_damaged_key_is_refused_and_not_replaced(tmp_path: Path, damage: bytes) -> None:
    Identity.open(tmp_path)
    key = tmp_path / "device.key"
    key.write_bytes(damage)
    with pytest.raises(FleetError, match="remove it and enroll this device again"):
        Identity.open(tmp_path)
    assert key.read_bytes() == damage


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"id": "../../etc"}', b"[" * 3000, b" " * 5000])
def test_a_damaged_identity_is_refused_and_not_replaced(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "device.json").write_bytes(damage)
    with pytest.raises(FleetError, match=r"device\.json"):
        device(tmp_path)
    assert (tmp_path / "device.json").read_bytes() == damage


def test_a_public_document_is_its_file_s_and_no_other_device_s(tmp_path: Path) -> None:
    public = Identity.open(tmp_path / "state").public
    path = tmp_path / f"{public.id}.pub.json"
    path.write_bytes(encode_public(public))
    assert read_public(path) == public
    moved = path.rename(tmp_path / f"{'0' * 32}.pub.json")
    with pytest.raises(FleetError, match="expected the key of that device"):
        read_public(moved)


def test_a_key_that_is_no_point_of_the_curve_verifies_nothing() -> None:
    public = PublicKey(id="0" * 32, name="x", ed25519="ff" * 32)
    assert not public.verify(b"\0" * 64, b"data")


def test_without_the_library_it_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["cryptography"] = None
from runtime.__main__ import main
sys.exit(main(["fleet", "enroll", "--state", sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'fieldfit[fleet]'" in done.stderr
    assert done.stderr.count("\n") == 1
