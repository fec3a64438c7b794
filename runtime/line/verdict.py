"""What the line says about one frame, as it is kept, sent and shown. It decides nothing."""

from typing import Literal

import msgspec

Word = Literal["OK", "DEFECT", "ABSTAIN", "NOT INSPECTED"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """All of a verdict but whose it is and its number, which the outbox gives it."""

    time: str
    """When the frame was taken, ISO 8601 in UTC."""
    boot: str
    """The kernel's boot id, which says what ``monotonic`` counts from."""
    monotonic: float
    source: str
    frame: str
    verdict: Word
    reason: str = ""
    """Why it abstained or did not inspect; empty otherwise."""
    label: str | None = None
    score: float | None = None
    """Probability of ``label`` after temperature scaling."""
    flags: tuple[str, ...] = ()
    """What the health checks noticed on this frame, e.g. ``blurred``."""
    bundle: str = ""
    version: str = ""
    engine: str = ""
    """Engine, provider and form that answered."""
    milliseconds: dict[str, float] = {}


class Verdict(Finding, frozen=True, kw_only=True):
    """One record: JSON lines on stdout, MQTT payloads and the outbox all hold exactly this."""

    device: str
    seq: int
    """Running number of the device, without gaps; with ``device`` it tells duplicates."""


def numbered(finding: Finding, device: str, seq: int) -> Verdict:
    """The verdict that ``finding`` becomes as the ``seq``-th of ``device``."""
    return Verdict(**msgspec.structs.asdict(finding), device=device, seq=seq)
