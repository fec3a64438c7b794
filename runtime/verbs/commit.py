"""``fieldfit commit``: keep the bundle that is on trial without waiting for the end of it."""

import argparse
import json

from runtime.errors import UpdateError
from runtime.verbs.options import add_state_option, add_verb, slots


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "commit",
        run,
        summary="keep the bundle that is on trial, now",
        description="Prove the slot on trial once more in a process of its own and commit it "
        "without waiting until it was stable. Committing what is current changes nothing. A slot "
        "that is refused is given up.",
        example="fieldfit commit",
    )
    parser.add_argument("slot", nargs="?", help="the beginning of its SHA-256: this one or none")
    add_state_option(parser)


def run(options: argparse.Namespace) -> int:
    """0; a slot that is refused is an error."""
    from runtime.delivery.activation import kept_limits, prove

    device = slots(options)
    state = device.status().state
    sha256 = device.find(options.slot) if options.slot else None
    if sha256 is None or state.current is None or state.current.sha256 != sha256:
        slot = device.pending()
        if slot is None or sha256 not in (None, slot.sha256):
            failure = state.failure(sha256) if sha256 else None
            why = f"it was given up: {failure.reason}" if failure else "no such slot is on trial"
            raise UpdateError(f"nothing to commit: {why}; see fieldfit status")
        slot = device.begin_try()
        if slot is None:
            last = device.status().state.failures[-1]
            raise UpdateError(f"{last.release} was given up: {last.reason}")
        proof = prove(slot, beside=device.current(), limits=kept_limits(slot))
        if not proof.passed:
            device.rollback(f"{proof.fault}: {proof.reason}", slot.sha256)
            raise UpdateError(f"{slot.release} was given up: {proof.fault}: {proof.reason}")
        device.commit(slot.sha256)
    current = device.current()
    assert current
    if options.json:
        print(json.dumps({"sha256": current.sha256, "version": current.version}))
        return 0
    print(f"{current.release} is current")
    print("next: fieldfit status")
    return 0
