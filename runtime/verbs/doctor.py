"""``fieldfit doctor``: this machine, what opens on it, and the engine that a bundle would get."""

import argparse
import json
import logging
from pathlib import Path

import msgspec

from runtime.bundle import Bundle
from runtime.choose import Choice, choose_engine
from runtime.classifier import check_runtime
from runtime.errors import EngineError, FieldfitError
from runtime.exposition import engine_metrics
from runtime.verbs.options import add_engine_options, add_verb, cache, request


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "doctor",
        run,
        summary="describe this machine, and the engine it would choose",
        description="Print what a support engineer asks for first; with a bundle, also what that "
        "says about itself, whether its adaptation is verified, the engine that would run it and "
        "why others were passed over.",
        example="fieldfit doctor build/solar/bundle --json",
    )
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument(
        "--metrics",
        action="store_true",
        help="print the bundle's engine as Prometheus metrics, e.g. for a textfile collector",
    )
    add_engine_options(parser)


def run(options: argparse.Namespace) -> int:
    """1 if no engine can run the bundle here, else 0."""
    from runtime import doctor

    if options.metrics and options.bundle is None:
        raise EngineError("--metrics are those of a bundle: fieldfit doctor BUNDLE --metrics")
    about, bundle, choice = _about(options) if options.bundle else ({}, None, None)
    failed = options.bundle is not None and choice is None
    if options.metrics:
        if bundle is None or choice is None:
            raise EngineError(f"no metrics: {about['reasons']}")
        print(engine_metrics(bundle.manifest, choice), end="")
        return 0
    report = doctor.examine()
    if options.json:
        steps = [step._asdict() for step in choice.steps] if choice else []
        shown = {**about, "steps": steps} if about else None
        print(json.dumps(msgspec.to_builtins(report) | {"bundle": msgspec.to_builtins(shown)}))
    else:
        print(doctor.text(report, about))
    return 1 if failed else 0


def _about(
    options: argparse.Namespace,
) -> tuple[dict[str, object], Bundle | None, Choice | None]:
    """What there is to say about the bundle, the bundle, and its engine, closed again."""
    from runtime.doctor import bundle_facts

    logging.getLogger("runtime.choose").setLevel(logging.ERROR)  # the steps are in the report
    about: dict[str, object] = {}
    bundle: Bundle | None = None
    try:
        bundle = Bundle.open(options.bundle)
        about = bundle_facts(bundle)
        check_runtime(bundle)
        choice = choose_engine(bundle, request(options), cache=cache(options))
    except FieldfitError as error:
        return about | {"engine": "none", "reasons": [str(error)]}, bundle, None
    choice.engine.close()
    about |= {
        "engine": str(choice.engine),
        "reasons": [str(step) for step in choice.steps],
    }
    return about, bundle, choice
