"""The fastest form wins, equals by quality; what was measured is remembered, or measured again."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from runtime.race import Failure, Key, race, rank, recall, remember
from tests.test_engines import CHANNELS, HEIGHT, WIDTH, tiny_model

KEY = Key(bundle="b" * 64, engine="onnxruntime-cpu", version="1.32.0", machine="x86", threads=2)
SQNR = {"fp32": 200.0, "fp16": 60.0, "int8": 28.0}


def test_the_fastest_is_first_and_the_others_have_a_sentence() -> None:
    ranking = rank({"fp32": 8.0, "int8": 2.0, "fp16": 3.0}, SQNR)
    assert ranking.order == ("int8", "fp16", "fp32")
    assert ranking.reasons == {
        "fp16": "1.50x the time of int8 (2.00 ms) here",
        "fp32": "4.00x the time of int8 (2.00 ms) here",
    }


def test_of_equals_the_one_nearer_to_the_checkpoint_is_taken() -> None:
    ranking = rank({"int8": 2.0, "fp16": 2.05}, SQNR)
    assert ranking.order == ("fp16", "int8")
    words = "as fast as fp16 (2.05 ms) and further from the checkpoint (28 against 60 dB)"
    assert ranking.reasons == {"int8": words}
    assert rank({"int8": 2.0, "fp16": 2.07}, SQNR).order == ("int8", "fp16")


def test_a_race_times_each_form() -> None:
    model = tiny_model().SerializeToString()
    engines = [OnnxRuntimeEngine(model, form=form, threads=1) for form in ("fp32", "int8-cpu")]
    images = np.zeros((3, HEIGHT, WIDTH, CHANNELS), np.uint8)
    milliseconds = race(engines, images)
    assert set(milliseconds) == {"fp32", "int8-cpu"}
    assert min(milliseconds.values()) > 0


def test_an_outcome_is_remembered_under_everything_it_depends_on(tmp_path: Path) -> None:
    import msgspec

    failed = {"int8": Failure("not built", "out of memory")}
    assert remember(tmp_path, KEY, {"fp32": 8.0}, failed) == ""
    outcome = recall(tmp_path, KEY)
    assert outcome is not None
    assert outcome.milliseconds == {"fp32": 8.0}
    assert outcome.failed == failed
    for change in ({"bundle": "c"}, {"version": "1.33.0"}, {"machine": "arm"}, {"threads": 1}):
        assert recall(tmp_path, msgspec.structs.replace(KEY, **change)) is None


def test_the_folder_it_makes_is_this_user_s_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        remember(tmp_path / "cache", KEY, {"fp32": 8.0}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": 1}', b"\xff" * 99, b" " * 10**6])
def test_a_damaged_memory_is_no_memory(tmp_path: Path, content: bytes) -> None:
    remember(tmp_path, KEY, {"fp32": 8.0}, {})
    (file,) = (tmp_path / "races").iterdir()
    file.write_bytes(content)
    assert recall(tmp_path, KEY) is None


def test_the_memory_of_another_key_is_not_believed(tmp_path: Path) -> None:
    import msgspec

    other = msgspec.structs.replace(KEY, version="1.20.0")
    remember(tmp_path, other, {"fp32": 8.0}, {})
    (file,) = (tmp_path / "races").iterdir()
    file.rename(file.with_name(f"{KEY.digest}.json"))
    assert recall(tmp_path, KEY) is None


def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reason = remember(tmp_path / "file", KEY, {"fp32": 8.0}, {})
    assert reason in {f"{tmp_path}/file: {words}" for words in ("File exists", "Not a directory")}
    assert remember(None, KEY, {}, {}) == "there is no cache folder"
    assert recall(None, KEY) is None
