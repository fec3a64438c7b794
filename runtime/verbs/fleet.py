"""``fieldfit fleet``: enroll this device, report how it is, and look at all devices."""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from runtime import atomic
from runtime.delivery.broker import SCHEMES, Address
from runtime.delivery.fleet import (
    DEVICES,
    SEEN,
    Fleet,
    read_fleet,
    read_keys,
    read_seen,
    survey,
    write_key,
    write_report,
    write_seen,
)
from runtime.delivery.fleet_health import EXPECTED
from runtime.delivery.fleet_mqtt import collect, publish
from runtime.delivery.fleet_page import page, summary, table
from runtime.delivery.identity import Identity
from runtime.delivery.slots import default_folder
from runtime.errors import FleetError
from runtime.verbs.options import add_state_option, add_verb


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb, and its own three, to the command."""
    fleet = verbs.add_parser(
        "fleet",
        help="enroll this device, report how it is, look at all devices",
        description="See many devices without a server: each signs one document about itself and "
        "leaves it in a folder or at an MQTT broker; anybody who has the devices' public keys can "
        "read them all.",
        epilog="Start with: fieldfit fleet enroll --to DIR",
    )
    actions = fleet.add_subparsers(metavar="VERB", required=True)
    enroll = add_verb(
        actions,
        "enroll",
        _enroll,
        summary="make this device's identity, and show or hand over its public document",
        description="Make the device's id and key if it has none, and print its public document. "
        "With --to it is put into DIR/devices; compare the fingerprint there with the one that "
        "this prints before believing it.",
        example='fieldfit fleet enroll --name "line 3, station 2" --to /media/stick/fleet',
    )
    add_state_option(enroll)
    enroll.add_argument("--name", help="what people call this device; default its host name")
    enroll.add_argument("--to", type=Path, metavar="DIR", help="a fleet folder to enroll it in")
    report = add_verb(
        actions,
        "report",
        _report,
        summary="sign how this device is, and leave that where others see it",
        description="Write one signed document: bundle, engine, slots, expiry of the update "
        "metadata, machine. It is kept in the state folder, and put into DIR/status or retained "
        "at the broker under TOPIC/ID. Run it from a timer.",
        example="fieldfit fleet report --to mqtts://device@broker.example/fieldfit",
    )
    add_state_option(report)
    report.add_argument(
        "--to", required=True, metavar="DIR|URL", help="a fleet folder, or mqtt(s)://host/topic"
    )
    status = add_verb(
        actions,
        "status",
        _status,
        summary="all devices in a table, worst first",
        description="Verify every document with the enrolled keys, judge it and show one line a "
        "device with its reasons. Documents that no enrolled device signed, and old ones played "
        "again, are refused. The exit code is 1 unless every device is healthy.",
        example="fieldfit fleet status /srv/fleet --html fleet.html",
    )
    status.add_argument("place", metavar="DIR|URL", help="a fleet folder, or mqtt(s)://host/topic")
    status.add_argument(
        "--devices", type=Path, metavar="DIR",
        help="folder of the devices' keys; default DIR/devices, needed for MQTT",
    )  # fmt: skip
    status.add_argument("--html", type=Path, metavar="PAGE", help="write a static page, too")
    status.add_argument(
        "--expect", type=duration, default=EXPECTED, metavar="TIME",
        help="a device that reports less often is unknown, e.g. 90m, 24h, 7d; default 24h",
    )  # fmt: skip


def duration(text: str) -> datetime.timedelta:
    """A time such as ``90m``, ``24h`` or ``7d``."""
    units = {"m": "minutes", "h": "hours", "d": "days"}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not number.isdecimal() or not 0 < int(number) < 100_000:
        raise argparse.ArgumentTypeError(f"expected a time such as 90m, 24h or 7d, got {text!r}")
    return datetime.timedelta(**{units[unit]: int(number)})


def _enroll(options: argparse.Namespace) -> int:
    """0; what cannot be done is an error."""
    identity = Identity.open(options.state or default_folder(), options.name)
    public = identity.public
    path = write_key(options.to, public) if options.to else None
    if options.json:
        print(json.dumps(msgspec.to_builtins(public) | {"fingerprint": public.fingerprint}))
        return 0
    print(f"device      {public.id}\nname        {public.name}\nfingerprint {public.fingerprint}")
    print(f"key         ed25519 {public.ed25519}")
    if path:
        print(f"enrolled    {path}")
    return 0


def _report(options: argparse.Namespace) -> int:
    """0; what cannot be done is an error."""
    from runtime.delivery.device_status import report

    state = options.state or default_folder()
    address = Address.parse(options.to) if _is_url(options.to) else None
    identity = Identity.open(state)
    document = report(state, identity)
    if address:
        publish(address, identity.device.id, document)
        place = str(address)
    else:
        place = str(write_report(Path(options.to), identity.device.id, document))
    if options.json:
        print(json.dumps({"device": identity.device.id, "bytes": len(document), "to": place}))
    else:
        print(f"{identity.device.name} ({identity.device.id}): {len(document):,} bytes to {place}")
    return 0


def _status(options: argparse.Namespace) -> int:
    """1 unless every device is healthy."""
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    fleet, seen = look(options.place, options.devices, now, options.expect)
    unkept = write_seen(seen, fleet.seen) if fleet.seen else ""
    if unkept:
        print(f"fieldfit: {unkept}", file=sys.stderr)
    if options.html:
        atomic.write_text(options.html, page(fleet, now, "Devices"))
    if options.json:
        print(json.dumps({"summary": summary(fleet), "devices": _rows(fleet)}))
    else:
        print(table(fleet, now))
    return 0 if all(row.health.level == "healthy" for row in fleet.rows) else 1


def look(
    place: str,
    devices: Path | None,
    now: datetime.datetime,
    expected: datetime.timedelta = EXPECTED,
) -> tuple[Fleet, Path]:
    """The fleet at ``place``, a folder or an address, and the file that remembers what was seen.

    ``devices`` is the folder of keys, where it is not the fleet folder's own.

    Raises FleetError for what cannot be read or reached.
    """
    if not _is_url(place):
        folder = Path(place)
        fleet = read_fleet(folder, now, expected=expected, devices=devices)
        return fleet, (devices or folder / DEVICES) / SEEN
    address = Address.parse(place)
    if devices is None:
        raise FleetError(f"{address}: whose signature is whose? add --devices DIR/{DEVICES}")
    seen = devices / SEEN
    keys = read_keys(devices)
    return survey(collect(address), keys, read_seen(seen), now, expected), seen


def _rows(fleet: Fleet) -> list[dict[str, Any]]:
    return [
        {
            "device": row.device,
            "name": row.name,
            "health": row.health.level,
            "reasons": list(row.health.reasons),
            "status": msgspec.to_builtins(row.status),
        }
        for row in fleet.rows
    ]


def _is_url(place: str) -> bool:
    return urlsplit(place).scheme in SCHEMES
