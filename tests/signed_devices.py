"""Devices that sign, and statuses of healthy ones for tests to change."""

import datetime
from pathlib import Path
from typing import Any

import msgspec

from runtime.delivery.fleet_health import SOON
from runtime.delivery.identity import Identity
from runtime.delivery.status_document import (
    FORMAT,
    BundleStatus,
    EngineStatus,
    MachineStatus,
    Moment,
    SlotStatus,
    Status,
    UpdateStatus,
)

NOW = datetime.datetime(2026, 11, 25, 12, 0, tzinfo=datetime.timezone.utc)
SHA = "ab" * 32


def ago(**time: float) -> datetime.datetime:
    """That long before NOW."""
    return NOW - datetime.timedelta(**time)


def new_identity(folder: Path, name: str = "line 1") -> Identity:
    """A device of its own."""
    return Identity.open(folder, name)


def healthy(device: str = "0" * 32, name: str = "line 1", **changes: Any) -> Status:
    """Seen ten minutes ago, with bundle SHA for two days; nothing is wrong with it."""
    status = Status(
        format=FORMAT,
        device=device,
        name=name,
        fieldfit="0.1.0",
        moment=Moment(
            seen=ago(minutes=10), synchronised=True, boot="b1", uptime_s=1000.0, sequence=7
        ),
        machine=MachineStatus(
            model="Orin Nano", temperatures={"cpu": 51.5}, memory_total=2**33,
            memory_available=2**32,
        ),
        bundle=BundleStatus(name="solar", version="1.2.0", sha256=SHA, since=ago(days=2)),
        engine=EngineStatus(
            name="tensorrt", version="10.3.0", provider="tensorrt", form="int8",
            required="tensorrt",
        ),
        slots=SlotStatus(previous="cd" * 32),
        update=UpdateStatus(
            expires={role: NOW + 2 * notice for role, notice in SOON.items()},
            outcome="nothing new",
            version_floor="1.2.0",
            time_floor=ago(days=30),
        ),
    )  # fmt: skip
    return msgspec.structs.replace(status, **changes)


def moment(sequence: int = 7, **changes: Any) -> Moment:
    """The moment of a healthy status, changed."""
    return msgspec.structs.replace(healthy().moment, sequence=sequence, **changes)
