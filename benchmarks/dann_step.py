"""What one step of domain-adversarial training costs, beside tutorials and pytorch-adapt.

The same network, discriminator and images in all forms, in CPU time of one thread; twice, with all
layers trained and with the first two blocks frozen. It says nothing about what adaptation gains.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from benchmarks.harness import Options, Report, Spread, Table, Times, at_most, interleave, ratio
from benchmarks.harness import spread as spread_of
from benchmarks.training import BATCH, QUICK_IMAGES, SIZE, make_material, make_recipe, make_stepper

if TYPE_CHECKING:
    from torch import Tensor

    from train.material import Material

IMAGES = 400
SECONDS, LEAST = 150.0, 12

TRAINED = {
    "all layers": (),
    "first two blocks frozen": ("conv_stem", "bn1", "blocks.0", "blocks.1"),
}
OURS = "ours"
TWO, THREE = "reversal, one pass of each domain", "reversal, source again for the domain loss"
TUTORIAL = "discriminator's step, then the network's"
LIBRARY = "pytorch-adapt, DANNHook"
FORWARD = {OURS: (1, 1.0), TWO: (2, 1.0), THREE: (3, 1.5), TUTORIAL: (4, 2.0), LIBRARY: (2, 1.0)}
"""Passes forward, and how often they see the images; each is followed back as well."""

BAR = 0.6
NEEDS = "pytorch_adapt", "pytorch_metric_learning", "torchmetrics"
INSTALL = (
    "pip install --no-deps pytorch-adapt pytorch-metric-learning torchmetrics lightning-utilities"
)


class Form(NamedTuple):
    """One way to make a step."""

    way: str
    """Of FORWARD."""
    trained: str
    """Of TRAINED."""


def measure(options: Options) -> Report:
    """Let all forms take turns.

    Raises DataError if the embedded images or weights are not installed.
    """
    import torch

    from train.device import Device

    device = Device("cpu", torch.float32, "compared in CPU time")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one that waits for a busy core counts as CPU time
    try:
        turns: dict[Form, Callable[[], object]] = {}
        for trained, freeze in TRAINED.items():
            recipe = make_recipe(QUICK_IMAGES if options.quick else IMAGES)
            train = msgspec.structs.replace(recipe.train, freeze=freeze)
            material = make_material(msgspec.structs.replace(recipe, train=train), device)
            turns[Form(OURS, trained)] = make_stepper(material, kept=bool(freeze), method="dann")
            for way in FORWARD:
                if way != OURS and (way != LIBRARY or library_installed()):
                    turns[Form(way, trained)] = tutorial(way, material)
        times = interleave(
            {"|".join(form): turn for form, turn in turns.items()},
            seconds=0.0 if options.quick else SECONDS, least=2 if options.quick else LEAST,
            warmup=1,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return report(dict(zip(turns, times.values(), strict=True)))


def library_installed() -> bool:
    """Whether pytorch-adapt can be compared with."""
    return all(importlib.util.find_spec(name) for name in NEEDS)


def tutorial(way: str, material: "Material") -> Callable[[], object]:
    """One call is one step of ``way``: a DataLoader for each domain, two AdamW, no augmentation.

    BatchNorm is in eval mode as in ours; tutorials often leave it in train mode.
    """
    import torch
    from torch.nn import functional as F

    from train.adversarial import DomainAdversarial, reverse
    from train.model import build_model
    from train.optimize import choose_trained

    recipe, settings = material.recipe, material.recipe.train.adversarial
    model = build_model(recipe.model, recipe.input, material.classes)
    choose_trained(model, recipe.train.freeze, ())
    discriminator = DomainAdversarial(
        model, max_weight=1.0, hidden=settings.hidden, dropout=settings.dropout
    ).discriminator
    trained = [p for p in model.parameters() if p.requires_grad]
    of_model = torch.optim.AdamW(trained, lr=1e-5)
    of_discriminator = torch.optim.AdamW(discriminator.parameters(), lr=1e-5)
    sources, targets = (_batches(material, domain) for domain in ("source", "target"))
    ours, theirs = torch.zeros(BATCH // 2), torch.ones(BATCH // 2)

    def domain(features: "Tensor", truth: "Tensor") -> "Tensor":
        told = discriminator(features, drop=True)
        return F.binary_cross_entropy_with_logits(told, truth)

    def learn(loss: "Tensor", *optimizers: torch.optim.Optimizer) -> None:
        of_model.zero_grad()
        of_discriminator.zero_grad()
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def two() -> None:
        (source, labels), (target, _) = sources(), targets()
        logits, features = model(source)
        loss = F.cross_entropy(logits, labels) + domain(reverse(features, 1.0), ours)
        _, features = model(target)
        learn(loss + domain(reverse(features, 1.0), theirs), of_model, of_discriminator)

    def three() -> None:
        (source, labels), (target, _) = sources(), targets()
        logits, _ = model(source)
        loss = F.cross_entropy(logits, labels)
        for images, truth in ((source, ours), (target, theirs)):
            _, features = model(images)
            loss = loss + domain(reverse(features, 1.0), truth)
        learn(loss, of_model, of_discriminator)

    def alternating() -> None:
        (source, labels), (target, _) = sources(), targets()
        # Without detach the discriminator's loss goes back through both passes.
        _, features = model(source)
        loss = domain(features, ours)
        _, features = model(target)
        learn(loss + domain(features, theirs), of_discriminator)
        # The network's step: both domains again, the task, and the other answer for the target.
        logits, _ = model(source)
        _, features = model(target)
        learn(F.cross_entropy(logits, labels) + domain(features, ours), of_model)

    def library() -> None:
        (source, labels), (target, _) = sources(), targets()
        hook({
            "G": extract, "C": model.head, "D": functools.partial(discriminator, drop=True),
            "src_imgs": source, "src_labels": labels, "src_domain": ours,
            "target_imgs": target, "target_domain": theirs,
        })  # fmt: skip

    if way == LIBRARY:
        from pytorch_adapt.hooks import DANNHook  # type: ignore[import-not-found]

        hook: Any = DANNHook(opts=[of_model, of_discriminator])
        extract = model.extract
    return {TWO: two, THREE: three, TUTORIAL: alternating, LIBRARY: library}[way]


def _batches(material: "Material", domain: str) -> "Callable[[], tuple[Tensor, Tensor]]":
    """Endless batches of ``BATCH // 2`` images of ``domain`` out of a shuffling DataLoader."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    rows = np.sort(material.rows(domain, "train"))
    images = TensorDataset(
        torch.from_numpy(np.array(material.pixels[rows])), torch.from_numpy(material.labels[rows])
    )
    loader = DataLoader(images, batch_size=BATCH // 2, shuffle=True, drop_last=True)

    def endless() -> Any:
        while True:
            yield from loader

    batches = endless()
    return lambda: next(batches)


def report(times: dict[Form, Times]) -> Report:
    """A row for each form; the bars hold like against like."""

    def share(ours: str, form: Form) -> Spread:
        return ratio(times[Form(OURS, ours)].cpu, times[form].cpu)

    every, frozen = TRAINED
    ways = [way for way in FORWARD if Form(way, every) in times]
    forms = [Form(way, trained) for trained in TRAINED for way in ways]
    notes = [
        f"EfficientNet-Lite0, {BATCH // 2} + {BATCH // 2} images of {SIZE[0]} x {SIZE[1]}, one "
        "thread, BatchNorm in eval mode, AdamW. Ours reads, augments and clips besides, and keeps "
        "what frozen blocks make of the images. Like is compared with like where both train the "
        "same layers; the other column says what is gained or lost by freezing.",
        f"*{TUTORIAL}*: two passes forward for the discriminator, without detach, so that its "
        f"loss goes back through the backbone for nothing, and two more for the network. *{TWO}* "
        "goes forward and back through as many images as ours; there is little to be saved.",
        "TLlib makes one pass of both domains as ours does. It was not measured: pip finds no "
        "distribution named tllib.",
    ]
    if LIBRARY not in ways:
        notes.append(f"pytorch-adapt was not measured: {INSTALL}.")
    table = Table(
        title="One step of DANN",
        columns=(
            "form", "trained", "passes forward", "images", "CPU seconds",
            f"ours, {every} / this", f"ours, {frozen} / this",
        ),
        rows=tuple(
            (
                form.way, form.trained, str(FORWARD[form.way][0]),
                f"{FORWARD[form.way][1] * BATCH:.0f}", str(spread_of(times[form].cpu)),
                str(share(every, form)), str(share(frozen, form)),
            )
            for form in forms
        ),
        notes=tuple(notes),
    )  # fmt: skip
    bars = [
        at_most(f"ours / {way}, {trained}", share(trained, Form(way, trained)), BAR)
        for way in (TUTORIAL, THREE, TWO)
        for trained in TRAINED
    ]
    figures: dict[str, object] = {"times": {"|".join(f): t for f, t in times.items()}}
    return Report(title="DANN's step", tables=(table,), figures=figures, bars=tuple(bars))
