"""The device command ``fieldfit``: classify, verify, doctor, benchmark.

Results go to stdout, the rest to stderr; ``--json`` where a program might read. Exit code 0 is
success, 1 an error with one line that says what to do, 2 wrong usage, 130 an interruption.
"""

import argparse
import glob
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from runtime.command import run_command
from runtime.errors import BundleError, DataError, FieldfitError
from runtime.preprocess import IMAGE_SUFFIXES
from runtime.version import __version__


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="fieldfit: %(message)s")
    verb: Callable[[argparse.Namespace], int] = options.verb
    return run_command("fieldfit", lambda: verb(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fieldfit",
        description="Run a proven image classifier on this device.",
        epilog="Start with: fieldfit verify build/solar/bundle",
    )
    parser.add_argument("--version", action="version", version=f"fieldfit {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    classify = _verb(
        verbs,
        "classify",
        _classify,
        "classify images",
        "Print one line for each image: label, score, path. Folders are searched for images; an "
        "image that cannot be read is reported and the rest goes on. With --json each line is one "
        "JSON object; that of an unreadable image has an error instead of an answer.",
        "fieldfit classify build/solar/bundle photos/ --json",
    )
    classify.add_argument("bundle", type=Path)
    classify.add_argument("images", nargs="+", help="files, folders or quoted glob patterns")
    _engine_options(classify)

    verify = _verb(
        verbs,
        "verify",
        _verify,
        "check every byte of a bundle and replay its golden samples",
        "Check every byte before anything is parsed, then run each form on this "
        "machine's CPU and compare its answers with those recorded at export.",
        "fieldfit verify solar-0.1.0.zip",
    )
    verify.add_argument("bundle", type=Path)

    doctor = _verb(
        verbs,
        "doctor",
        _doctor,
        "describe this machine, and the engine it would choose",
        "Print what a support engineer asks for first; with a bundle, also what that says about "
        "itself, whether its adaptation is verified, the engine that would run it and why others "
        "were passed over.",
        "fieldfit doctor build/solar/bundle --json",
    )
    doctor.add_argument("bundle", type=Path, nargs="?")

    benchmark = _verb(
        verbs,
        "benchmark",
        _benchmark,
        "time the bundle's forms against each other on this machine",
        "Time the forms in turn on the golden samples; speeds are ratios of CPU time to fp32's.",
        "fieldfit benchmark build/solar/bundle --threads 1 --batch 16",
    )
    benchmark.add_argument("bundle", type=Path)
    benchmark.add_argument("--batch", type=_positive, default=1, metavar="N", help="default 1")
    benchmark.add_argument("--seconds", type=_seconds, default=5.0, metavar="S", help="default 5")
    benchmark.add_argument("--threads", type=_positive, default=1, metavar="N", help="default 1")
    return parser


def _verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name, help=summary, description=description, epilog=f"Example: {example}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.set_defaults(verb=run)
    return parser


def _engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--require", metavar="FORM", help="run this form of the bundle or fail; never step down"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; default all")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def _classify(options: argparse.Namespace) -> int:
    from runtime.classifier import Classifier

    failed = 0
    with Classifier.open(options.bundle, form=options.require, threads=options.threads) as model:
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


def find_images(places: list[str]) -> Iterator[Path]:
    """Files as named, images below folders, matches of glob patterns; sorted within each place.

    Raises DataError for a place that gives no image.
    """
    for place in places:
        path = Path(place)
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if _is_image(f.relative_to(path), f))
        elif path.exists() or not glob.has_magic(place):
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(place, recursive=True))  # noqa: PTH207
        if not found:
            raise DataError(f"{place}: no images there ({', '.join(sorted(IMAGE_SUFFIXES))})")
        yield from found


def _is_image(inside: Path, file: Path) -> bool:
    """By its suffix; hidden files and folders are skipped, as in training."""
    hidden = any(part.startswith(".") for part in inside.parts)
    return not hidden and file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()


def _verify(options: argparse.Namespace) -> int:
    from runtime.bundle import Bundle
    from runtime.choose import try_form

    try:
        bundle = Bundle.open(options.bundle)
        golden = bundle.golden()
    except BundleError as error:
        if options.json:
            report = {"bundle": str(options.bundle), "passed": False, "reason": str(error)}
            print(json.dumps(report))
        raise
    steps = []
    for form in (artifact.form for artifact in bundle.manifest.artifacts):
        step, engine, _ = try_form(bundle, form, None, golden)
        steps.append(step)
        if engine is not None:
            engine.close()
    manifest = bundle.manifest
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
    else:
        size = sum(entry.size for entry in manifest.files)
        print(
            f"{manifest.name} {manifest.version}: {len(manifest.files) + 1} files, {size:,} bytes"
        )
        print("every byte is as the manifest says")
        print(f"adaptation: {manifest.adaptation}")
        for step in steps:
            print(
                f"{'ok  ' if step.accepted else 'FAIL'} {step.engine}, {step.form}: {step.reason}"
            )
    return 0 if passed else 1


def _doctor(options: argparse.Namespace) -> int:
    from runtime import doctor

    report: dict[str, object] = dict(doctor.facts())
    failed = False
    if options.bundle is not None:
        from runtime.bundle import Bundle
        from runtime.choose import choose_engine
        from runtime.classifier import check_runtime

        try:
            bundle = Bundle.open(options.bundle)
            report |= doctor.bundle_facts(bundle)
            check_runtime(bundle)
            choice = choose_engine(bundle)
            report["engine"] = str(choice.engine)
            report["reasons"] = [str(step) for step in choice.steps]
            choice.engine.close()
        except FieldfitError as error:
            failed = True
            report["engine"] = "none"
            report["reasons"] = [str(error)]
    if options.json:
        print(json.dumps(msgspec.to_builtins(report)))
    else:
        width = max(map(len, report)) + 2
        for name, value in report.items():
            lines = value if isinstance(value, list) else [value]
            for index, line in enumerate(lines):
                print(f"{name if index == 0 else '':<{width}}{line}")
    return 1 if failed else 0


def _benchmark(options: argparse.Namespace) -> int:
    import numpy as np

    from runtime.benchmark import interleave
    from runtime.bundle import Bundle
    from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

    bundle = Bundle.open(options.bundle)
    forms = [form for form in ("fp32", "int8-cpu") if bundle.manifest.artifact(form)]
    images = np.resize(bundle.golden()["images"], (options.batch, *bundle.manifest.input.shape))
    engines = [
        OnnxRuntimeEngine(bundle.model(form), form=form, threads=options.threads) for form in forms
    ]
    print(f"fieldfit: timing {', '.join(forms)} for {options.seconds:g} s", file=sys.stderr)
    timings = interleave(engines, images, seconds=options.seconds)
    if options.json:
        print(json.dumps([timing._asdict() for timing in timings]))
        return 0
    print(f"onnxruntime CPU, batch {options.batch}, threads {options.threads}; ms of one call")
    print(f"{'form':10}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}{'CPU':>9}{'speed':>9}")
    for timing in timings:
        columns = "".join(f"{value:9.2f}" for value in [*timing.wall_ms.values(), timing.cpu_ms])
        print(f"{timing.form:10}{columns}{timing.relative_speed:8.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
