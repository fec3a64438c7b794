"""One optimizer step: which weights move, at what rates, in what precision, over all processes.

It does not know images, epochs or scores.
"""

import contextlib
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.errors import RecipeError
from runtime.recipe import Schedule
from train import distributed
from train.cut import Cut, skipping
from train.device import Device
from train.fold import Fold, find_folds, folded
from train.model import ImageClassifier, freeze_modules
from train.objective import Batch, Objective

CLIP_NORM = 1.0


def choose_trained(model: ImageClassifier, freeze: tuple[str, ...], tune: tuple[str, ...]) -> None:
    """Let only the head and the backbone's modules ``tune`` learn, () being all, less ``freeze``.

    Raises RecipeError for a name that the backbone does not have.
    """
    modules = dict(model.backbone.named_modules())
    for parameter in model.backbone.parameters():
        parameter.requires_grad = not tune
    for name in tune:
        if name not in modules or not name:
            known = ", ".join(n for n in modules if n and n.count(".") <= 1)
            raise RecipeError(
                f"[train.fine_tuning] tune: no module {name!r}; the backbone has: {known}"
            )
        modules[name].requires_grad_()
    freeze_modules(model, freeze)


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to zero.

    Five steps at least, half of a shorter course: AdamW's first steps are as large as the rate
    allows, and one at the peak has been seen to take a loss from 0.7 to 62.
    """
    rising = max(1, min(5, steps // 2), round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Optimization:
    """AdamW on the body, the head and the objective's own parameters, each at its own rate.

    Those keep their rate after the warm-up. Gradients are clipped to norm 1, theirs apart. Of
    several processes each has a part of every batch, and DistributedDataParallel averages their
    gradients; see distributed.mean for why that is the gradient of the whole.
    """

    trained: dict[str, nn.Parameter]
    """All that moves, by name."""

    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        extra_rate: float | None,
        device: Device,
        cut: Cut | None,
    ) -> None:
        named = {n: p for n, p in objective.model.named_parameters() if p.requires_grad}
        extra = {f"extra.{n}": p for n, p in objective.extra_parameters()}
        self.trained = named | extra
        head = [p for n, p in named.items() if n.startswith("head.")]
        body = [p for n, p in named.items() if not n.startswith("head.")]
        rest = list(extra.values())
        groups: list[dict[str, Any]] = [
            {"params": body, "peak": schedule.learning_rate, "decays": True},
            {"params": head, "peak": schedule.head_learning_rate, "decays": True},
            # A discriminator that slows down as the network does is overrun at the end.
            {"params": rest, "peak": extra_rate or schedule.head_learning_rate, "decays": False},
        ]
        self.warmup, self.clipped = schedule.warmup, [list(named.values()), rest]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=schedule.learning_rate,
            weight_decay=schedule.weight_decay,
            # One pass over each weight instead of a dozen: three hundredths of a step on a CPU.
            fused=device.kind == "cpu",
        )
        self.scaler = torch.amp.GradScaler(device.kind, enabled=device.precision == torch.float16)
        self.device, self.model, self.cut = device, objective.model, cut
        self.folds: tuple[Fold, ...] = ()
        self.compiled = False
        self.objective: nn.Module = objective
        if distributed.size() > 1:
            with warnings.catch_warnings():  # newer versions of torch have another word for it
                warnings.simplefilter("ignore", FutureWarning)
                # Buffers are frozen statistics, the same everywhere.
                self.objective = DistributedDataParallel(objective, broadcast_buffers=False)

    def fold(self, images: Tensor) -> str:
        """Fold BatchNorm in the steps to come where that is exact on ``images``, uint8
        ``[N, H, W, C]`` on the device; returns what became of it."""
        self.folds, reason = find_folds(self.model, images, self.device, self.cut)
        return reason

    def compile(self, batch: Batch) -> str:
        """Compile the network; returns what became of it. Without a compiler it runs as it is.

        Torch finds out what it lacks only when a batch has passed, forwards and back.
        """
        self.model.compile()
        try:
            loss, _ = self._forward(batch, 0.0)
            loss.backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            self.model._compiled_call_impl = None
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"compile: going on without, torch.compile says: {first[:200]}"
        self.compiled = True
        return "compile: the network is compiled"

    def step(
        self, batch: Batch, progress: float, rate: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Move the weights at ``rate``, a share of their peaks; returns this process's loss and
        the parts of it."""
        steady = rate if progress < self.warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * (rate if group["decays"] else steady)
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts = self._forward(batch, progress)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        for parameters in self.clipped:  # a discriminator's gradients do not shorten the network's
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), parts

    def _forward(self, batch: Batch, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        shorter = skipping(self.model, self.cut) if self.cut else contextlib.nullcontext()
        with shorter, folded(self.model, self.folds), self.device.autocast():
            loss, parts = self.objective(batch, progress)
        return loss, parts
