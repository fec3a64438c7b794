"""``python -m calibration RECIPE``: measure INT8 ranges for the graph that export made.

It does not know how to make that graph: `python -m export RECIPE` does, and calibrates by itself.
This command is for looking at a calibration, or repeating it with other settings.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.command import run_command
from runtime.errors import ExportError

if TYPE_CHECKING:
    from calibration.pipeline import Calibration

MOST_CLIPPED = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration",
        description="Choose calibration images and measure INT8 ranges; writes images.json and "
        "table.json to build/NAME/calibration/.",
        epilog="Example: python -m calibration train/recipes/solar.toml",
    )
    parser.add_argument("recipe", type=Path, help="the TOML file that was exported")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_command("calibration", lambda: _show(arguments))


def _show(arguments: argparse.Namespace) -> int:
    folder, calibration = run(arguments.recipe)
    summary = summarize(folder, calibration)
    print(json.dumps(summary, indent=1) if arguments.json else describe(summary))
    return 0


def run(recipe_path: Path) -> "tuple[Path, Calibration]":
    """Calibrate for a recipe; return the folder written to, and the result.

    Raises FieldfitError.
    """
    import onnx
    from google.protobuf.message import (  # type: ignore[import-untyped,unused-ignore]
        DecodeError,
    )

    from calibration.pipeline import calibrate
    from runtime.dataset import read_dataset
    from runtime.recipe import load_recipe

    recipe = load_recipe(recipe_path)
    dataset = read_dataset(recipe.build / "train" / "images.json")
    folder = recipe.build / "calibration"
    path = folder / "fp32.onnx"
    try:
        graph = onnx.load(path)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: no such graph; run `python -m export {recipe_path}`") from error
    except (OSError, DecodeError) as error:
        raise ExportError(
            f"{path}: not an ONNX model; delete it and run `python -m export {recipe_path}`"
        ) from error
    calibration = calibrate(
        graph,
        dataset.select(dataset.field, "train"),
        dataset.classes,
        recipe.input,
        recipe.calibration,
        seed=recipe.seed,
        folder=folder,
    )
    return folder, calibration


def summarize(folder: Path, calibration: "Calibration") -> dict[str, Any]:
    """What a person or a program wants to know of a calibration."""
    table, choice = calibration.table, calibration.choice
    clipped = sorted(table.tensors.items(), key=lambda item: -item[1].clipped)
    return {
        "folder": str(folder),
        "reused": calibration.reused,
        "reason": calibration.reason,
        "method": table.key.method,
        "images": len(choice.chosen),
        "candidates": choice.candidates,
        "per_class": calibration.per_class,
        "refused": [{"path": r.path, "reason": r.reason} for r in choice.refused],
        "tensors": len(table.tensors),
        "most_clipped": [
            {
                "tensor": name,
                "clipped": tensor.clipped,
                "observed": tensor.observed,
                "chosen": tensor.chosen,
            }
            for name, tensor in clipped[:MOST_CLIPPED]
            if tensor.clipped > 0.0
        ],
    }


def describe(summary: dict[str, Any]) -> str:
    """``summary`` for people."""
    classes = ", ".join(f"{name} {count}" for name, count in summary["per_class"].items())
    lines = [
        f"{summary['images']} of {summary['candidates']} images: {classes}",
        f"{len(summary['refused'])} refused"
        + "".join(f"\n  {r['path']}: {r['reason']}" for r in summary["refused"][:MOST_CLIPPED]),
        f"{summary['tensors']} tensors, method {summary['method']}, "
        + ("table used again: " if summary["reused"] else "table measured: ")
        + summary["reason"],
    ]
    if summary["most_clipped"]:
        lines.append("most clipped:")
    for item in summary["most_clipped"]:
        low, high = item["chosen"]
        lines.append(
            f"  {item['clipped']:8.4%}  {item['tensor']}  {low:.4g} to {high:.4g}"
            f"  (seen {item['observed'][0]:.4g} to {item['observed'][1]:.4g})"
        )
    return "\n".join([*lines, f"written to {summary['folder']}"])


if __name__ == "__main__":
    sys.exit(main())
