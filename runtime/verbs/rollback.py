"""``fieldfit rollback``: take a bundle back; the one before it answers, without any network."""

import argparse
import json
import re

from runtime.verbs.options import add_state_option, add_verb, slots


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "rollback",
        run,
        summary="take back the bundle on trial, or else the current one",
        description="Give up the slot on trial, or else the current one: the one before it "
        "answers, in a running service between two frames. A slot that is named and plays no "
        "part is no error, so a script may say it twice.",
        example='fieldfit rollback --reason "rejects good cells"',
    )
    parser.add_argument(
        "slot", nargs="?", help="its SHA-256, or the beginning of it: this one or none"
    )
    parser.add_argument(
        "--reason", default="taken back by an operator", help="kept, and shown by fieldfit status"
    )
    add_state_option(parser)


def run(options: argparse.Namespace) -> int:
    """0; nothing to roll back to is an error."""
    device = slots(options)
    state = device.status().state
    named = options.slot
    sha256 = named if named is None or re.fullmatch("[0-9a-f]{64}", named) else device.find(named)
    parts = [state.current, state.pending.release if state.pending else None]
    if sha256 is None or any(release and release.sha256 == sha256 for release in parts):
        device.rollback(options.reason, sha256)
    current = device.current()
    if options.json:
        facts = {"sha256": current.sha256, "version": current.version} if current else None
        print(json.dumps({"current": facts}))
        return 0
    print(f"{current.release} is current" if current else "no slot is current")
    print("next: fieldfit status")
    return 0
