"""Plans that are a header and noise, and how one is kept; light, for scripts that are killed."""

import os
import random
from typing import Any

import msgspec

from runtime.engines.plan_cache import PlanCache, PlanKey

NOBODY = 65534
KEY = PlanKey(
    flavour="tensorrt",
    version="10.3.0.30",
    gpu="8.7",
    platform="linux-aarch64 L4T R36.4.3",
    cuda="12.6, driver 12.6",
    model_sha256="12ab" * 16,
    form="int8",
    options={"batch": [1, 1, 8], "level": 3, "typing": "auto"},
)


def make_plan(version: str = "10.3.0.30", size: int = 2000, seed: int = 0) -> bytes:
    numbers = bytes(int(number) for number in version.split("."))
    return b"ftrt" + bytes(20) + numbers + random.Random(seed).randbytes(size - 28)


def changed(**parts: Any) -> PlanKey:
    return msgspec.structs.replace(KEY, **parts)


def never(pid: int | None) -> None:
    raise AssertionError(f"waits for {pid}")


def keep(cache: PlanCache, key: PlanKey = KEY, plan: bytes | None = None) -> str:
    with cache.lock(key, never):
        return cache.keep(key, plan or make_plan(key.version), seconds=1.5, typing="strong")


def become_nobody() -> None:
    """Root is bound by no permissions; whoever else runs the tests is, and stays who they are."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
