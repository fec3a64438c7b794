"""The source model as a checkpoint that somebody brings: read, checked, its outputs put in order.

It does not know images; what does not fit the recipe is explained before any of them is opened.
"""

from pathlib import Path
from typing import NamedTuple

import msgspec
import timm
import torch
from torch import Tensor

from runtime.errors import DataError, RecipeError
from runtime.preprocess import InputSpec
from runtime.recipe import ModelSettings, SourceSettings
from train.checkpoint import is_checkpoint, read_checkpoint
from train.model import (
    ImageClassifier,
    build_model,
    classifier_layers,
    fill_backbone,
    read_weights,
)

MUST_EQUAL = ("channels", "mean", "std")
"""Keys of ``[input]`` that a network is trained for; it adapts to another size or resize."""


class Brought(NamedTuple):
    """A source model, and what its owner should know about it."""

    model: ImageClassifier
    """In eval mode, on the CPU; the logits are in the order of ``classes``."""
    classes: tuple[str, ...]
    """Sorted; all that the checkpoint knows, though the data may name fewer."""
    note: str


def bring(
    settings: SourceSettings,
    model: ModelSettings,
    spec: InputSpec,
) -> Brought:
    """Read ``[source] checkpoint`` as a network of ``[model] architecture`` for ``[input]``.

    It is fieldfit's own, or a state dict (torch or safetensors) of a whole classifier by timm's
    names, or of an ImageClassifier; one that ends in one sigmoid output becomes two logits,
    ``[0, z]`` for the first and the second name listed.

    Raises DataError if the file is missing, damaged, would run code, has no linear classifier, is
    of another architecture or input; RecipeError if ``[source] classes`` is missing or does not
    describe it.
    """
    assert settings.checkpoint is not None
    path = Path(settings.checkpoint)
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; correct [source] checkpoint")
    if is_checkpoint(path):
        network, names, note = _own(path, settings.classes, model, spec)
    else:
        network, names, note = _of_others(path, settings.classes, model, spec)
    order = sorted(names)
    rows = [names.index(name) for name in order]
    head = network.head
    with torch.no_grad():
        head.weight.copy_(head.weight[rows])
        head.bias.copy_(head.bias[rows])
    return Brought(network.eval(), tuple(order), f"source model: {path.name}, {note}")


def _own(
    path: Path, listed: tuple[str, ...], model: ModelSettings, spec: InputSpec
) -> tuple[ImageClassifier, tuple[str, ...], str]:
    """From fieldfit's checkpoint, which knows its classes, architecture and input."""
    network, facts = read_checkpoint(path)
    architecture = facts.model.architecture
    if architecture != model.architecture:
        raise DataError(
            f"{path}: is a {architecture}, the recipe says {model.architecture}; write "
            f'[model] architecture = "{architecture}"'
        )
    if listed not in ((), facts.classes):
        raise RecipeError(
            f"[source] classes: {path} knows its own: {', '.join(facts.classes)}; leave the key out"
        )
    made_for, asked = (msgspec.structs.asdict(s) for s in (facts.input, spec))
    different = [key for key in made_for if made_for[key] != asked[key]]
    cfg = timm.get_pretrained_cfg(architecture)
    fixed = MUST_EQUAL + (("size",) if cfg is not None and cfg.fixed_input_size else ())
    if wrong := [key for key in different if key in fixed]:
        theirs = ", ".join(f"{key} = {_toml(made_for[key])}" for key in wrong)
        ours = ", ".join(f"{key} = {_toml(asked[key])}" for key in wrong)
        raise DataError(
            f"{path}: was trained with another input than the recipe's {ours}; write [input] "
            f"{theirs}"
        )
    note = f"{facts.rung} of {facts.name}, {architecture}, {len(facts.classes)} classes"
    for key in different:
        note += f"; trained with {key} = {_toml(made_for[key])}, used with {_toml(asked[key])}"
    return network, facts.classes, note


def _of_others(
    path: Path, names: tuple[str, ...], model: ModelSettings, spec: InputSpec
) -> tuple[ImageClassifier, tuple[str, ...], str]:
    """From a state dict of a whole classifier; ``names`` is the order of its outputs."""
    given = read_weights(path)
    if not names:
        raise RecipeError(
            f"[source] classes: {path} does not carry the names of its classes; list them in the "
            'order of its outputs, e.g. classes = ["defective", "functional"]'
        )
    network = build_model(msgspec.structs.replace(model, weights="random"), spec, len(names))
    left = fill_backbone(network.backbone, given, path, model.architecture)
    weight, bias = _classifier(path, left, network)
    note = f"{model.architecture}, {len(names)} classes"
    if len(names) != max(len(weight), 2):
        outputs = f"{len(weight)} outputs" if len(weight) > 1 else "one output for two classes"
        raise RecipeError(
            f"[source] classes: {path} has {outputs}, the list has {len(names)} "
            f"({', '.join(names)}); name its classes in the order of its outputs"
        )
    if len(weight) == 1:
        # softmax([0, z]) is [1 - sigmoid(z), sigmoid(z)]
        weight, bias = (torch.cat([torch.zeros_like(t), t]) for t in (weight, bias))
        note += f"; its one output is taken for the score of {names[1]!r}"
    with torch.no_grad():
        network.head.weight.copy_(weight)
        network.head.bias.copy_(bias)
    note += (
        f"; it does not say how its input was normalised: (byte - {spec.mean}) / {spec.std:g} is "
        "used, see [input]"
    )
    return network, names, note


def _classifier(
    path: Path, left: dict[str, Tensor], network: ImageClassifier
) -> tuple[Tensor, Tensor]:
    """Weight ``[K, D]`` and bias ``[K]`` of the linear layer among what the backbone left."""
    layers = dict.fromkeys([*classifier_layers(network.backbone), "head"])
    found = [layer for layer in layers if f"{layer}.weight" in left]
    if not found:
        raise DataError(
            f"{path}: has no classifier layer ({' or '.join(f'{n}.weight' for n in layers)}), only "
            "a backbone; use it as [model] weights and train the source model from it"
        )
    weight = left[f"{found[0]}.weight"]
    width = network.head.in_features
    if len(found) > 1 or weight.ndim != 2 or weight.shape[1] != width:
        shapes = ", ".join(
            f"{layer}.weight {list(left[f'{layer}.weight'].shape)}" for layer in found
        )
        raise DataError(
            f"{path}: expected one linear classifier [classes, {width}] on the backbone, got "
            f"{shapes}; use it as [model] weights and train the source model from it"
        )
    bias = left.get(f"{found[0]}.bias")
    return weight, torch.zeros(len(weight)) if bias is None else bias


def _toml(value: object) -> str:
    """``value`` as the recipe spells it."""
    return msgspec.json.encode(value).decode().replace(",", ", ")
