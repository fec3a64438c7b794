"""``python -m train RECIPE``: adapt a model to field images.

Leaves ``build/NAME/train/``: checkpoint.safetensors, training.json, images.json, similarity.md,
pictures and a TensorBoard log. Ctrl-C saves the state; the same command goes on from it.
``python -m train degradations IMAGE`` draws every field degradation of an image.
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

DEGRADATIONS = "degradations"

INTERRUPTED = "interrupted; the same command goes on from here"


def main(argv: list[str] | None = None) -> int:
    """Train by the recipe, or draw degradations, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == [DEGRADATIONS]:
        return _degradations(words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Adapt a model to field images, climbing only as far as the data asks for: "
        "move the threshold, fit the head on frozen features, fine-tune at a low rate, adapt "
        "adversarially. A rung is kept if held-out field images prove it better and the source "
        "model's knowledge is still there.",
        epilog="Examples: python -m train train/recipes/solar.toml; on two GPUs: torchrun "
        "--nproc-per-node 2 -m train RECIPE; every field degradation of an image: python -m train "
        "degradations IMAGE",
    )
    parser.add_argument("recipe", type=Path, help="the TOML file with the whole configuration")
    parser.add_argument("--json", action="store_true", help="print training.json at the end")
    options = parser.parse_args(words)
    return run_command("train", lambda: _run(options), interrupted=INTERRUPTED)


def _degradations(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m train {DEGRADATIONS}",
        description="Draw one image in every field degradation at every severity.",
        epilog="Example: python -m train degradations cell0001.png --out sheet.png",
    )
    from train.contact_sheet import add_arguments, run

    add_arguments(parser)
    options = parser.parse_args(words)
    return run_command("train", lambda: run(options))


def _run(options: argparse.Namespace) -> int:
    from runtime.recipe import is_embedded, load_recipe

    recipe = load_recipe(options.recipe)  # before torch, whose import takes seconds
    import msgspec

    from train import console, distributed
    from train.domains import ELPV_LICENCE
    from train.pipeline import train

    # Warnings of other packages' internals are nothing that a user of ours can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|timm)\.")
    with distributed.session():
        if is_embedded(recipe.data.source) or is_embedded(recipe.data.target):
            console.say(ELPV_LICENCE)
        training, done = train(recipe)
        if not distributed.main():
            return 0
    _show(training)
    if not done:
        console.say("nothing to do: this recipe and these images are trained already")
    if options.json:
        print(json.dumps(msgspec.to_builtins(training)))
    folder = recipe.build / "train"
    console.say(f"{'wrote' if done else 'see'} {folder}: training.json, similarity.md, pictures")
    console.say(f"next: make export RECIPE={options.recipe}")
    return 0


def _show(training: "Training") -> None:
    from train import console

    first = training.rungs[0].scores
    domains = [
        domain
        for domain in ("target", "source")
        if f"{domain}-test" in first and first[f"{domain}-test"].labelled
    ]
    columns = ["rung"]
    for domain in domains:
        columns += [f"{domain} accuracy", "balanced", "AUC"]
    rows = []
    for rung in training.rungs:
        row = [f"{rung.name} (kept)" if rung.kept else rung.name]
        for domain in domains:
            scores = rung.scores[f"{domain}-test"]
            row += [_number(v) for v in (scores.accuracy, scores.balanced_accuracy, scores.auc)]
        rows.append([*row, f"{rung.seconds:.0f} s"])
    title = "test images (for the record, no choice sees them)"
    console.table(title, [*columns, "time"], rows)
    mark = "" if training.verified else ", UNVERIFIED"
    console.say(f"kept {training.rung}{mark}: {training.reason}")
    console.say(f"the ladder ended: {training.ended}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
