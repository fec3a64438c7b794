"""``python -m export RECIPE``: prove a trained model in every precision and write its bundle.

Leaves ``build/NAME/bundle/``, ``NAME-VERSION.zip``, ``release.json`` and ``samples/``.
"""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path

from runtime.command import run_command


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
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="export: %(message)s")
    return run_command(
        "export",
        lambda: _run(options),
        interrupted="interrupted; nothing was released, run it again",
    )


def _run(options: argparse.Namespace) -> int:
    from runtime.recipe import load_recipe

    recipe = load_recipe(options.recipe)
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
    console.say(f"next: fieldfit classify {bundle} {recipe.build / 'samples'}   (or: make run)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
