"""``fieldfit verify``: every byte of a bundle, and its golden samples on this machine's CPU."""

import argparse
import json
from pathlib import Path

import msgspec

from runtime.errors import BundleError
from runtime.verbs.options import add_verb


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "verify",
        run,
        summary="check every byte of a bundle and replay its golden samples",
        description="Check every byte before anything is parsed, then run each form on this "
        "machine's CPU and compare its answers with those recorded at export.",
        example="fieldfit verify solar-0.1.0.zip",
    )
    parser.add_argument("bundle", type=Path)


def run(options: argparse.Namespace) -> int:
    """1 if a form does not answer as recorded, else 0."""
    from runtime.bundle import Bundle
    from runtime.choose import prove_on_cpu

    try:
        bundle = Bundle.open(options.bundle)
        golden = bundle.golden()
    except BundleError as error:
        if options.json:
            report = {"bundle": str(options.bundle), "passed": False, "reason": str(error)}
            print(json.dumps(report))
        raise
    manifest = bundle.manifest
    steps = [prove_on_cpu(bundle, artifact.form, golden) for artifact in manifest.artifacts]
    passed = all(step.accepted for step in steps)
    if options.json:
        summary = {
            "bundle": str(options.bundle),
            "name": manifest.name,
            "version": manifest.version,
            "passed": passed,
            "adaptation": msgspec.to_builtins(manifest.adaptation),
            "files": len(manifest.files) + 1,
            "selftests": [step._asdict() for step in steps],
        }
        print(json.dumps(summary))
        return 0 if passed else 1
    size = sum(entry.size for entry in manifest.files)
    print(f"{manifest.name} {manifest.version}: {len(manifest.files) + 1} files, {size:,} bytes")
    print("every byte is as the manifest says")
    print(f"adaptation: {manifest.adaptation}")
    for step in steps:
        print(f"{'ok  ' if step.accepted else 'FAIL'} {step.engine}, {step.form}: {step.reason}")
    return 0 if passed else 1
