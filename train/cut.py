"""Where a network can be cut so that frozen stages lie before it and all that learns behind it.

It knows the network only by watching a batch pass through its modules, and trusts a cut only after
comparing: the rest of the network, fed with what came out at the cut, must answer as the whole
does. It does not know where activations are kept (train/stages).
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.device import Device
from train.model import ImageClassifier

TRIES = 8
"""Cuts that are tried, the last possible one first."""

TOLERANCE = 0.01
"""Most that features from activations in float16 may differ, as a share of their norm: rounding
costs about 0.001, a wrong cut about 1."""


class Cut(NamedTuple):
    """Where the frozen stages end."""

    boundary: str
    """The module whose output is kept."""
    skipped: tuple[str, ...]
    """Modules that the rest of the network goes without: the largest that lie before the cut."""


def find_cut(model: ImageClassifier, images: Tensor, device: Device) -> tuple[Cut | None, str]:
    """The last place where the network can be cut so that all before is frozen, and why there.

    A cut is right if what comes out of one module is all that the rest needs: true between the
    stages of a CNN, not within a residual block. That is found by trying it on ``images``.
    """
    cuts = _candidates(model, images, device)
    if not cuts:
        return None, "the first stage is not frozen"
    with torch.inference_mode(), device.autocast():
        whole = model.extract(images).float()
    for cut in cuts[:TRIES]:
        maps = activations(model, images, cut, device).half().float().permute(0, 3, 1, 2)
        try:
            with torch.inference_mode(), device.autocast(), skipping(model, cut):
                rest = model.extract(maps).float()
            error = float((rest - whole).norm() / whole.norm())
        except Exception:  # whatever a network raises on a shape it does not expect
            continue
        if error <= TOLERANCE:
            return cut, f"the rest answers as the whole does, to {error:.1e}"
    return None, f"the network cannot be cut at {cuts[0].boundary} or shortly before"


def _candidates(model: ImageClassifier, images: Tensor, device: Device) -> list[Cut]:
    """Places where all that has run is frozen and a map comes out, the last one first."""
    ended: list[str] = []
    cuts: list[Cut] = []
    learning = False

    def begin(module: nn.Module, inputs: object) -> None:
        nonlocal learning
        learning |= any(p.requires_grad for p in module.parameters(recurse=False))

    def end(module: nn.Module, inputs: object, output: object) -> None:
        if learning:
            return
        ended.append(names[module])
        frozen = any(True for name in ended for _ in modules[name].parameters())
        if frozen and isinstance(output, Tensor) and output.ndim == 4:
            cuts.append(Cut(names[module], _largest(ended)))

    modules = {name: module for name, module in model.backbone.named_modules() if name}
    names = {module: name for name, module in modules.items()}
    handles = [m.register_forward_pre_hook(begin) for m in modules.values()]
    handles += [m.register_forward_hook(end) for m in modules.values()]
    try:
        with torch.inference_mode(), device.autocast():
            model.extract(images)
    finally:
        for handle in handles:
            handle.remove()
    return cuts[::-1]


def _largest(names: Sequence[str]) -> tuple[str, ...]:
    """Those of ``names`` that lie in no other."""
    return tuple(name for name in names if not any(name.startswith(f"{other}.") for other in names))


class _Enough(Exception):  # noqa: N818 - it is how a forward pass ends early, no error
    """The activations that were asked for."""


def activations(model: ImageClassifier, images: Tensor, cut: Cut, device: Device) -> Tensor:
    """What comes out of the cut's boundary, ``[N, H, W, C]``; the rest does not run."""

    def stop(module: nn.Module, inputs: object, output: Tensor) -> None:
        raise _Enough(output)

    handle = model.backbone.get_submodule(cut.boundary).register_forward_hook(stop)
    try:
        with torch.inference_mode(), device.autocast():
            model.extract(images)
    except _Enough as reached:
        maps: Tensor = reached.args[0]
        return maps.permute(0, 2, 3, 1)
    finally:
        handle.remove()
    raise AssertionError(f"{cut.boundary} did not run")


@contextlib.contextmanager
def skipping(model: ImageClassifier, cut: Cut) -> Iterator[None]:
    """Within the block the network takes the cut's activations instead of images.

    Modules before the cut hand on what they get. They stay in their places, so that names and
    parameters are those of the whole network.
    """
    modules = [model.backbone.get_submodule(name) for name in cut.skipped]
    for module in modules:
        module.forward = _same
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _same(values: Tensor, *others: object) -> Tensor:
    return values
