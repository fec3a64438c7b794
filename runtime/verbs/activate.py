"""``fieldfit activate``: try a staged bundle, and let it answer if it proves itself."""

import argparse
import json
import math
import sys
import time
from typing import get_args

from runtime.delivery.slots import Slot, Slots
from runtime.errors import UpdateError
from runtime.manifest import Minimum
from runtime.verbs.options import add_state_option, add_verb, ordinal, positive, seconds, slots

_LOOK_S = 0.1
"""How often the outcome is looked for."""

_FRAME_S = 0.02
"""Between golden samples that stand in for frames: what else runs here shall not be starved."""


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "activate",
        run,
        summary="try a staged bundle on this device, and keep it if it proves itself",
        description="Put a slot on trial. The service that answers here takes it up at once, or "
        "else at its next start: it proves the bundle in a process of its own, lets it answer "
        "between two frames, and commits it once it is stable; at the first failure the bundle "
        "before it answers again. With --wait the outcome is waited for; where no service runs, "
        "all of that is done here, with golden samples as frames.",
        example="fieldfit activate --wait --latency-ms 20",
    )
    parser.add_argument(
        "slot",
        nargs="?",
        help="the beginning of its SHA-256; default the highest version that was staged",
    )
    parser.add_argument("--wait", action="store_true", help="return once it is committed, or not")
    parser.add_argument(
        "--require",
        choices=get_args(Minimum),
        help="refuse a lesser engine: tensorrt, or cuda for any engine on the GPU",
    )
    parser.add_argument(
        "--latency-ms",
        type=_milliseconds,
        metavar="MS",
        help="most that one call may take, by 99 of 100; default 3 times what answers now takes",
    )
    parser.add_argument(
        "--allow-new-labels", action="store_true", help="accept other labels, or another order"
    )
    parser.add_argument(
        "--allow-lower",
        action="store_true",
        help="take a version below the highest that was committed here",
    )
    parser.add_argument(
        "--again", action="store_true", help="try a bundle that was given up before"
    )
    parser.add_argument(
        "--window",
        type=seconds,
        default=60.0,
        metavar="S",
        help="seconds that it must be stable, where no service runs; default 60",
    )
    parser.add_argument(
        "--deadline",
        type=seconds,
        default=1800.0,
        metavar="S",
        help="most that building and proving may take, where no service runs; default 1800",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads; default all")
    parser.add_argument("--device", type=ordinal, default=0, metavar="N", help="GPU; default 0")
    add_state_option(parser)


def run(options: argparse.Namespace) -> int:
    """0; a slot that is not taken is an error."""
    from runtime.delivery.activation import Limits, keep_limits
    from runtime.delivery.live import led

    device = slots(options)
    limits = Limits(
        require=options.require,
        latency_ms=options.latency_ms,
        allow_new_labels=options.allow_new_labels,
    )
    sha256 = device.find(options.slot) if options.slot else _newest(device)
    with device.lock():  # nobody begins a try before the limits are there
        slot = device.activate(sha256, allow_lower=options.allow_lower, again=options.again)
        keep_limits(slot, limits)
    service = led(device.folder)
    if options.wait:
        (_watch if service else _try_here)(device, slot, options)
    return _tell(device, slot, service, options.json)


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected milliseconds above 0, got {text!r}")
    return value


def _newest(device: Slots) -> str:
    status = device.status()
    if status.state.pending:
        return status.state.pending.release.sha256
    ready = [release for release in status.staged if not status.state.barred(release.sha256)]
    if not ready:
        raise UpdateError(
            f"{device.folder}: no slot is waiting to be activated; put a bundle into one with "
            "fieldfit stage"
        )
    return ready[-1].sha256


def _on_trial(device: Slots, slot: Slot) -> bool:
    pending = device.pending()
    return pending is not None and pending.sha256 == slot.sha256


def _watch(device: Slots, slot: Slot, options: argparse.Namespace) -> None:
    """Wait for what the running service makes of it."""
    from runtime.delivery.live import led

    print(f"fieldfit: the running service tries {slot.release}", file=sys.stderr)
    while _on_trial(device, slot):
        if not led(device.folder):
            raise UpdateError(
                f"{slot.release}: the service ended before it was committed; it is tried again at "
                "its next start, or now with fieldfit activate --wait"
            )
        time.sleep(_LOOK_S)


def _try_here(device: Slots, slot: Slot, options: argparse.Namespace) -> None:
    """Be the service until the trial is over, with golden samples as frames."""
    from runtime.candidates import Request
    from runtime.delivery.live import LiveClassifier, Stability

    request = Request(threads=options.threads, device=options.device)
    if not _on_trial(device, slot):
        return
    print(f"fieldfit: proving {slot.release}", file=sys.stderr)
    with LiveClassifier(
        device.folder, request=request, stability=Stability(options.window),
        deadline_s=options.deadline,
    ) as live:  # fmt: skip
        while _on_trial(device, slot):
            live.poll()
            if not live.on_trial:
                time.sleep(_LOOK_S)
                continue
            for image in live.classifier.bundle.golden()["images"]:
                live(image)
                time.sleep(_FRAME_S)


def _tell(device: Slots, slot: Slot, service: bool, as_json: bool) -> int:
    """Print what became of it; 0. Raises UpdateError if it was given up."""
    state = device.status().state
    failure = state.failure(slot.sha256)
    if state.current and state.current.sha256 == slot.sha256:
        outcome, line, following = "committed", f"{slot.release} is current", "fieldfit status"
    elif _on_trial(device, slot):
        who = "the running service takes it up" if service else "the service's next start tries it"
        following = "fieldfit status" if service else "fieldfit activate --wait, to try it now"
        outcome, line = "on trial", f"{slot.release} is on trial: {who}"
    else:
        outcome, line = "given up", failure.reason if failure else "another slot took its place"
    if as_json:
        facts = {"sha256": slot.sha256, "version": slot.version, "outcome": outcome}
        print(json.dumps({**facts, "reason": line}))
    if outcome == "given up":
        answers = f"{state.current} answers" if state.current else "no slot answers"
        raise UpdateError(f"{slot.release} was given up: {line}; {answers}")
    if not as_json:
        print(line)
        print(f"next: {following}")
    return 0
