"""What a fleet costs its web server: requests and bytes of each device that asks for updates.

Every device has a state folder of its own and asks a static server on loopback, one after the
other: what is counted is on the wire, headers included, and depends on no clock.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.harness import Options, Report, Table
from runtime.delivery.floor import second_copy
from runtime.delivery.slots import Slots
from runtime.delivery.update import Request, update
from tests.update_repository import Forge, Server, copy_device, tiny_bundle

LONG = True

DEVICES, FETCHING = 10_000, 1_000
QUICK = 50
BUNDLE_BYTES = 300_000
POLLS_A_MONTH = 24 * 30
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Cost(NamedTuple):
    """What one device's update came to, and cost the server."""

    outcome: str
    requests: int
    sent: int
    """Bytes of responses, headers included."""
    received: int
    """Bytes of requests, headers included."""


def measure(options: Options) -> Report:
    """Let a fleet poll, then get one new bundle, then poll after the daily signature."""
    devices, fetching = (QUICK, QUICK) if options.quick else (DEVICES, FETCHING)
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        forge = Forge(folder / "repository")
        forge.publish("1.0")
        with Server(forge.folder) as server:
            fleet = _Fleet(folder, forge, server)
            situations = [("nothing new", fleet.run(devices))]
            forge.timestamp.version += 1
            forge.write(forge.timestamp, [forge.keys.online])
            situations.append(("nothing new, timestamp signed again", fleet.run(fetching)))
            data = tiny_bundle("1.1", padding=BUNDLE_BYTES)
            forge.publish("1.1", data=data, percentage=10)
            situations.append(("a new bundle for 10 %", fleet.run(fetching)))
            forge.publish("1.1", data=data)
            situations.append(("a new bundle for all", fleet.run(fetching)))
    return _report(situations, len(data))


class _Fleet:
    """Devices that run 1.0, each in a folder of its own while it asks."""

    def __init__(self, folder: Path, forge: Forge, server: Server) -> None:
        self._folder, self._server = folder, server
        self._template = folder / "template"
        update(self._template, Request(server.url, "line", forge.trust), device="0" * 32)
        Slots(self._template).begin_try()
        Slots(self._template).commit()
        update(self._template, device="0" * 32)

    def run(self, devices: int) -> list[Cost]:
        """The costs of as many devices."""
        return [self._ask(number) for number in tqdm(range(devices), disable=None)]

    def _ask(self, number: int) -> Cost:
        state = copy_device(self._template, self._folder / f"device{number}")
        server = self._server
        server.log.clear()
        sent, received = server.sent, server.received
        outcome = update(state, device=f"{number:032x}").outcome
        shutil.rmtree(state)
        shutil.rmtree(second_copy(state).parent)
        return Cost(outcome, len(server.log), server.sent - sent, server.received - received)


def _report(situations: Sequence[tuple[str, list[Cost]]], size: int) -> Report:
    rows = []
    figures: dict[str, object] = {}
    for name, costs in situations:
        for outcome in sorted({cost.outcome for cost in costs}):
            same = [cost for cost in costs if cost.outcome == outcome]
            spans = [
                [cost.requests for cost in same],
                [cost.sent for cost in same],
                [cost.received for cost in same],
            ]
            rows.append((name, outcome, f"{len(same):,}", *map(_span, spans)))
            figures[f"{name}: {outcome}"] = {
                "devices": len(same),
                **{
                    field: {"least": min(span), "most": max(span)}
                    for field, span in zip(Cost._fields[1:], spans, strict=True)
                },
            }
    poll = situations[0][1][0]
    thousand = 1000 * POLLS_A_MONTH
    month = (
        f"A thousand devices that ask once an hour make {thousand * poll.requests:,} requests in "
        f"30 days and are sent {thousand * poll.sent / 1e9:.2f} GB while there is nothing new; a "
        "new bundle adds its size a thousand times, once."
    )
    table = Table(
        title="Each device, for one question",
        columns=(
            "situation", "outcome", "devices", "requests", "bytes sent to it", "bytes it sent"
        ),
        rows=tuple(rows),
        notes=(
            f"Headers of HTTP included, TLS and TCP not. The new bundle has {size:,} bytes. Where "
            "all devices cost the same there is one number: cost grows with their count and with "
            "nothing else, and the server computes nothing.",
            month,
        ),
    )  # fmt: skip
    return Report(title="What a fleet costs its web server", tables=(table,), figures=figures)


def _span(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
