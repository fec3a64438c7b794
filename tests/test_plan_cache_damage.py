"""A real TensorRT-RTX plan, damaged in every way we know, and asked for by a process of its own.

That process must end well and say in one sentence why the plan is refused, and must never have
waited. It imports no TensorRT: a damaged plan does not even come near it.
"""

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from runtime.engines.plan_cache import Plan, PlanCache, PlanKey
from runtime.engines.tensorrt_build import Built, build
from tests.test_engines import SHAPE, tiny_model

ROOT = Path(__file__).resolve().parent.parent


KINDS = ("plan", "json")


class Kept(NamedTuple):
    """The files of the plan in question, and of the same model's plan in another form."""

    plan: Path
    record: Path
    other_plan: Path
    other_record: Path


@pytest.fixture(scope="module")
def model() -> bytes:
    return bytes(tiny_model().SerializeToString())


@pytest.fixture(scope="module")
def built(model: bytes) -> Built:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install fieldfit[dev]")
    return build(model, batch=(1, 1, 4), shape=SHAPE, target_sm=(8, 6), level=0)


@pytest.fixture
def key(model: bytes, built: Built) -> PlanKey:
    return PlanKey(
        flavour=built.flavour,
        version=built.version,
        gpu="8.6",
        platform="linux-x86_64",
        cuda="13.0",
        model_sha256=hashlib.sha256(model).hexdigest(),
        form="fp32",
        options={"batch": [1, 1, 4], "level": 0},
    )


@pytest.fixture
def kept(tmp_path: Path, built: Built, key: PlanKey) -> Kept:
    cache = PlanCache(tmp_path)
    other = msgspec.structs.replace(key, form="fp16")
    assert cache.keep(key, built.plan, seconds=built.seconds, typing=built.typing) == ""
    other_plan = built.plan + b"\0"
    other_plan = other_plan[:16] + len(other_plan).to_bytes(8, "little") + other_plan[24:]
    assert cache.keep(other, other_plan, seconds=1, typing="strong") == ""
    place = tmp_path / "plans"
    files = [next(place.glob(f"{k.digest}*.{kind}")) for k in (key, other) for kind in KINDS]
    return Kept(*files)


def with_version(plan: bytes, *numbers: int) -> bytes:
    return plan[:24] + bytes(numbers) + plan[28:]


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(data)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def inflate(file: Path) -> None:
    os.truncate(file, 1 << 40)  # sparse: takes no disk, and must take no memory


def link_to_itself_moved(file: Path) -> None:
    target = file.with_name("elsewhere")
    file.rename(target)
    file.symlink_to(target)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def listen(file: Path) -> None:
    """A socket's file; its path is relative, since a socket's name may not be long."""
    file.unlink()
    before = Path.cwd()
    os.chdir(file.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(file.name)
    finally:
        os.chdir(before)


def take_both(kept: Kept) -> None:
    """The other entry's files under the names that they would have were they this one's."""
    name = kept.other_plan.name.replace(kept.other_record.stem, kept.record.stem)
    kept.plan.unlink()
    kept.other_plan.rename(kept.plan.with_name(name))
    kept.other_record.replace(kept.record)


Spoil = Callable[[Kept], object]

DAMAGE: dict[str, tuple[Spoil, str]] = {
    "plan truncated": (lambda kept: truncate(kept.plan), "damaged: expected"),
    "plan longer": (
        lambda kept: kept.plan.write_bytes(kept.plan.read_bytes() + b"x"),
        "damaged: expected",
    ),
    "plan flipped in its header": (lambda kept: flip(kept.plan, 25), "damaged: expected"),
    "plan flipped in the middle": (
        lambda kept: flip(kept.plan, kept.plan.stat().st_size // 2),
        "damaged: expected",
    ),
    "plan flipped at its end": (lambda kept: flip(kept.plan, -1), "damaged: expected"),
    "plan garbage": (lambda kept: kept.plan.write_bytes(os.urandom(5000)), "damaged: expected"),
    "plan an ONNX file": (
        lambda kept: kept.plan.write_bytes(tiny_model().SerializeToString()),
        "damaged: expected",
    ),
    "plan empty": (lambda kept: kept.plan.write_bytes(b""), "got 0 of e3b0c44298fc"),
    "plan of another version": (
        lambda kept: kept.plan.write_bytes(with_version(kept.plan.read_bytes(), 1, 2, 0, 54)),
        "damaged: expected",
    ),
    "plan of another entry": (lambda kept: kept.other_plan.replace(kept.plan), "damaged: expected"),
    "plan and record of another entry": (
        take_both,
        "not made by this cache for this machine: built from its form fp16, this is fp32",
    ),
    "plan missing": (lambda kept: kept.plan.unlink(), "expected beside its record, got none"),
    "plan a terabyte": (lambda kept: inflate(kept.plan), "expected at most 2,147,483,648 bytes"),
    "plan a link": (lambda kept: link_to_itself_moved(kept.plan), "plain file, got a link"),
    "plan a pipe": (lambda kept: pipe(kept.plan), "plain file, got a folder, pipe or device"),
    "plan a folder": (lambda kept: folder(kept.plan), "plain file, got a folder, pipe or device"),
    "plan a socket": (lambda kept: listen(kept.plan), "No such device or address"),
    "record truncated": (lambda kept: truncate(kept.record), "the record is damaged"),
    "record flipped": (
        lambda kept: flip(kept.record, kept.record.stat().st_size // 2),
        "the record is damaged",
    ),
    "record garbage": (lambda kept: kept.record.write_bytes(b"\xff" * 900), "record is damaged"),
    "record empty": (lambda kept: kept.record.write_bytes(b""), "the record is damaged"),
    "record a pickle": (
        lambda kept: kept.record.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR."),
        "the record is damaged",
    ),
    "record of another format": (
        lambda kept: kept.record.write_bytes(b'{"format": 9, "plan": "a.plan"}'),
        "the record is damaged or of another version",
    ),
    "record of another entry": (
        lambda kept: kept.other_record.replace(kept.record),
        "not made by this cache for this machine: built from its form fp16, this is fp32",
    ),
    "record missing": (
        lambda kept: kept.record.unlink(),
        "a plan without a record: not made by this cache, or not finished",
    ),
    "record a terabyte": (lambda kept: inflate(kept.record), "expected at most 262,144 bytes"),
    "record a link": (lambda kept: link_to_itself_moved(kept.record), "plain file, got a link"),
    "record a pipe": (lambda kept: pipe(kept.record), "plain file, got a folder, pipe or device"),
    "record a folder": (lambda kept: folder(kept.record), "plain file, got a folder, pipe"),
}


FIND = """
import sys
from pathlib import Path
import msgspec
from runtime.engines.plan_cache import Plan, PlanCache, PlanKey
key = msgspec.json.decode(sys.argv[2], type=PlanKey)
found = PlanCache(Path(sys.argv[1])).find(key)
print(found.record.sha256 if isinstance(found, Plan) else found)
assert not {"tensorrt", "tensorrt_rtx"} & set(sys.modules)
"""


def find_in_another_process(folder: Path, key: PlanKey) -> str:
    command = [sys.executable, "-c", FIND, str(folder), msgspec.json.encode(key).decode()]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,  # a pipe that is opened carelessly waits for ever
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


def test_the_plan_is_found_as_long_as_nothing_is_wrong_with_it(
    tmp_path: Path, kept: Kept, key: PlanKey, built: Built
) -> None:
    assert find_in_another_process(tmp_path, key) == built.sha256


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_is_refused_with_a_sentence_and_built_again(
    tmp_path: Path, kept: Kept, key: PlanKey, built: Built, damage: str
) -> None:
    spoil, sentence = DAMAGE[damage]
    spoil(kept)
    assert sentence in find_in_another_process(tmp_path, key)
    if "folder" not in damage:  # that one is for a person to remove, and keep says so
        cache = PlanCache(tmp_path)
        assert cache.keep(key, built.plan, seconds=built.seconds, typing=built.typing) == ""
        found = cache.find(key)
        assert isinstance(found, Plan)
        assert found.plan == built.plan


def test_a_plan_by_another_version_is_named_as_what_it_is(
    tmp_path: Path, kept: Kept, key: PlanKey
) -> None:
    updated = msgspec.structs.replace(key, version="99.0.0.1")
    assert find_in_another_process(tmp_path, updated) == (
        f"built by TensorRT-RTX {key.version}, this is TensorRT-RTX 99.0.0.1"
    )
