"""``fieldfit classify``: one line for each image."""

import argparse
import json
import sys
from pathlib import Path

import msgspec

from runtime.errors import DataError
from runtime.sources.files import find_images
from runtime.verbs.options import add_engine_options, add_verb, request


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "classify",
        run,
        summary="classify images",
        description="Print one line for each image: label, score, path. Folders are searched for "
        "images; an image that cannot be read is reported and the rest goes on. With --json each "
        "line is one JSON object; that of an unreadable image has an error instead of an answer. "
        "At the first use on a device with TensorRT the engine is built, which can take minutes.",
        example="fieldfit classify build/solar/bundle photos/ --json",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", nargs="+", help="files, folders or quoted glob patterns")
    add_engine_options(parser)


def run(options: argparse.Namespace) -> int:
    """1 if an image could not be read, else 0."""
    from runtime.classifier import Classifier

    failed = 0
    asked = request(options)._asdict()
    with Classifier.open(options.bundle, **asked, cache=options.cache) as model:
        print(f"fieldfit: {model.reasons[-1]}", file=sys.stderr)
        if not model.adaptation.verified:
            print(f"fieldfit: {model.adaptation}", file=sys.stderr)
        for path in find_images(options.images):
            try:
                answer = model(path)
            except DataError as error:
                failed += 1
                print(f"fieldfit: {error}", file=sys.stderr)
                if options.json:
                    print(json.dumps({"path": str(path), "error": str(error)}), flush=True)
                continue
            if options.json:
                print(json.dumps({"path": str(path), **msgspec.to_builtins(answer)}), flush=True)
            else:
                mark = " (abstained)" if answer.abstained else ""
                print(f"{answer.label}\t{answer.score:.4f}\t{path}{mark}", flush=True)
    return 1 if failed else 0
