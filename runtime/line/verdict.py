"""What the line says about one frame, as it is kept, sent and shown. It decides nothing."""

from typing import Literal

import msgspec

Word = Literal["OK", "DEFECT", "ABSTAIN", "NOT INSPECTED"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One record: JSON lines on stdout, MQTT payloads and the outbox all hold exactly this."""

    device: str
    seq: int
    """Running number of the device, without gaps; with ``device`` it tells duplicates."""
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
