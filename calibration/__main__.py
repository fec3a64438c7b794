"""``python -m calibration RECIPE``: measure INT8 ranges for the graph that export made.

It does not know how to make that graph: `python -m export RECIPE` does, and calibrates by itself.
This command is for looking at a calibration, or repeating it with other settings.
"""

import argparse
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from runtime.command import run_command
from runtime.errors import ExportError

if TYPE_CHECKING:
    import onnx
    from rich.progress import Progress

    from calibration.pipeline import Calibration
    from runtime.preprocess import UInt8
    from runtime.recipe import Recipe

T = TypeVar("T")

GALLERY_FILE = "gallery.html"
PLOT_FILE = "ranges.png"

SHOWN = 5
"""Refused images and clipped tensors that are printed; the files have all."""

SHOWN_LAYERS = 10
"""Layers that are printed of a sensitivity scan."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Choose calibration images and measure INT8 ranges, as `python -m export` "
        "does by itself;\nthis is for looking closer. Leaves in build/NAME/calibration/:\n\n"
        "  gallery.html  every image that was taken or refused, with the reason: look here first\n"
        "  ranges.png    what every tensor held, what INT8 represents of it, what is clipped\n"
        "  table.json    the same as figures; both INT8 forms are made from it\n"
        "  images.json   the choice of images",
        epilog="What to look for: every class among the images; no refused image that you would "
        "have taken;\nno tensor that clips much more on images held out than on those of the "
        "calibration: that one\nneeds more, or more varied, images ([calibration] images in the "
        "recipe).\n\n"
        "Examples:\n"
        "  python -m calibration train/recipes/solar.toml\n"
        "  python -m calibration train/recipes/solar.toml --compare --sensitivity",
    )
    parser.add_argument("recipe", type=Path, help="the TOML file that was exported")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="compare the methods that choose ranges, for both INT8 forms, on held-out images",
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="quantize one layer at a time and list those that cost most, for both INT8 forms "
        "(a minute or two)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_command("calibration", lambda: _show(arguments))


def _show(arguments: argparse.Namespace) -> int:
    done = run(arguments.recipe)
    summary = summarize(done)
    if arguments.compare:
        summary["methods"] = methods(done)
    if arguments.sensitivity:
        summary["sensitivity"] = sensitivity(done)
    if arguments.json:  # msgspec writes null where a ratio is infinite; JSON has no word for it
        print(msgspec.json.format(msgspec.json.encode(summary), indent=1).decode())
    else:
        print(describe(summary))
    return 0


@dataclasses.dataclass(frozen=True)
class Done:
    """A calibration with what it was made from."""

    recipe_path: Path
    recipe: "Recipe"
    folder: Path
    graph: "onnx.ModelProto"
    calibration: "Calibration"

    def judges(self) -> "UInt8":
        """Images ``[N, H, W, C]`` that were not chosen, or the chosen ones if all were."""
        from runtime.preprocess import preprocess_batch

        paths = [
            image.path for image in self.calibration.held_out or self.calibration.choice.chosen
        ]
        return preprocess_batch(paths, self.recipe.input)


def run(recipe_path: Path) -> Done:
    """Calibrate for a recipe and write all four files.

    Raises FieldfitError.
    """
    from calibration.gallery import write_gallery
    from calibration.pipeline import calibrate
    from calibration.plots import write_ranges
    from runtime.dataset import read_dataset
    from runtime.recipe import load_recipe

    recipe = load_recipe(recipe_path)
    dataset = read_dataset(recipe.build / "train" / "images.json")
    folder = recipe.build / "calibration"
    graph = _load_graph(folder / "fp32.onnx", recipe_path)
    calibration = calibrate(
        graph,
        dataset.select(dataset.field, "train"),
        dataset.classes,
        recipe.input,
        recipe.calibration,
        seed=recipe.seed,
        folder=folder,
        target=dataset.select(dataset.field, "validation"),
        track=lambda items: _track(items, "images"),
    )
    write_gallery(
        folder / GALLERY_FILE,
        calibration.choice,
        recipe.input,
        title=f"Calibration images of {recipe.name}",
        classes=dataset.classes,
        track=lambda items: _track(items, "gallery"),
    )
    outside = {name: t.held_out_outside for name, t in calibration.table.tensors.items()}
    write_ranges(folder / PLOT_FILE, calibration.table, outside)
    return Done(recipe_path, recipe, folder, graph, calibration)


def _load_graph(path: Path, recipe_path: Path) -> "onnx.ModelProto":
    import onnx
    from google.protobuf.message import (  # type: ignore[import-untyped,unused-ignore]
        DecodeError,
    )

    try:
        return onnx.load(path)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: no such graph; run `python -m export {recipe_path}`") from error
    except (OSError, DecodeError) as error:
        raise ExportError(
            f"{path}: not an ONNX model; delete it and run `python -m export {recipe_path}`"
        ) from error


def methods(done: Done) -> list[dict[str, Any]]:
    """What each method's ranges are worth to both forms, the table's own last."""
    from calibration.pipeline import compare_methods

    recipe = done.recipe
    scores = compare_methods(
        done.graph, done.calibration, recipe.input, recipe.calibration,
        track=lambda items: _track(items, "comparing methods"),
    )  # fmt: skip
    return [
        {
            "method": score.method,
            "int8": msgspec.to_builtins(score.tensorrt),
            "int8-cpu": msgspec.to_builtins(score.onnxruntime),
        }
        for score in scores
    ]


def sensitivity(done: Done) -> dict[str, list[dict[str, Any]]]:
    """What each layer costs alone in INT8, worst first, for both forms."""
    from calibration import onnxruntime_dialect, tensorrt_dialect
    from calibration.sensitivity import SCAN_IMAGES, Emit, scan

    images = done.judges()[:SCAN_IMAGES]
    found: dict[str, list[dict[str, Any]]] = {}
    # The classifier is tried like any other layer, as export does.
    with_classifier = functools.partial(onnxruntime_dialect.emit, classifier=True)
    forms: dict[str, Emit] = {"int8": tensorrt_dialect.emit, "int8-cpu": with_classifier}
    for form, emit in forms.items():
        with _share_bar(f"layers of {form}") as progress:
            layers = scan(done.graph, done.calibration.table, emit, images, progress=progress)
        found[form] = [dataclasses.asdict(layer) for layer in layers]
    return found


def summarize(done: Done) -> dict[str, Any]:
    """What a person or a program wants to know of a calibration."""
    from calibration.pipeline import IMAGES_FILE, TABLE_FILE

    calibration = done.calibration
    table, choice = calibration.table, calibration.choice
    clipped = sorted(table.tensors.items(), key=lambda item: -item[1].clipped)
    outside = sorted(table.tensors.items(), key=lambda item: -item[1].held_out_outside)
    return {
        "folder": str(done.folder),
        "files": [IMAGES_FILE, TABLE_FILE, GALLERY_FILE, PLOT_FILE],
        "reused": calibration.reused,
        "reason": calibration.reason,
        "method": table.key.method,
        "method_reason": table.reason,
        "images": len(choice.chosen),
        "candidates": choice.candidates,
        "per_class": dict(calibration.per_class),
        "doubt": choice.doubt,
        "refused": [{"path": r.path, "reason": r.reason} for r in choice.refused],
        "tensors": len(table.tensors),
        "most_clipped": [
            {
                "tensor": name,
                "clipped": tensor.clipped,
                "observed": tensor.observed,
                "chosen": tensor.chosen,
            }
            for name, tensor in clipped[:SHOWN]
            if tensor.clipped > 0.0
        ],
        "held_out": table.held_out,
        "most_outside": [
            {"tensor": name, "outside": tensor.held_out_outside, "clipped": tensor.clipped}
            for name, tensor in outside[:SHOWN]
            if tensor.held_out_outside > 0.0
        ],
        "next": _next_step(done),
    }


def _next_step(done: Done) -> str:
    calibration, recipe = done.calibration, done.recipe_path
    wanted = done.recipe.calibration.images
    found = len(calibration.choice.chosen)
    missing = [name for name, count in calibration.per_class.items() if not count]
    if missing and len(missing) < len(calibration.per_class):
        return f"add images of {', '.join(missing)} to the training split, then train again"
    if found < wanted:
        return f"add images to the training split: {found} of the {wanted} wanted are usable"
    return f"look at {done.folder / GALLERY_FILE}, then run `python -m export {recipe}`"


def describe(summary: dict[str, Any]) -> str:
    """``summary`` for people."""
    classes = ", ".join(f"{name} {count}" for name, count in summary["per_class"].items())
    refused = summary["refused"]
    lines = [f"{summary['images']} of {summary['candidates']} images: {classes}"]
    lines += [f"  {summary['doubt']}"] if summary["doubt"] else []
    lines.append(f"{len(refused)} refused")
    lines += [f"  {r['path']}: {r['reason']}" for r in refused[:SHOWN]]
    if len(refused) > SHOWN:
        lines.append(f"  and {len(refused) - SHOWN} more, see {GALLERY_FILE}")
    lines.append(
        f"{summary['tensors']} tensors, method {summary['method']}, "
        + ("table used again: " if summary["reused"] else "table measured: ")
        + summary["reason"]
    )
    lines += [f"  {summary['method_reason']}"] if summary["method_reason"] else []
    lines += _clipped_lines(summary["most_clipped"])
    lines += _outside_lines(summary["held_out"], summary["most_outside"])
    lines += _method_lines(summary.get("methods", []))
    for form, layers in summary.get("sensitivity", {}).items():
        lines += _sensitivity_lines(form, layers)
    lines.append(f"written to {summary['folder']}: {', '.join(summary['files'])}")
    return "\n".join([*lines, f"next: {summary['next']}"])


def _clipped_lines(most_clipped: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["most clipped:"] if most_clipped else ["nothing is clipped on calibration images"]
    for item in most_clipped:
        low, high = item["chosen"]
        lines.append(
            f"  {item['clipped']:8.4%}  {item['tensor']}  {low:.4g} to {high:.4g}"
            f"  (seen {item['observed'][0]:.4g} to {item['observed'][1]:.4g})"
        )
    return lines


def _outside_lines(held_out: int, most_outside: Sequence[dict[str, Any]]) -> list[str]:
    if not held_out:
        return ["coverage: not measured, every training image was calibrated on"]
    if not most_outside:
        return [f"coverage: nothing is outside on {held_out} held-out training images"]
    return [
        f"most outside on {held_out} held-out training images (and on those of the calibration):",
        *(
            f"  {item['outside']:8.4%}  ({item['clipped']:.4%})  {item['tensor']}"
            for item in most_outside
        ),
    ]


def _method_lines(scores: Sequence[dict[str, Any]]) -> list[str]:
    if not scores:
        return []
    lines = ["methods, by the logits on held-out images: SQNR and agreement with the float graph"]
    lines.append(f"  {'int8':>17}  {'int8-cpu':>17}")
    for score in scores:
        forms = (score[form] for form in ("int8", "int8-cpu"))
        cells = (f"{f['sqnr_db']:6.1f} dB {f['agreement']:7.1%}" for f in forms)
        lines.append(f"  {'  '.join(cells)}  {score['method']}")
    return lines


def _sensitivity_lines(form: str, layers: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"{form}: layers by their share of the error, each alone in INT8"]
    lines.append(f"  {'error':>6}  {'SQNR':>8}  {'flips':>9}  {'compute':>7}  layer")
    lines += [
        f"  {layer['error_share']:6.1%}  {layer['sqnr_db']:5.1f} dB  {layer['flips']:3} of "
        f"{layer['images']:2}  {layer['compute_share']:7.1%}  {layer['name']}"
        for layer in layers[:SHOWN_LAYERS]
    ]
    rest = sum(layer["error_share"] for layer in layers[SHOWN_LAYERS:])
    if len(layers) > SHOWN_LAYERS:
        lines.append(f"  {rest:6.1%}  the other {len(layers) - SHOWN_LAYERS}")
    return lines


@contextmanager
def _bar() -> "Iterator[Progress]":
    """A progress display on stderr of which nothing stays; a log file gets none."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield bar


@contextmanager
def _share_bar(label: str) -> Iterator[Callable[[float], None]]:
    """A bar for work that reports its share done in [0, 1]."""
    with _bar() as bar:
        task = bar.add_task(label, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _track(items: Iterable[T], label: str) -> Iterator[T]:
    """Yield ``items`` under a progress bar."""
    with _bar() as bar:
        yield from bar.track(
            items, total=len(items) if isinstance(items, Sized) else None, description=label
        )


if __name__ == "__main__":
    sys.exit(main())
