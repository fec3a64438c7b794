"""Fitting a head on cached features, against running the frozen backbone in every epoch.

Both sides see the same images and fit the same head with the same optimizer, on the CPU; the
cached side pays for its one pass through the backbone. It says nothing about accuracy.
"""

from pathlib import Path

import numpy as np

from benchmarks.harness import Options, Report, Table, Times, at_most, interleave, ratio, spread
from runtime.errors import DataError

RECIPE = Path(__file__).parent.parent / "train" / "recipes" / "solar.toml"
IMAGES = 300
EPOCHS = 10
L2 = 1e-4
"""The weakest penalty of the recipe: the head still learns in the last of the epochs."""

BAR = 1 / 10


def measure(options: Options) -> Report:
    """Time both ways on embedded images of the solar recipe.

    Raises DataError if the embedded images or weights are not installed.
    """
    import torch

    from runtime.recipe import load_recipe
    from train.data import prepare
    from train.device import Device
    from train.features import compute_features
    from train.head import fit_head
    from train.model import build_model
    from train.pipeline import CACHE
    from train.pixels import load_pixels

    recipe = load_recipe(RECIPE)
    dataset = prepare(recipe, cache=CACHE)
    labelled = [e for e in dataset.examples if e.split == "train" and e.label]
    count = IMAGES // 5 if options.quick else IMAGES
    chosen = [labelled[i] for i in np.linspace(0, len(labelled) - 1, count).astype(int)]
    pixels = np.array(load_pixels(chosen, recipe.input, CACHE))
    labels = np.array([dataset.label_index(example) for example in chosen], dtype=np.int64)
    weights = np.ones(count, dtype=np.float32)
    model = build_model(recipe.model, recipe.input, len(dataset.classes))
    device = Device("cpu", torch.float32, "compared in CPU time")

    def backbone() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return compute_features(model, pixels, device)

    def fit(*, again: bool) -> int:
        """Fit the head; return how often the backbone saw all images."""
        features, passes, epochs = backbone(), 1, 0

        def report(epoch: int, loss: float) -> None:
            nonlocal passes, epochs
            epochs = epoch
            if again and epoch < EPOCHS:
                # A frozen backbone gives the same features again: nothing but time is lost.
                backbone()
                passes += 1

        fit_head(
            features, labels, weights,
            classes=len(dataset.classes), l2=L2, epochs=EPOCHS, report=report,
        )  # fmt: skip
        if epochs < EPOCHS:
            raise DataError(f"expected {EPOCHS} epochs, the head was done after {epochs}")
        return passes

    passes = fit(again=False), fit(again=True)  # the warm-up, too
    times = interleave(
        {"cached": lambda: fit(again=False), "again": lambda: fit(again=True)},
        seconds=0.0, least=1 if options.quick else 5, warmup=0,
    )  # fmt: skip
    return _report(count, recipe.input.shape, passes, times)


def _report(
    images: int, shape: tuple[int, int, int], passes: tuple[int, int], times: dict[str, Times]
) -> Report:
    cached, again = times["cached"], times["again"]
    share, wall = ratio(cached.cpu, again.cpu), ratio(cached.wall, again.wall)
    sides = ("features cached", cached, passes[0]), ("backbone run again", again, passes[1])
    seconds = [spread(side.cpu) for _, side, _ in sides]
    table = Table(
        title=f"{EPOCHS} epochs of the head, {images} images of {shape[0]} x {shape[1]}",
        columns=("way", "passes through the backbone", "CPU seconds"),
        rows=tuple(
            (name, str(count), str(taken))
            for (name, _, count), taken in zip(sides, seconds, strict=True)
        ),
        notes=(
            f"Cached / run again: **{share}** by CPU time, {wall} by wall time, "
            f"{len(cached.cpu)} rounds.",
        ),
    )
    figures: dict[str, object] = {
        "images": images, "epochs": EPOCHS, "rounds": len(cached.cpu), "bar": BAR,
        "share_cpu": share, "share_wall": wall, "cpu_s": dict(zip(times, seconds, strict=True)),
    }  # fmt: skip
    bars = (at_most("cached / run again, CPU time", share, BAR),)
    return Report(title="Cached features", tables=(table,), figures=figures, bars=bars)
