"""``fieldfit build``: make a bundle's engine on this device before it is needed."""

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import EngineError
from runtime.verbs.options import add_engine_options, add_verb, cache, request

if TYPE_CHECKING:
    from runtime.bundle import Bundle


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "build",
        run,
        summary="build and prove the bundle's engine on this device, and keep it",
        description="Do now what the first use would do: build the TensorRT engine of each form "
        "that passed the gate, replay the golden samples on it, measure which form is fastest "
        "here, and keep all of that for later starts. Where there is no TensorRT the next engine "
        "is opened and measured. Every candidate and its fate is printed.",
        example="fieldfit build build/solar/bundle --require tensorrt",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--rebuild", action="store_true", help="build and measure again what is kept already"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="build nothing: ask TensorRT's parser, in seconds, which nodes it cannot read",
    )
    add_engine_options(parser)


def run(options: argparse.Namespace) -> int:
    """0; what cannot be had is an error, and so is a bundle of which no form can be read."""
    from runtime.bundle import Bundle
    from runtime.choose import choose_engine
    from runtime.classifier import check_runtime

    logging.getLogger("runtime.choose").setLevel(logging.ERROR)  # the same is printed at the end
    bundle = Bundle.open(options.bundle)
    check_runtime(bundle)
    if options.check:
        return _check(bundle, options)
    choice = choose_engine(bundle, request(options), cache=cache(options), rebuild=options.rebuild)
    with choice.engine:
        if options.json:
            summary = {
                "engine": choice.engine.name,
                "version": choice.engine.version,
                "provider": choice.engine.provider,
                "form": choice.engine.form,
                "steps": [step._asdict() for step in choice.steps],
            }
            print(json.dumps(summary))
            return 0
        for step in choice.steps:
            print(f"{'ok  ' if step.accepted else '    '} {step}")
    print(f"next: fieldfit classify {options.bundle} IMAGE")
    return 0


def _check(bundle: "Bundle", options: argparse.Namespace) -> int:
    """Print what TensorRT's parser says of each form that TensorRT would be offered."""
    from runtime.candidates import KINDS
    from runtime.engines.tensorrt_build import preflight

    offered = {form for kind in KINDS if kind.name == "tensorrt" for form in kind.runs}
    forms = [artifact.form for artifact in bundle.manifest.artifacts if artifact.form in offered]
    if options.form:
        forms = [form for form in forms if form == options.form]
    unread = {form: preflight(bundle.model(form)) for form in forms}
    if options.json:
        print(json.dumps(unread))
    else:
        for form, sentences in unread.items():
            print(f"{'    ' if sentences else 'ok  '} {form}: {'; '.join(sentences) or 'readable'}")
    if all(unread.values()):
        raise EngineError(f"{bundle.path}: TensorRT can read none of its forms", "not built")
    if not options.json:
        print(f"next: fieldfit build {options.bundle}")
    return 0
