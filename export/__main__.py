"""``python -m export RECIPE``: prove a trained model in every precision and write its bundle.

Leaves ``build/NAME/bundle/``, ``NAME-VERSION.zip``, ``release.json`` and ``samples/``.
"""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command import run_command

if TYPE_CHECKING:
    from runtime.recipe import Recipe


def main(argv: list[str] | None = None) -> int:
    """Export by the recipe and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a trained model to ONNX, FP16 and INT8, judge each form on held-out "
        "field images against the checkpoint, build TensorRT engines to prove that they build, "
        "and write what passed as a bundle.",
        epilog="Example: python -m export train/recipes/solar.toml",
    )
    parser.add_argument("recipe", type=Path, help="the TOML file that was trained")
    parser.add_argument("--json", action="store_true", help="print release.json at the end")
    parser.add_argument(
        "--run", action="store_true", help="only classify the samples of the last export"
    )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="export: %(message)s")
    return run_command(
        "export",
        lambda: _run(options),
        interrupted="interrupted; an earlier bundle is as it was, run it again",
    )


def _run(options: argparse.Namespace) -> int:
    from runtime.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    if options.run:
        return _classify_samples(recipe)
    import msgspec

    from export.pipeline import export
    from export.table import show
    from train import console

    # Warnings of other packages' internals are nothing that a user of ours can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|timm|onnxscript)\.")
    release = export(recipe)
    show(release)
    if options.json:
        print(json.dumps(msgspec.to_builtins(release)))
    bundle = recipe.build / "bundle"
    console.say(f"wrote {bundle} and {recipe.build / f'{release.name}-{release.version}.zip'}")
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
