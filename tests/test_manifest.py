"""A manifest is believed whole or not at all."""

import hashlib
import json
from typing import Any

import msgspec
import pytest

from runtime.errors import BundleError
from runtime.manifest import (
    FORMAT,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    Adaptation,
    Artifact,
    FileEntry,
    Manifest,
    Quality,
    decode,
    encode,
)
from runtime.preprocess import InputSpec

QUALITY = Quality(samples=100, labelled=80, agreement=0.99, sqnr_db=31.5, accuracy=0.9)


def entry(name: str) -> FileEntry:
    return FileEntry(name=name, sha256="ab" * 32, size=10)


MANIFEST = Manifest(
    format=FORMAT,
    name="solar",
    version="1.2.0",
    labels=("defective", "functional"),
    input=InputSpec(size=(96, 96), channels=1),
    adaptation=Adaptation(
        rung="fine-tuning", verified=True, reason="AUC up by 0.12", labels_used=200
    ),
    artifacts=(
        Artifact(form="fp32", file="fp32.onnx", quality=QUALITY),
        Artifact(form="int8", file="int8.onnx", quality=QUALITY, relative_speed=1.7),
    ),
    files=(entry("fp32.onnx"), entry("int8.onnx"), entry("golden.npz")),
    golden="golden.npz",
    temperature=1.3,
    recipe_sha256="cd" * 32,
    checkpoint_sha256="ef" * 32,
)


def changed(**fields: Any) -> bytes:
    return encode(msgspec.structs.replace(MANIFEST, **fields))


def test_round_trip() -> None:
    data = encode(MANIFEST)
    back = decode(data)
    assert encode(back) == data
    assert msgspec.structs.replace(back, digest="") == MANIFEST
    assert len(back.digest) == 64
    found = back.artifact("int8")
    assert found is not None
    assert found.relative_speed == 1.7
    assert back.artifact("fp16") is None


def test_the_bytes_are_canonical_and_readable() -> None:
    assert encode(decode(encode(MANIFEST))) == encode(MANIFEST)
    lines = encode(MANIFEST).decode().splitlines()
    assert lines[1] == ' "format": 1,'
    assert lines[-2].startswith(' "digest": ')
    # the same content in another layout is not what was signed off
    with pytest.raises(BundleError, match="digest differs"):
        decode(json.dumps(json.loads(encode(MANIFEST))).encode())


def test_a_manifest_from_before_a_field_was_added_stays_valid() -> None:
    """Its digest is of its own bytes, not of what this fieldfit would write."""
    older = json.loads(encode(MANIFEST))
    for artifact in older["artifacts"]:
        del artifact["speed_machine"], artifact["quality"]["p_value"]
    older["digest"] = ""
    bare = (json.dumps(older, indent=1, ensure_ascii=False) + "\n").encode()
    digest = hashlib.sha256(bare).hexdigest()
    data = bare.replace(b'"digest": ""', f'"digest": "{digest}"'.encode())
    assert msgspec.structs.replace(decode(data), digest="") == MANIFEST
    with pytest.raises(BundleError, match="digest differs"):
        decode(data.replace(b'"solar"', b'"lunar"'))


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_is_refused(bit: int) -> None:
    data = encode(MANIFEST)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        with pytest.raises(BundleError):
            decode(bytes(flipped))


def test_every_truncation_and_any_tail_is_refused() -> None:
    data = encode(MANIFEST)
    for length in range(len(data)):
        with pytest.raises(BundleError):
            decode(data[:length])
    with pytest.raises(BundleError):
        decode(data + b" ")


def test_a_newer_format_says_to_update() -> None:
    # fields of the future must not hide the one message that helps
    data = json.dumps({"format": FORMAT + 1, "unheard_of": True}).encode()
    with pytest.raises(BundleError, match=r"format 2 is newer than 1, .* update fieldfit"):
        decode(data)


def test_an_oversized_manifest_is_not_parsed() -> None:
    with pytest.raises(BundleError, match="the limit is 1,048,576"):
        decode(b" " * (MAX_MANIFEST_BYTES + 1))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(BundleError):
        decode(b'{"format":1,"labels":' + b"[" * 100_000)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"artifacts": MANIFEST.artifacts[1:]}, "expected fp32 and each form once, got int8"),
        ({"artifacts": MANIFEST.artifacts + MANIFEST.artifacts[:1]}, "each form once"),
        ({"files": MANIFEST.files[1:]}, r"names fp32\.onnx but does not list it"),
        ({"files": MANIFEST.files[:2]}, r"names golden\.npz"),
        ({"files": MANIFEST.files + MANIFEST.files[:1]}, "different names"),
        ({"files": (*MANIFEST.files, entry("manifest.json"))}, "different names"),
        (
            {"files": MANIFEST.files + tuple(entry(f"f{i}") for i in range(MAX_FILES))},
            "at most 64",
        ),
        ({"labels": ("one",)}, "two or more"),
        ({"labels": ("one", "one")}, "two or more different"),
        ({"reference": "reference.npz"}, r"names reference\.npz but does not list it"),
        ({"reference": "../reference.npz"}, "regex"),
        ({"ok_labels": ("functional", "fine")}, "ok_labels names fine, which is no label"),
        # what the types refuse: paths, hidden and odd names, sizes, numbers
        ({"files": (*MANIFEST.files, entry("../etc"))}, "regex"),
        ({"files": (*MANIFEST.files, entry(".hidden"))}, "regex"),
        ({"files": (*MANIFEST.files, entry("a/b"))}, "regex"),
        ({"files": (*MANIFEST.files, entry("a\n"))}, "regex"),
        ({"files": (*MANIFEST.files, FileEntry(name="a", sha256="AB" * 32, size=1))}, "regex"),
        ({"files": (*MANIFEST.files, FileEntry(name="a", sha256="ab" * 32, size=-1))}, ">= 0"),
        ({"temperature": 0.0}, "> 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"abstain_below": 1.5}, "<= 1"),
        ({"recipe_sha256": "x"}, "regex"),
        ({"adaptation": msgspec.structs.replace(MANIFEST.adaptation, labels_used=-1)}, ">= 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value,
)
def test_contradictions_are_refused_though_the_digest_is_right(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        decode(changed(**fields))
