"""``python -m export RECIPE``: prove a trained model in every precision and write its bundle.

Leaves ``build/NAME/bundle/``, ``NAME-VERSION.zip``, ``release.json``, ``report.html`` and
``samples/``. ``python -m export gate BUNDLE`` judges a bundle again, from it and the images alone;
``report`` writes the page about the last export again, ``compare`` shows two bundles. ``publish``,
``promote``, ``rollback``, ``refresh`` and ``keys`` bring bundles to devices.
"""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command import run_command
from runtime.errors import ExportError

if TYPE_CHECKING:
    from runtime.recipe import Recipe


GATE = "gate"
REPORTING = "report"
COMPARE = "compare"
KEYS = "keys"
PUBLISHING = ("publish", "promote", "rollback", "refresh", KEYS)


def main(argv: list[str] | None = None) -> int:
    """Export by the recipe, or judge a bundle again, and return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="export: %(message)s")
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == [GATE]:
        return _gate(words[1:])
    if words[:1] == [REPORTING]:
        return _report(words[1:])
    if words[:1] == [COMPARE]:
        return _compare(words[1:])
    if words and words[0] in PUBLISHING:
        return _publishing(words[0], words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a trained model to ONNX, FP16 and INT8, judge each form on held-out "
        "field images against the checkpoint, build TensorRT engines to prove that they build, "
        "write what passed as a bundle, and a report on all of it. If no INT8 form that was asked "
        "for passes on an engine, the exit code is 1 and an earlier bundle stays as it was.",
        epilog="Examples: python -m export train/recipes/solar.toml; show its report again: python "
        "-m export report train/recipes/solar.toml; judge a bundle again: python -m export gate "
        "build/solar/bundle; two side by side: python -m export compare A B; bring one to devices: "
        "python -m export keys|publish|promote|rollback|refresh --help",
    )
    parser.add_argument("recipe", type=Path, help="the TOML file that was trained")
    parser.add_argument("--json", action="store_true", help="print release.json at the end")
    parser.add_argument(
        "--run", action="store_true", help="only classify the samples of the last export"
    )
    parser.add_argument(
        "--allow-fp16-only",
        action="store_true",
        help="write the bundle even if no INT8 form passed; devices then run FP16, or FP32 on a "
        "CPU",
    )
    options = parser.parse_args(words)
    return run_command(
        "export",
        lambda: _run(options),
        interrupted="interrupted; an earlier bundle is as it was, run it again",
    )


def _gate(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m export {GATE}",
        description="Judge every form of a bundle again on held-out images, against the bundle's "
        "fp32 form and by the budgets that it records. Needs neither checkpoint nor torch. Exit "
        "code 1 if a form fails.",
        epilog="Example: python -m export gate build/solar/bundle --data images/new-week",
    )
    from export.regate import add_arguments, run

    add_arguments(parser)
    options = parser.parse_args(words)
    return run_command("export", lambda: run(options))


def _report(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m export {REPORTING}",
        description="Write build/NAME/report.html again, the page that explains the last export of "
        "a recipe, from the records that it left. Nothing is measured.",
        epilog="Example: python -m export report train/recipes/solar.toml --open",
    )
    parser.add_argument("recipe", type=Path, help="the TOML file that was exported")
    parser.add_argument("--open", action="store_true", help="show it in a browser")
    options = parser.parse_args(words)

    def run() -> int:
        page = _write_report(options.recipe)
        print(page)
        if options.open:
            show_page(page)
        return 0

    return run_command("export", run)


def _write_report(recipe: Path) -> Path:
    from export.report.contents import write_report
    from export.report.facts import read_facts
    from export.report.page import REPORT
    from train import console

    facts = read_facts(recipe)
    page = facts.recipe.build / REPORT
    write_report(page, facts, lambda sections: console.track(sections, "report"))
    return page


def show_page(page: Path) -> None:
    """Open it in a browser, or say where it is: a machine may have no browser."""
    import webbrowser

    from train import console

    if not webbrowser.open(page.resolve().as_uri()):
        console.say(f"no browser could be opened here; the report is {page}")


def _compare(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m export {COMPARE}",
        description="Show two releases side by side: every figure, which is better and whether "
        "that is sure, here and as one page. Needs the bundles alone.",
        epilog="Example: python -m export compare line3-0.1.0.zip build/line3/bundle",
    )
    from export.compare import add_arguments, run

    add_arguments(parser)
    options = parser.parse_args(words)
    return run_command("export", lambda: run(options))


def _publishing(verb: str, words: list[str]) -> int:
    def run() -> int:
        try:
            from export.publish import commands, keys_commands
        except ModuleNotFoundError as error:
            raise ExportError(
                f"{verb} needs more than is installed ({error}); pip install 'fieldfit[publish]'"
            ) from error
        parsed = keys_commands.parse(words) if verb == KEYS else commands.parse(verb, words)
        carry_out, options = parsed
        return carry_out(options)

    return run_command("export", run, interrupted="interrupted; run the same command again")


def _run(options: argparse.Namespace) -> int:
    from runtime.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    if options.run:
        return _classify_samples(recipe)
    import msgspec

    from export.gate import without_int8
    from export.pipeline import export
    from export.table import show
    from train import console

    # Warnings of other packages' internals are nothing that a user of ours can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|timm|onnxscript)\.")
    release = export(recipe, allow_fp16_only=options.allow_fp16_only)
    show(release)
    if options.json:
        print(json.dumps(msgspec.to_builtins(release)))
    missing = () if options.allow_fp16_only else without_int8(release.forms)
    if not missing:
        bundle = recipe.build / "bundle"
        console.say(f"wrote {bundle} and {recipe.build / release.archive}")
    console.say(f"wrote {_write_report(options.recipe)}")
    if missing:
        raise ExportError(
            f"{'; '.join(missing)}. No bundle was written, {recipe.build / 'release.json'} has "
            "every figure; calibrate on more images, take the form out of [export] forms, or say "
            "--allow-fp16-only"
        )
    console.say(f"next: make run RECIPE={options.recipe}")
    return 0


def _classify_samples(recipe: "Recipe") -> int:
    """What `make run` does: the device's command on held-out images named after their labels."""
    import shlex

    from runtime.__main__ import main as fieldfit

    command = ["classify", str(recipe.build / "bundle"), str(recipe.build / "samples")]
    program = Path(sys.executable).parent / "fieldfit"
    print(f"$ {shlex.join([str(program), *command])}", file=sys.stderr)
    return fieldfit(command)


if __name__ == "__main__":
    sys.exit(main())
