"""The device command ``fieldfit``: build, classify, verify, doctor, benchmark.

Results go to stdout, the rest to stderr; ``--json`` where a program might read. Exit code 0 is
success, 1 an error with one line that says what to do, 2 wrong usage, 130 an interruption.
"""

import argparse
import logging
import sys
from collections.abc import Callable

from runtime.command import run_command
from runtime.verbs import (
    activate,
    benchmark,
    build,
    classify,
    collect,
    commit,
    doctor,
    fleet,
    page,
    rollback,
    serve,
    service,
    stage,
    status,
    update,
    verify,
    watch,
)
from runtime.version import __version__


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="fieldfit: %(message)s")
    verb: Callable[[argparse.Namespace], int] = options.verb
    return run_command("fieldfit", lambda: verb(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fieldfit",
        description="Run a proven image classifier on this device.",
        epilog="Start with: fieldfit verify build/solar/bundle",
    )
    parser.add_argument("--version", action="version", version=f"fieldfit {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in (
        classify,
        build,
        verify,
        doctor,
        benchmark,
        update,
        stage,
        activate,
        commit,
        rollback,
        status,
        fleet,
        serve,
        watch,
        page,
        collect,
        service,
    ):
        verb.add(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
