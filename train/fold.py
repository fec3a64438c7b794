"""BatchNorm whose statistics stay, folded into the convolution before it while a training steps.

With frozen statistics it multiplies each channel by one number and adds another, which the
convolution can do as well: one pass less over every map forward, and one back. Gradients reach the
same parameters, and before and after a step the network is what it was. Which modules follow each
other is found by watching images pass, and trusted only after comparing. It does not know what is
minimised.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from train.cut import TOLERANCE, Cut
from train.device import Device
from train.model import ImageClassifier


class Fold(NamedTuple):
    """Two modules of the backbone, by name."""

    convolution: str
    norm: str


def find_folds(
    model: ImageClassifier, images: Tensor, device: Device, cut: Cut | None
) -> tuple[tuple[Fold, ...], str]:
    """Every BatchNorm that takes what a convolution hands out, and why these or none.

    ``images`` are uint8 ``[N, H, W, C]``; the model is on the device, in eval mode. What steps
    leave out before ``cut`` is left alone.
    """
    if device.precision != torch.float32:
        return (), "BatchNorm is not folded: mixed precision would round what it adds"
    left_out = tuple(f"{name}." for name in cut.skipped) if cut else ()
    folds = tuple(
        fold
        for fold in _candidates(model, images)
        if not any(f"{name}.".startswith(left_out) for name in fold)
    )
    if not folds:
        return (), "BatchNorm is not folded: none follows a convolution"
    with torch.inference_mode():
        whole = model.extract(images)
        with folded(model, folds):
            error = float((model.extract(images) - whole).norm() / whole.norm())
    if not error <= TOLERANCE:
        return (), f"BatchNorm is not folded: features would differ by {error:.1e}"
    return folds, f"{len(folds)} BatchNorms are folded in each step: features agree to {error:.0e}"


def _candidates(model: ImageClassifier, images: Tensor) -> tuple[Fold, ...]:
    made: list[tuple[Tensor, str]] = []
    folds: list[Fold] = []

    def convolved(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        made.append((output, name))

    def begin(name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
        folds.extend(Fold(before, name) for output, before in made if output is inputs[0])

    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for name, module in model.backbone.named_modules():
            if type(module) is nn.Conv2d:
                watch = functools.partial(convolved, name)
                hooks.callback(module.register_forward_hook(watch).remove)
            elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and _is_affine(module):
                hooks.callback(
                    module.register_forward_pre_hook(functools.partial(begin, name)).remove
                )
        model.extract(images)
    return tuple(folds)


def _is_affine(norm: nn.Module) -> bool:
    return norm.weight is not None and norm.running_var is not None


@contextlib.contextmanager
def folded(model: ImageClassifier, folds: tuple[Fold, ...]) -> Iterator[None]:
    """Within the block the convolutions of ``folds`` do what comes after them, too.

    Modules and parameters stay in their places; what replaces or rounds a convolution's weight
    still does.
    """
    modules = [model.backbone.get_submodule(name) for fold in folds for name in fold]
    for convolution, norm in zip(modules[::2], modules[1::2], strict=True):
        convolution.forward = functools.partial(_convolve, convolution, norm)
        norm.forward = functools.partial(_activate, norm)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _convolve(convolution: Any, norm: Any, maps: Tensor) -> Tensor:
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    mean = norm.running_mean
    if convolution.bias is not None:
        mean = mean - convolution.bias
    weight = convolution.weight * scale[:, None, None, None]
    output: Tensor = convolution._conv_forward(maps, weight, norm.bias - mean * scale)
    return output


def _activate(norm: Any, maps: Tensor) -> Tensor:
    """What timm's BatchNorm does after normalising; torch's does nothing."""
    if isinstance(norm, BatchNormAct2d):
        activated: Tensor = norm.act(norm.drop(maps))
        return activated
    return maps
