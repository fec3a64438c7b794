"""What the publishing commands have in common: options, the bar while writing, the next step."""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

from export.publish.keys import PASSPHRASE, Ring, passphrases
from export.publish.publication import expiring
from export.publish.repository import ONLINE_DAYS, USB_DAYS, File, Repository, write


def add_repository(parser: argparse.ArgumentParser) -> None:
    """The folder that all is about."""
    parser.add_argument(
        "--repo", type=Path, required=True, metavar="DIR", help="the repository's folder"
    )


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Which keys are at hand, and how they are unlocked."""
    parser.add_argument(
        "--keys",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with keys, e.g. on a stick; may be given several times",
    )
    add_passphrase(parser)


def add_passphrase(parser: argparse.ArgumentParser) -> None:
    """Where the passphrase comes from."""
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        metavar="FILE",
        help="file whose only line is the keys' passphrase; default: the environment variable "
        f"{PASSPHRASE}, else asked for, key by key",
    )


def add_days(parser: argparse.ArgumentParser) -> None:
    """How long snapshot and timestamp are valid; what was said last holds until then."""
    days = parser.add_mutually_exclusive_group()
    days.add_argument(
        "--usb",
        dest="days",
        action="store_const",
        const=USB_DAYS,
        help=f"sign snapshot and timestamp for {USB_DAYS} days: devices get sticks, no network",
    )
    days.add_argument(
        "--days",
        type=_days,
        metavar="N",
        help=f"sign them for N days, here and from now on; at first {ONLINE_DAYS}",
    )


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 3650:
        raise argparse.ArgumentTypeError(f"expected a number of days from 1 to 3650, got {text!r}")
    return int(text)


def percent(text: str) -> int:
    """A whole percentage."""
    if not text.isdecimal() or int(text) > 100:
        raise argparse.ArgumentTypeError(f"expected a percentage from 0 to 100, got {text!r}")
    return int(text)


def ring(options: argparse.Namespace) -> Ring:
    """The keys that the options name."""
    return Ring(options.keys, passphrases(options.passphrase_file))


def days(options: argparse.Namespace, repository: Repository) -> int:
    """For how long to sign snapshot and timestamp."""
    return repository.days if options.days is None else int(options.days)


def now() -> datetime.datetime:
    """UTC, in whole seconds as TUF writes it."""
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)


def write_with_bar(folder: Path, files: Sequence[File]) -> None:
    """Write ``files`` under a progress bar."""
    from train import console

    with console.fraction(f"write {folder}") as progress:
        write(folder, files, progress)


def say_next(folder: Path, moment: datetime.datetime) -> None:
    """What soon expires, and the one next step."""
    from train import console

    for line in expiring(Repository.read(folder), moment):
        console.say(line)
    console.say(f"next: copy {folder} to the web server, bucket or stick that devices read")
