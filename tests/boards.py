"""Boards of lines for tests of the status page: what a loop would have published."""

import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from runtime.line.page import snapshot
from runtime.line.page.snapshot import Board, Condition, Snapshot, board_folder
from runtime.line.verdict import Finding, Verdict, Word

NOW = datetime.datetime.now(datetime.timezone.utc)


class Clock:
    """Monotonic time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def verdict(word: Word = "OK", seq: int = 1, **changed: Any) -> Verdict:
    """What a line says of a frame."""
    seen = word != "NOT INSPECTED"
    fields: dict[str, Any] = {
        "time": "2026-03-01T08:15:30.123Z", "boot": "b", "monotonic": 1.0, "source": "cam-1",
        "frame": f"{seq:06d}", "label": "functional" if seen else None,
        "score": 0.9 if seen else None,
        "reason": "" if word in ("OK", "DEFECT") else f"because of {seq}",
        "milliseconds": {"infer": 4.0, "total": 9.0} if seen else {"wait": 1.0},
    }  # fmt: skip
    return Verdict(verdict=word, device="d", seq=seq, **{**fields, **changed})


def image(level: int = 90) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [64, 64, 1]."""
    picture = np.full((64, 64, 1), level, np.uint8)
    picture[16:48, 28:36] = 220
    return picture


def condition(**changed: Any) -> Condition:
    """A line that is well, with a word about everything."""
    fields: dict[str, Any] = {
        "device": "station-2", "fieldfit": "0.1.0", "machine": "Jetson Orin NX",
        "started": NOW - datetime.timedelta(hours=3),
        "model": snapshot.Model(
            name="solar", version="0.1.0", slot="7f" * 32, verified=True,
            adaptation="fine-tuning (120 field labels), verified: it is better",
            ok_labels=("functional",),
        ),
        "engine": snapshot.Engine(
            name="onnxruntime 1.23 CPU, int8-cpu", reasons=("tensorrt: missing library",)
        ),
        "cameras": (snapshot.Camera(name="cam-1", kind="camera", age_s=0.04),),
        "stages": {"infer": snapshot.Spread(4.0, 5.0, 7.0), "total": snapshot.Spread(9, 12, 16)},
        "heat": snapshot.Heat(zones={"cpu": 51.0}, limit_c=90.0),
        "drift": (
            snapshot.Drift(of="scores", p_value=0.4, alpha=0.001, drifted=False, window=500),
        ),
        "outbox": snapshot.Outbox(rows=2, bytes=900, sent=40, to="mqtt://broker/line"),
        "disks": (snapshot.Disk(path="/var/lib/fieldfit", free=20 * 2**30, total=58 * 2**30),),
        "update": snapshot.Update(
            expires={"root": NOW + datetime.timedelta(days=200)}, outcome="is current"
        ),
        "evidence": snapshot.Evidence(kept=12, bytes=10**6, limit_bytes=10**8),
    }  # fmt: skip
    return Condition(**{**fields, **changed})


def published(state: Path, frames: list[Finding], **changed: Any) -> Board:
    """A board below ``state`` that was told of all frames, and put up."""
    board = Board(board_folder(state), per_second=1e9)
    for one in frames:
        board.judged(one, image() if one.label is not None else None)
    board.publish(
        condition(**changed), "# TYPE fieldfit_outbox_rows gauge\nfieldfit_outbox_rows 2\n"
    )
    return board


def rewrite(state: Path, **changed: Any) -> None:
    """Change fields of what is put up there."""
    found = snapshot.read(board_folder(state))
    assert isinstance(found, Snapshot)
    changed_one = msgspec.structs.replace(found, **changed)
    (board_folder(state) / snapshot.SNAPSHOT).write_bytes(msgspec.json.encode(changed_one))
