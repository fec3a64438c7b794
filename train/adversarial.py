"""Adversarial objectives: features in which source and field images cannot be told apart.

Each adds one loss on the field to the supervised loss and needs no field labels. None knows where
batches come from, how weights move, or whether the result is any good: that is the gate's to say.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.recipe import AdversarialSettings
from train.model import ImageClassifier
from train.objective import TARGET, Batch, Objective, TaskLoss, domain_mean

RAMP = 10.0
"""How fast the weight rises: .99 of its end is reached after about half of the steps."""

EXACT_WIDTH, PROJECTED_WIDTH = 4096, 1024
"""CDAN's map is exact up to the first width, and a random projection to the second beyond it."""

DISCRIMINATOR = "discriminator accuracy"
"""Name of the part that shows it."""
TRUSTED = (0.5, 0.9)
"""Accuracies of a discriminator between which its last epoch speaks for a run."""


def make_objective(
    model: ImageClassifier,
    settings: AdversarialSettings,
    *,
    keep_answers: float = 0.0,
    seed: int = 0,
) -> Objective:
    """The objective of ``settings.method``; ``seed`` draws the discriminator's first weights."""
    if settings.method == "mcc":
        return MinimumClassConfusion(
            model,
            max_weight=settings.max_weight,
            confusion_temperature=settings.temperature,
            keep_answers=keep_answers,
        )
    return DomainAdversarial(
        model,
        max_weight=settings.max_weight,
        hidden=settings.hidden,
        dropout=settings.dropout,
        conditional=settings.method == "cdan",
        keep_answers=keep_answers,
        seed=seed,
    )


def ramp(progress: float, max_weight: float) -> float:
    """0 at ``progress`` 0, all but ``max_weight`` at 1 (Ganin et al. 2016, section 5.2.2).

    Early features say nothing yet, and neither does a discriminator that has not seen any.
    """
    return max_weight * (2.0 / (1.0 + math.exp(-RAMP * progress)) - 1.0)


def reverse(values: Tensor, weight: float) -> Tensor:
    """``values`` as they are, whose gradient comes back times ``-weight`` (Ganin et al. 2016)."""
    reversed_: Tensor = _Reverse.apply(values, weight)
    return reversed_


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradients[0], None


class Discriminator(nn.Module):
    """One hidden layer that tells domains apart: ``[B, W]`` to logits ``[B]``, target above 0.

    No BatchNorm: with the statistics of a batch it could tell them apart by the batch itself.
    """

    def __init__(self, width: int, hidden: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        self.dropout = dropout
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.hidden, self.out):
            nn.init.xavier_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, inputs: Tensor, *, drop: bool) -> Tensor:
        """``drop`` rather than train mode: the loop keeps all in eval mode for BatchNorm's sake."""
        active = F.dropout(F.relu(self.hidden(inputs)), self.dropout, training=drop)
        logits: Tensor = self.out(active)
        return logits.squeeze(1).float()


class MultilinearMap(nn.Module):
    """Features ``[B, D]`` and probabilities ``[B, K]`` to what CDAN's discriminator sees.

    The outer product ``[B, D * K]``, feature d times probability k at ``d * K + k``; where that is
    wider than EXACT_WIDTH, the product of two random projections, whose inner products are the
    same in expectation (Long et al. 2018, section 3.2). Both projections are fixed, not trained.
    """

    of_features: Tensor
    of_classes: Tensor

    def __init__(self, features: int, classes: int, seed: int) -> None:
        super().__init__()
        self.projected = features * classes > EXACT_WIDTH
        self.width = PROJECTED_WIDTH if self.projected else features * classes
        if self.projected:
            generator = torch.Generator().manual_seed(seed)
            for name, inputs in (("of_features", features), ("of_classes", classes)):
                drawn = torch.randn(inputs, self.width, generator=generator)
                self.register_buffer(name, drawn, persistent=False)

    def forward(self, features: Tensor, probabilities: Tensor) -> Tensor:
        if self.projected:
            both = (features @ self.of_features) * (probabilities @ self.of_classes)
            return both / math.sqrt(self.width)
        return (features[:, :, None] * probabilities[:, None, :]).flatten(1)


class DomainAdversarial(TaskLoss):
    """DANN, or CDAN+E if ``conditional``: the task, against a discriminator of the domains.

    The discriminator learns at full weight to tell the domains apart; the features learn, through
    gradient reversal at the weight of ``ramp``, that it cannot. Each domain counts the same.

    DANN: Ganin et al., "Domain-Adversarial Training of Neural Networks", JMLR 2016. CDAN: Long et
    al., "Conditional Adversarial Domain Adaptation", NeurIPS 2018; always with its entropy
    conditioning, which counts an image by how sure the model is of it, 1 + exp(-entropy). As in
    its authors' code, probabilities are taken as given: gradients reach features only.
    """

    def __init__(
        self,
        model: ImageClassifier,
        *,
        max_weight: float,
        hidden: int,
        dropout: float,
        conditional: bool = False,
        keep_answers: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, keep_answers=keep_answers)
        self.max_weight = max_weight
        width, classes = model.head.in_features, model.head.out_features
        self.multilinear = MultilinearMap(width, classes, seed) if conditional else None
        width = self.multilinear.width if self.multilinear else width
        self.discriminator = Discriminator(width, hidden, dropout, seed)

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass through the network; parts add ``domain loss``, ``discriminator accuracy``
        (balanced over the domains, without dropout) and ``weight``."""
        logits, features = self.model(batch.images)
        loss, parts = self.losses(logits.float(), batch)
        weight = ramp(progress, self.max_weight)
        seen, counts = reverse(features.float(), weight), batch.weights
        if self.multilinear is not None:
            probabilities = F.softmax(logits.detach().float(), dim=1)
            seen = self.multilinear(seen, probabilities)
            counts = counts * certainty(probabilities)
        told = self.discriminator(seen, drop=True)
        truth = batch.domains.to(told.dtype)
        wrong = F.binary_cross_entropy_with_logits(told, truth, reduction="none")
        domain = domain_mean(wrong, counts, batch.domains)
        with torch.no_grad():
            right = (self.discriminator(seen, drop=False) > 0) == (batch.domains == TARGET)
        parts["domain loss"] = domain.detach()
        parts[DISCRIMINATOR] = domain_mean(right.float(), batch.weights, batch.domains)
        parts["weight"] = loss.new_full((), weight)
        return loss + domain, parts

    def extra_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.discriminator.named_parameters(prefix="discriminator")


class MinimumClassConfusion(TaskLoss):
    """MCC: field images shall not be torn between classes; there is no discriminator.

    Jin et al., "Minimum Class Confusion for Versatile Domain Adaptation", ECCV 2020. Its weight
    rises by ``ramp`` here, where the paper has it constant.
    """

    def __init__(
        self,
        model: ImageClassifier,
        *,
        max_weight: float,
        confusion_temperature: float,
        keep_answers: float = 0.0,
    ) -> None:
        super().__init__(model, keep_answers=keep_answers)
        self.max_weight, self.confusion_temperature = max_weight, confusion_temperature

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass through the network; parts add ``class confusion`` and ``weight``."""
        logits, _ = self.model(batch.images)
        loss, parts = self.losses(logits.float(), batch)
        weight = ramp(progress, self.max_weight)
        confusion = class_confusion(
            logits.float(), batch.weights * (batch.domains == TARGET), self.confusion_temperature
        )
        parts["class confusion"] = confusion.detach()
        parts["weight"] = loss.new_full((), weight)
        return loss + weight * confusion, parts


def class_confusion(logits: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """How much of each class's mass lies on the others, the mean over classes.

    Of ``logits [B, K]``, rows counting by ``weights [B]`` times their certainty, which gets no
    gradient; 0 if no row counts (Jin et al. 2020, equations 3 to 7).
    """
    probabilities = F.softmax(logits / temperature, dim=1)
    counts = weights * certainty(probabilities.detach())
    together = (probabilities * counts[:, None]).T @ probabilities
    shares = together / together.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return (shares.sum() - shares.trace()) / logits.shape[1]


def certainty(probabilities: Tensor) -> Tensor:
    """1 + exp(-entropy) of each row of ``[B, K]``: 2 where the model is sure, 1 + 1/K at chance."""
    return 1.0 + torch.exp(-torch.special.entr(probabilities).sum(dim=1))


def distrust(accuracy: float) -> str | None:
    """Why a run whose ``discriminator accuracy`` was this in its last epoch is not to be trusted.

    None if it lies within TRUSTED. It is a sign and no proof: only labelled field images show
    whether a run helped.
    """
    least, most = TRUSTED
    seen = f"discriminator accuracy {accuracy:.2f} in the last epoch"
    if accuracy > most:
        return f"{seen}, above {most}: the domains' features did not mix"
    if accuracy < least:
        return f"{seen}, below {least}: the discriminator was overrun and no longer guides"
    return None
