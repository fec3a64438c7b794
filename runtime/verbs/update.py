"""``fieldfit update``: fetch what this device's channel offers, and put it on trial."""

import argparse
import json
import logging
import sys
from pathlib import Path

import msgspec

from runtime.errors import UpdateError
from runtime.verbs.options import add_state_option, add_verb, slots

_MAX_ROOT_BYTES = 512_000


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "update",
        run,
        summary="fetch what this device's channel offers, and put it on trial",
        description="Ask the repository, a web server's or a stick's, for what the channel offers; "
        "check signatures, age and versions; fetch a new bundle, going on where an earlier attempt "
        "was cut; check every byte, stage it and put it on trial. Whatever goes wrong, what runs "
        "goes on running. At the first use say --from, --channel and --root; they are remembered, "
        "and a later --from or --channel counts once.",
        example="fieldfit update --from https://updates.example.org/line1 --channel line1 "
        "--root root.json",
    )
    parser.add_argument(
        "--from", dest="source", metavar="URL", help="of the repository: https:// or file:///"
    )
    parser.add_argument("--channel", metavar="NAME", help="whose bundle this device is to run")
    parser.add_argument(
        "--root",
        type=Path,
        metavar="FILE",
        help="provision: trust this root.json from now on, and remember the options beside it",
    )
    parser.add_argument(
        "--allow-http",
        action="store_true",
        help="accept a source without TLS: signatures protect it, but everyone can read it",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    add_state_option(parser)


def run(options: argparse.Namespace) -> int:
    """0, also if there is nothing new; what goes wrong is an error."""
    from tqdm import tqdm

    from runtime.delivery.identity import device
    from runtime.delivery.update import Request, update, utc_now

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # what it says is in the error
    state = slots(options).folder
    request = Request(
        source=options.source,
        channel=options.channel,
        root=_root(options.root) if options.root else None,
        allow_http=options.allow_http,
        dry_run=options.dry_run,
    )
    with tqdm(unit="B", unit_scale=True, disable=None, leave=False, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        outcome = update(state, request, device=device(state).id, progress=show)
    if warning := outcome.expiring(utc_now()):
        print(f"fieldfit: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps(msgspec.to_builtins(outcome)))
        return 0
    print(f"{outcome.outcome}: {outcome.reason}")
    if outcome.outcome in ("staged", "pending"):
        print(f"next: fieldfit activate {outcome.offer.sha256[:12]}")
    return 0


def _root(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_ROOT_BYTES)
    except OSError as error:
        raise UpdateError(f"{path}: cannot be read: {error.strerror}") from error
