"""``fieldfit stage``: put a bundle into a slot of this device, where it can be tried."""

import argparse
import json
from pathlib import Path

from runtime.verbs.options import add_state_option, add_verb, slots


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "stage",
        run,
        summary="put a bundle into a slot of this device",
        description="Check every byte of a bundle and unpack it into a slot of its own, whole or "
        "not at all; what answers goes on answering. The same bundle again changes nothing. A "
        "bundle older than the highest version ever committed here is refused.",
        example="fieldfit stage solar-0.2.0.zip",
    )
    parser.add_argument("bundle", type=Path, help="a zip, or the folder of a bundle")
    parser.add_argument(
        "--allow-lower",
        action="store_true",
        help="take a bundle that is older than the highest version committed here",
    )
    add_state_option(parser)


def run(options: argparse.Namespace) -> int:
    """0; a bundle that is not taken is an error."""
    slot = slots(options).stage(options.bundle, allow_lower=options.allow_lower)
    if options.json:
        release = slot.release
        facts = {"sha256": slot.sha256, "name": release.name, "version": release.version}
        print(json.dumps({**facts, "folder": str(slot.folder)}))
        return 0
    print(f"staged {slot.release}: every byte is as the manifest says")
    print(f"next: fieldfit activate {slot.sha256[:12]}")
    return 0
