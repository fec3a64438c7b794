"""How verbs explain themselves, and the options that several of them share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from runtime.candidates import EngineName, Request
from runtime.delivery.slots import Slots, default_folder
from runtime.engines.plan_cache import PlanCache
from runtime.manifest import Minimum


def add_verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a verb that ``run`` carries out; each has ``--json``, for programs that read."""
    parser = verbs.add_parser(
        name, help=summary, description=description, epilog=f"Example: {example}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.set_defaults(verb=run)
    return parser


def add_engine_options(parser: argparse.ArgumentParser, *, threads: int | None = None) -> None:
    """Which engine may run, and where plans are kept; ``request`` and ``cache`` read them.

    ``threads`` is the default; None are all.
    """
    parser.add_argument(
        "--require",
        choices=get_args(Minimum),
        help="fail rather than step down: tensorrt, or cuda for any engine on the GPU",
    )
    parser.add_argument(
        "--engine", choices=get_args(EngineName), help="run this engine and no other"
    )
    parser.add_argument("--form", help="run this form of the bundle (fp16, int8-cpu, ...), or fail")
    parser.add_argument(
        "--threads",
        type=positive,
        default=threads,
        metavar="N",
        help=f"CPU threads; default {threads or 'all'}",
    )
    parser.add_argument("--device", type=ordinal, default=0, metavar="N", help="GPU; default 0")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="where built engines are kept; default $FIELDFIT_CACHE, else ~/.cache/fieldfit",
    )


def request(options: argparse.Namespace) -> Request:
    """What the options insist on."""
    return Request(
        engine=options.engine,
        form=options.form,
        require=options.require,
        threads=options.threads,
        device=options.device,
    )


def cache(options: argparse.Namespace) -> PlanCache:
    """Where plans are kept."""
    return PlanCache(options.cache) if options.cache else PlanCache.default()


def add_state_option(parser: argparse.ArgumentParser) -> None:
    """Where this device keeps its slots; ``slots`` reads it."""
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="where the slots are; default $FIELDFIT_STATE, else /var/lib/fieldfit for root and "
        "~/.local/state/fieldfit for others",
    )


def slots(options: argparse.Namespace) -> Slots:
    """The device's slots; it says when it waits for another command."""
    return Slots(options.state or default_folder(), waiting=_say_waiting)


def _say_waiting(pid: int | None) -> None:
    other = f"process {pid}" if pid else "another command"
    print(f"fieldfit: waiting for {other}, which works on the slots", file=sys.stderr)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def ordinal(text: str) -> int:
    """A whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of 0 or more, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0 and below a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value
