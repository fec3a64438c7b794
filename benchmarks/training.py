"""What training costs: rung 1 whole, and images a second of each rung beside a plain loop.

On a GPU the same command measures there, in mixed precision, and how long the GPU waits for
images. It says nothing about accuracy.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from benchmarks.harness import Options, Report, Table, Times, interleave, ratio, spread
from runtime.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from train.device import Device
    from train.material import Material
    from train.objective import Objective

RECIPE = Path(__file__).parent.parent / "train" / "recipes" / "solar.toml"
SIZE = (96, 96)
IMAGES, QUICK_IMAGES = 1000, 120
BATCH = 48
RUNG_ONE_BAR, RUNG_ONE_GOAL = 10.0, 4.0
"""Seconds for 1,000 images on one thread."""

PLAIN, COMPUTED, KEPT = "plain PyTorch loop", "fine-tuning", "fine-tuning, frozen stages kept"
DANN, READY = "adversarial", "fine-tuning, batches ready on the device"


def measure(options: Options) -> Report:
    """Time steps of every rung on the device that training would take, and rung 1 on one thread.

    Raises DataError if the embedded images or weights are not installed.
    """
    import torch

    from train.device import Device, choose_device

    device = choose_device()
    recipe = make_recipe(QUICK_IMAGES if options.quick else IMAGES)
    steps = _time_steps(recipe, device, 0.0 if options.quick else 60.0)
    torch.set_num_threads(1)
    alone = Device("cpu", torch.float32, "one thread")
    cpu, wall, images = _rung_one(make_material(recipe, alone))
    return _report(images, cpu, wall, steps, device.reason)


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


def _time_steps(recipe: Recipe, device: "Device", seconds: float) -> dict[str, Times]:
    """Steps of ``BATCH`` images, taking turns; every candidate has a network of its own."""
    material = make_material(recipe, device)
    candidates = {
        PLAIN: _plain_loop(material),
        COMPUTED: make_stepper(material, kept=False),
        KEPT: make_stepper(material, kept=True),
        DANN: make_stepper(material, kept=False, adversarial=True),
    }
    if device.kind == "cuda":
        candidates[READY] = make_stepper(material, kept=False, ready=True)
    return interleave(candidates, seconds=seconds, least=2, warmup=1)


def make_stepper(
    material: "Material", *, kept: bool, adversarial: bool = False, ready: bool = False
) -> Callable[[], float]:
    """One call is one step of ours, reading, augmenting, training; it returns the loss."""
    import torch

    from train.adversarial import make_objective
    from train.batches import Group, Pictures, Steps, to_batch
    from train.material import CACHE
    from train.model import build_model
    from train.objective import SOURCE, TARGET, TaskLoss
    from train.optimize import Optimization, choose_trained
    from train.stages import plan_stages

    recipe, settings, device = material.recipe, material.recipe.train, material.device
    model = build_model(recipe.model, recipe.input, material.classes)
    choose_trained(model, settings.freeze, ())
    objective: Objective = (
        make_objective(model, settings.adversarial) if adversarial else TaskLoss(model)
    )
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
    numbers = itertools.count()
    waiting = to_batch(steps[0], steps, device)

    def step() -> float:
        batch = waiting if ready else to_batch(steps[next(numbers)], steps, device)
        loss, _ = optimization.step(batch, 0.5, 0.1)
        return float(loss)

    return step


def _plain_loop(material: "Material") -> Callable[[], object]:
    """The usual loop of a tutorial on the same frozen stages: float images, NCHW, AdamW."""
    import torch
    from torch.nn import functional as F

    from train.model import build_model
    from train.optimize import choose_trained

    recipe, device = material.recipe, material.device.torch
    model = build_model(recipe.model, recipe.input, material.classes).to(device)
    choose_trained(model, recipe.train.freeze, ())
    rows = np.concatenate([material.rows(d, "train") for d in ("source", "target")])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    random = np.random.default_rng(0)

    def step() -> object:
        chosen = np.sort(random.choice(rows, BATCH, replace=False))
        images = torch.from_numpy(np.array(material.pixels[chosen])).to(device)
        labels = torch.from_numpy(material.labels[chosen]).to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images)[0], labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss)

    return step


def _report(images: int, cpu: float, wall: float, steps: dict[str, Times], device: str) -> Report:
    verdict = "goal" if cpu <= RUNG_ONE_GOAL else "met" if cpu <= RUNG_ONE_BAR else "not met"
    rung_one = Table(
        title=f"Rung 1 on {images:,} images of {SIZE[0]} x {SIZE[1]}, one thread",
        columns=("what", "CPU seconds", "wall seconds", "bar", "goal", "verdict"),
        rows=((
            "features, five-fold choice of five strengths, head", f"{cpu:.1f}", f"{wall:.1f}",
            f"{RUNG_ONE_BAR:g}", f"{RUNG_ONE_GOAL:g}", verdict,
        ),),
    )  # fmt: skip
    plain = steps[PLAIN]
    rows = []
    for name, times in steps.items():
        speed = ratio(plain.wall, times.wall)
        rate = spread([BATCH / seconds for seconds in times.wall])
        rows.append((name, str(rate), str(speed)))
    notes = [f"Steps of {BATCH} images taking turns, the first two blocks frozen. {device}."]
    if READY in steps:
        waits = spread(
            1 - ready / real
            for ready, real in zip(steps[READY].wall, steps[COMPUTED].wall, strict=True)
        )
        notes.append(f"Share of a step in which the GPU waits for images: {waits}.")
    table = Table(
        title="Training steps", columns=("step", "images a second", "against the plain loop"),
        rows=tuple(rows), notes=tuple(notes),
    )  # fmt: skip
    figures: dict[str, object] = {
        "rung 1": {"images": images, "cpu": cpu, "wall": wall},
        "steps": {name: msgspec.to_builtins(times) for name, times in steps.items()},
        "device": device,
    }
    return Report(title="Training", tables=(rung_one, table), figures=figures)
