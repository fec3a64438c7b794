"""What training costs: rung 1 whole, and images a second of each strategy beside a plain loop.

On a GPU the same command measures there, in mixed precision, and how long the GPU waits for
images. It says nothing about accuracy.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from benchmarks.harness import (
    Bar,
    Options,
    Report,
    Spread,
    Table,
    Times,
    at_least,
    at_most,
    interleave,
    ratio,
    spread,
)
from runtime.recipe import Adversarial, Recipe, load_recipe

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from train.device import Device
    from train.material import Material
    from train.model import ImageClassifier
    from train.objective import Objective

RECIPE = Path(__file__).parent.parent / "train" / "recipes" / "solar.toml"
SIZE = (96, 96)
IMAGES, QUICK_IMAGES = 1000, 120
BATCH = 48
RUNG_ONE_BAR = 10.0
"""CPU seconds for 1,000 images on one thread."""

PLAIN, COMPUTED, KEPT = "plain PyTorch loop", "fine-tuning", "fine-tuning, frozen stages kept"
TRAIN_MODE = "plain PyTorch loop in train mode"
STRATEGIES: dict[str, Adversarial] = {"DANN": "dann", "CDAN": "cdan", "MCC": "mcc"}
READY = "fine-tuning, batches ready on the device"
SPEED_BAR, READY_BAR = 1.0, 0.9

PLAIN_HEAD = "plain PyTorch loop, every epoch"
FIRST, FURTHER = "feature extraction, first epoch", "feature extraction, each further epoch"
EPOCHS, L2 = 10, 1e-4
"""Of the head's fit; with so weak a penalty it still learns in the last of them."""


class Speeds(NamedTuple):
    """Times of candidates, and how many images one call of each goes through."""

    times: dict[str, Times]
    images: dict[str, int]

    def rate(self, name: str) -> str:
        """Images a second."""
        return str(spread(self.images[name] / wall for wall in self.times[name].wall))

    def against(self, name: str, other: str) -> Spread:
        """Images a second of ``name`` as a multiple of those of ``other``."""
        scale = self.images[name] / self.images[other]
        times = self.times
        return spread(
            (scale * b / a for a, b in zip(times[name].wall, times[other].wall, strict=True))
        )


def measure(options: Options) -> Report:
    """Time epochs and steps on the device that training would take, and rung 1 on one thread.

    Raises DataError if the embedded images or weights are not installed.
    """
    import torch

    from train.device import Device, choose_device

    device = choose_device()
    recipe = make_recipe(QUICK_IMAGES if options.quick else IMAGES)
    material = make_material(recipe, device)
    features = _time_features(material, 0.0 if options.quick else 20.0)
    steps = _time_steps(material, 0.0 if options.quick else 100.0)
    torch.set_num_threads(1)
    alone = Device("cpu", torch.float32, "one thread")
    cpu, wall, images = _rung_one(make_material(recipe, alone))
    return report(images, cpu, wall, features, steps, device.reason)


def make_recipe(images: int) -> Recipe:
    """``solar`` at 96 px with about ``images`` training images, half of each domain."""
    recipe = load_recipe(RECIPE)
    limit = round(images / 2 / recipe.data.splits.train)
    return msgspec.structs.replace(
        recipe,
        data=msgspec.structs.replace(recipe.data, labels=None, limit=limit),
        input=msgspec.structs.replace(recipe.input, size=SIZE),
        train=msgspec.structs.replace(
            recipe.train, freeze=("conv_stem", "bn1", "blocks.0", "blocks.1")
        ),
    )


def make_material(recipe: Recipe, device: "Device") -> "Material":
    from train.data import prepare
    from train.material import CACHE, Material

    return Material(recipe, prepare(recipe, cache=CACHE), device, Path("build"), "benchmark")


def _rung_one(material: "Material") -> tuple[float, float, int]:
    """CPU and wall seconds of rung 1: features, strength of the pull, head; and how many images."""
    from train.features import compute_features
    from train.head import Head
    from train.model import build_model
    from train.rungs import Source, feature_extraction

    rows = np.concatenate([material.rows(domain, "train") for domain in ("source", "target")])
    model = build_model(material.recipe.model, material.recipe.input, material.classes)
    width = model.head.in_features
    weight = np.random.default_rng(0).normal(0, 0.01, (material.classes, width))
    head = Head(weight.astype(np.float32), np.zeros(material.classes, np.float32))
    compute_features(model, material.pixels, material.device, rows=rows[:64])  # warm-up
    cpu, wall = time.process_time(), time.perf_counter()
    features = np.zeros((len(material.labels), width), dtype=np.float16)
    features[rows] = compute_features(model, material.pixels, material.device, rows=rows)
    feature_extraction(material, Source(model, features, head))
    return time.process_time() - cpu, time.perf_counter() - wall, len(rows)


def _time_features(material: "Material", seconds: float) -> Speeds:
    """Epochs of a head on a frozen backbone: run again in each, or once and its features kept."""
    import torch

    from train.features import compute_features
    from train.head import fit_head
    from train.model import build_model

    recipe, device = material.recipe, material.device
    model = build_model(recipe.model, recipe.input, material.classes)
    rows = np.concatenate([material.rows(domain, "train") for domain in ("source", "target")])
    features = compute_features(model, material.pixels, device, rows=rows)
    labels, weights = material.labels[rows], np.ones(len(rows), np.float32)
    batches = itertools.cycle(np.split(rows, range(BATCH, len(rows), BATCH))[:-1])
    passes: list[int] = []

    def fit() -> None:
        def report(epoch: int, loss: float) -> None:
            passes[:] = [epoch]

        fit_head(
            features, labels, weights,
            classes=material.classes, l2=L2, epochs=EPOCHS, report=report,
        )  # fmt: skip

    plain = build_model(recipe.model, recipe.input, material.classes).to(device.torch)
    plain.backbone.requires_grad_(False)
    optimizer = torch.optim.AdamW(plain.head.parameters(), lr=1e-3)
    times = interleave(
        {
            PLAIN_HEAD: _plain_loop(material, plain, optimizer),
            FIRST: lambda: compute_features(model, material.pixels, device, rows=next(batches)),
            FURTHER: fit,
        },
        seconds=seconds, least=2, warmup=1,
    )  # fmt: skip
    return Speeds(times, {PLAIN_HEAD: BATCH, FIRST: BATCH, FURTHER: passes[0] * len(rows)})


def _time_steps(material: "Material", seconds: float) -> Speeds:
    """Steps of ``BATCH`` images, taking turns; every candidate has a network of its own."""
    import torch

    from train.model import build_model
    from train.optimize import choose_trained

    recipe, device = material.recipe, material.device

    def plain(*, train: bool) -> Callable[[], object]:
        model = build_model(recipe.model, recipe.input, material.classes).to(device.torch)
        choose_trained(model, recipe.train.freeze, ())
        trained = [p for p in model.parameters() if p.requires_grad]
        return _plain_loop(material, model.train(train), torch.optim.AdamW(trained, lr=1e-4))

    candidates = {
        PLAIN: plain(train=False),
        TRAIN_MODE: plain(train=True),
        COMPUTED: make_stepper(material, kept=False),
        KEPT: make_stepper(material, kept=True),
    }
    for name, method in STRATEGIES.items():
        candidates[name] = make_stepper(material, kept=False, method=method)
    if device.kind == "cuda":
        candidates[READY] = make_stepper(material, kept=False, ready=True)
    times = interleave(candidates, seconds=seconds, least=2, warmup=1)
    return Speeds(times, dict.fromkeys(times, BATCH))


def make_stepper(
    material: "Material", *, kept: bool, method: Adversarial | None = None, ready: bool = False
) -> Callable[[], float]:
    """One call is one step of ours, reading, augmenting, training; it returns the loss."""
    import torch

    from train.adversarial import make_objective
    from train.batches import Group, Pictures, Steps, to_batch
    from train.features import to_device
    from train.material import CACHE
    from train.model import build_model
    from train.objective import SOURCE, TARGET, TaskLoss
    from train.optimize import Optimization, choose_trained
    from train.stages import SAMPLES, plan_stages

    recipe, settings, device = material.recipe, material.recipe.train, material.device
    model = build_model(recipe.model, recipe.input, material.classes)
    choose_trained(model, settings.freeze, ())
    objective: Objective = TaskLoss(model)
    if method:
        adversarial = msgspec.structs.replace(settings.adversarial, method=method)
        objective = make_objective(model, adversarial)
    objective.to(device.torch, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    groups = [
        Group(
            name=domain, domain=number, rows=rows, labels=material.labels[rows],
            weights=np.ones(len(rows), np.float32), teacher=None, share=BATCH // 2,
        )
        for domain, number in (("source", SOURCE), ("target", TARGET))
        for rows in [material.rows(domain, "train")]
    ]  # fmt: skip
    stages = None
    if kept:
        plan = plan_stages(
            model, material.pixels, np.concatenate([g.rows for g in groups]), train=settings,
            draws=10**9, images_sha256=material.images_sha256, cache=CACHE, device=device,
        )  # fmt: skip
        stages = plan.stages
        assert stages is not None, plan.reason
    steps = Steps(
        groups, stages or Pictures(material.pixels), augment=settings.augment, degrade=0.0,
        square=True, classes=material.classes, seed=0,
    )  # fmt: skip
    optimization = Optimization(
        objective, settings.fine_tuning, 1e-3, device, stages.cut if stages else None
    )
    optimization.fold(to_device(material.pixels[groups[0].rows[:SAMPLES]], device))
    numbers = itertools.count()
    waiting = to_batch(steps[0], steps, device)

    def step() -> float:
        batch = waiting if ready else to_batch(steps[next(numbers)], steps, device)
        loss, _ = optimization.step(batch, 0.5, 0.1)
        return float(loss)

    return step


def _plain_loop(
    material: "Material", model: "ImageClassifier", optimizer: "Optimizer"
) -> Callable[[], object]:
    """The usual loop of a tutorial: float images, NCHW, no augmentation, no clipping."""
    import torch
    from torch.nn import functional as F

    device = material.device.torch
    rows = np.concatenate([material.rows(d, "train") for d in ("source", "target")])
    random = np.random.default_rng(0)

    def step() -> object:
        chosen = np.sort(random.choice(rows, BATCH, replace=False))
        images = torch.from_numpy(np.array(material.pixels[chosen])).to(device)
        labels = torch.from_numpy(material.labels[chosen]).to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images)[0], labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


def report(
    images: int, cpu: float, wall: float, features: Speeds, steps: Speeds, device: str
) -> Report:
    """Tables of epochs, steps and rung 1, and the bars they are held to."""
    shape = f"{SIZE[0]} x {SIZE[1]}"
    epochs = Table(
        title="A head on a frozen backbone",
        columns=("epoch", "images a second", "against the plain loop"),
        rows=tuple(
            (name, features.rate(name), str(features.against(name, PLAIN_HEAD)))
            for name in features.times
        ),
        notes=(
            f"Images of {shape}. The plain loop runs the backbone in every epoch; ours once, and "
            "every further epoch is one pass over its features.",
        ),
    )
    notes = [
        f"Steps of {BATCH} images of {shape} taking turns, the first two blocks frozen, BatchNorm "
        "as in use except in train mode, AdamW. Ours flip and turn images and clip gradients "
        f"besides, the plain loop does not. DANN, CDAN and MCC: half the images of each domain. "
        f"{device}."
    ]
    bars = [at_most(f"rung 1 on {images:,} images, CPU seconds", cpu, RUNG_ONE_BAR)]
    if READY in steps.times:
        waits = spread(
            1 - ready / real
            for ready, real in zip(steps.times[READY].wall, steps.times[COMPUTED].wall, strict=True)
        )
        notes.append(f"Share of a step in which the GPU waits for images: {waits}.")
        bars.append(_bar(steps, READY, READY_BAR))
    else:
        bars.append(_bar(steps, PLAIN, SPEED_BAR))
    table = Table(
        title="Training steps",
        columns=("step", "images a second", "against the plain loop", "CPU time, plain loop 1"),
        rows=tuple(
            (
                name, steps.rate(name), str(steps.against(name, PLAIN)),
                str(ratio(times.cpu, steps.times[PLAIN].cpu)),
            )
            for name, times in steps.times.items()
        ),
        notes=tuple(notes),
    )  # fmt: skip
    rung_one = Table(
        title=f"Rung 1 on {images:,} images of {shape}, one thread",
        columns=("what", "CPU seconds", "wall seconds"),
        rows=(("features, five-fold choice of five strengths, head", f"{cpu:.1f}", f"{wall:.1f}"),),
    )
    figures: dict[str, object] = {
        "rung 1": {"images": images, "cpu": cpu, "wall": wall},
        "epochs": features._asdict(),
        "steps": steps._asdict(),
        "device": device,
    }
    return Report(
        title="Training", tables=(table, epochs, rung_one), figures=figures, bars=tuple(bars)
    )


def _bar(steps: Speeds, other: str, bar: float) -> Bar:
    what = f"fine-tuning, images a second as a multiple of: {other}"
    return at_least(what, steps.against(COMPUTED, other), bar)
