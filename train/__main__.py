"""``python -m train RECIPE``: adapt a model to field images.

Leaves ``build/NAME/train/``: checkpoint.safetensors, training.json, images.json and a TensorBoard
log. Ctrl-C saves the state; the same command goes on from it.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command import run_command

if TYPE_CHECKING:
    from train.record import Training


def main(argv: list[str] | None = None) -> int:
    """Train by the recipe and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Adapt a model to field images: fit a head on frozen features, then fine-tune "
        "at a low rate, keep what validates best.",
        epilog="Example: python -m train train/recipes/solar.toml",
    )
    parser.add_argument("recipe", type=Path, help="the TOML file with the whole configuration")
    parser.add_argument("--json", action="store_true", help="print training.json at the end")
    options = parser.parse_args(argv)
    return run_command(
        "train",
        lambda: _run(options),
        interrupted="interrupted; the same command goes on from here",
    )


def _run(options: argparse.Namespace) -> int:
    from runtime.recipe import is_embedded, load_recipe

    recipe = load_recipe(options.recipe)  # before torch, whose import takes seconds
    import msgspec

    from train import console
    from train.domains import ELPV_LICENCE
    from train.pipeline import train

    # Warnings of other packages' internals are nothing that a user of ours can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|timm)\.")
    if is_embedded(recipe.data.source) or is_embedded(recipe.data.target or ""):
        console.say(ELPV_LICENCE)
    training, done = train(recipe)
    _show(training)
    if not done:
        console.say("nothing to do: this recipe and these images are trained already")
    if options.json:
        print(json.dumps(msgspec.to_builtins(training)))
    done_words = "wrote" if done else "see"
    console.say(f"{done_words} {recipe.build / 'train'}; next: make export RECIPE={options.recipe}")
    return 0


def _show(training: "Training") -> None:
    from train import console

    first = training.rungs[0].scores
    domains = [
        domain
        for domain in ("target", "source")
        if f"{domain}-test" in first and first[f"{domain}-test"].labelled
    ]
    columns = ["rung", f"decided on {training.decided_on}"]
    for domain in domains:
        columns += [f"{domain} test accuracy", "AUC"]
    rows = []
    for rung in training.rungs:
        row = [f"{rung.name} (kept)" if rung.kept else rung.name, f"{rung.value:.4f}"]
        for domain in domains:
            scores = rung.scores[f"{domain}-test"]
            row += [_number(scores.accuracy), _number(scores.auc)]
        rows.append([*row, f"{rung.seconds:.0f} s"])
    title = "rungs (test figures are for the record, no choice sees them)"
    console.table(title, [*columns, "time"], rows)
    console.say(f"kept {training.rung}: {training.reason}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
