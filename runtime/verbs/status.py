"""``fieldfit status``: which bundle answers on this device, which is on trial, what went wrong."""

import argparse
import json
from collections.abc import Iterator

import msgspec

from runtime.delivery.slot_state import TRIES
from runtime.delivery.slots import Status
from runtime.verbs.options import add_state_option, add_verb, slots


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "status",
        run,
        summary="show which bundle answers here, and which is on trial",
        description="Show the slots of this device and change nothing: what answers, what did "
        "before, what is on trial and how many tries it has left, what was given up and why. "
        "Needs no lock: it may be asked at any moment. Exit code 1 if something is damaged.",
        example="fieldfit status --json",
    )
    parser.add_argument(
        "--mend",
        action="store_true",
        help="read every byte of the slots in use first; give up what is damaged, for the slot "
        "before it, and take a damaged state from its copy",
    )
    add_state_option(parser)


def run(options: argparse.Namespace) -> int:
    """1 if something is damaged, else 0."""
    device = slots(options)
    mended = device.recover() if options.mend else ()
    status = device.status()
    if options.json:
        staged = msgspec.to_builtins(status.staged)
        facts = {**msgspec.to_builtins(status.state), "staged": staged}
        print(json.dumps({**facts, "problems": status.problems, "mended": mended}))
    else:
        for sentence in mended:
            print(f"mended    {sentence}")
        print("\n".join(lines(status)))
        mend = status.problems and not options.mend
        print(f"next: {'fieldfit status --mend' if mend else next_step(status)}")
    return 1 if status.problems else 0


def lines(status: Status) -> Iterator[str]:
    """A line for each part that a slot plays, and for what went wrong."""
    state = status.state
    yield f"current   {state.current or 'none: nothing was committed here yet'}"
    if state.previous:
        yield f"previous  {state.previous}"
    if state.pending:
        yield f"on trial  {state.pending.release}, {state.pending.tries} of {TRIES} tries left"
    for release in status.staged:
        yield f"staged    {release}"
    if state.floor:
        yield f"floor     {state.floor}: nothing older is taken"
    for failure in state.failures:
        yield f"given up  {failure.release} on {failure.date}: {failure.reason}"
    for problem in status.problems:
        yield f"problem   {problem}"


def next_step(status: Status) -> str:
    """The one command that leads on from here, once what can be mended is."""
    state = status.state
    if status.problems:  # what could not be mended is staged again
        return "fieldfit stage BUNDLE.zip"
    if state.pending:
        if state.pending.tries == TRIES:
            return f"fieldfit activate {state.pending.release.sha256[:12]}"
        return "fieldfit commit, if it answers well; else fieldfit rollback"
    ready = [release for release in status.staged if not state.barred(release.sha256)]
    if ready:
        return f"fieldfit activate {ready[-1].sha256[:12]}"
    return "fieldfit stage BUNDLE.zip"
