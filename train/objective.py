"""What one step of training minimises: a batch of both domains in, a loss and its parts out.

An objective is a module that holds everything that is trained, so that gradients of several
processes are averaged in one place (train/distributed). It does not know where batches come from
(train/batches) nor how weights move (train/finetune).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train import distributed
from train.model import ImageClassifier

SOURCE, TARGET = 0, 1
"""Values of ``Batch.domains``."""


class Batch(NamedTuple):
    """Images of one step, on the device, already augmented; all domains in one tensor."""

    images: Tensor
    """uint8 ``[B, H, W, C]``, or floating-point activations that train/stages cached."""
    labels: Tensor
    """int64 ``[B]``, -1 where unknown."""
    domains: Tensor
    """int64 ``[B]``, SOURCE or TARGET."""
    weights: Tensor
    """float32 ``[B]``: what each image counts in means over its domain; 1 is usual."""
    teacher: Tensor
    """float32 ``[B, K]``: the source model's logits for the image as it is stored; NaN where they
    are not to be kept."""


class Objective(nn.Module):
    """The seam: ``forward`` returns the loss to minimise and named parts to show.

    Each objective's ``forward`` runs the network once on the whole batch.
    """

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) and its parts (scalars, detached); ``progress`` in [0, 1] is the share
        of the steps that are done, for what ramps up."""
        raise NotImplementedError

    def extra_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters that are not the model's (a discriminator's), by name."""
        return iter(())


class TaskLoss(Objective):
    """Cross-entropy on known labels, each domain counting the same, and what is to be kept.

    ``keep_answers`` weighs the Kullback-Leibler divergence from the teacher's answers at
    temperature 2 (Hinton et al. 2015; on field images alone it is learning without forgetting, Li
    and Hoiem 2017). ``l2_sp`` pulls trained weights back to where they start (Xuhong et al. 2018).
    """

    temperature = 2.0

    def __init__(
        self, model: ImageClassifier, *, keep_answers: float = 0.0, l2_sp: float = 0.0
    ) -> None:
        super().__init__(model)
        self.keep_answers, self.l2_sp = keep_answers, l2_sp
        self.pulled: list[str] = []
        """Names of the parameters that are pulled back; where to is in the buffers ``start_N``."""
        if l2_sp:
            for index, (name, parameter) in enumerate(model.named_parameters()):
                self.pulled.append(name)
                self.register_buffer(f"start_{index}", parameter.detach().clone(), persistent=False)

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _ = self.model(batch.images)
        return self.losses(logits.float(), batch)

    def losses(self, logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and parts for the logits of ``batch``; other objectives build on it."""
        task = domain_mean(
            F.cross_entropy(logits, batch.labels.clamp(min=0), reduction="none"),
            batch.weights * (batch.labels >= 0),
            batch.domains,
        )
        loss, parts = task, {"task": task.detach()}
        if self.keep_answers:
            kept = answers_kept(logits, batch.teacher, self.temperature)
            loss = loss + self.keep_answers * kept
            parts["kept answers"] = kept.detach()
        if self.l2_sp:
            named = dict(self.model.named_parameters())
            starts = (self.get_buffer(f"start_{index}") for index in range(len(self.pulled)))
            pull = torch.stack(
                [(named[n] - s).square().sum() for n, s in zip(self.pulled, starts, strict=True)]
            ).sum()
            loss = loss + self.l2_sp * pull
            parts["distance"] = pull.detach()
        return loss, parts


def domain_mean(values: Tensor, weights: Tensor, domains: Tensor) -> Tensor:
    """Weighted mean of ``values [B]`` in each domain that has any weight, and of those the mean.

    So that each domain counts the same however many images of it a batch has.
    """
    members = torch.stack([weights * (domains == domain) for domain in (SOURCE, TARGET)])
    totals = distributed.mean(members.sum(dim=1))
    means = (members * values).sum(dim=1) / totals.clamp(min=1e-12)
    return means.sum() / (totals > 0).sum().clamp(min=1)


def answers_kept(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) ``* temperature²``, the mean over rows whose teacher is known."""
    known = torch.isfinite(teacher).all(dim=1)
    expected = torch.where(known[:, None], teacher, torch.zeros_like(teacher)) / temperature
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(expected, dim=1),
        reduction="none",
        log_target=True,
    ).sum(dim=1)
    count = distributed.mean(known.sum().to(divergence.dtype))
    return (divergence * known).sum() / count.clamp(min=1e-12) * temperature**2
