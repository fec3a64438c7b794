"""The last rung before FP16: move the weights until the network answers well when it is rounded.

Where post-training quantization fails, a short fine-tuning lowers the difference between the
rounded network's logits and the float network's own; labels play no part, so that what was trained
and judged is kept. It does not know graphs, dialects or gates: which layers are rounded, and how
their inputs are, comes as a plan.

Inputs are rounded in the scales of the plan, weights to int8 with one scale for each output
channel, and gradients pass through the rounding as if it were not there (the straight-through
estimator: Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018, arXiv:1712.05877). BatchNorm
need not be folded for that: it multiplies each output channel by one number, and so it does the
channel's scale and largest weight alike; rounding before it or after folding gives the same.
"""

import contextlib
import copy
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from runtime.errors import DataError, ExportError
from runtime.metrics import sqnr_db
from runtime.recipe import Augmentation, Schedule, TrainSettings
from train.device import Device
from train.features import BATCH, predict, to_device
from train.finetune import Group, History, Watcher, fine_tune
from train.model import ImageClassifier, weights_sha256
from train.objective import SOURCE, TARGET, Batch, Objective

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SCHEDULE = Schedule(
    epochs=2, batch=16, learning_rate=2e-5, head_learning_rate=2e-5, weight_decay=0.0, patience=0
)
"""A low rate: at 2e-4 the network was lost (on the default recipe no epoch beat the start)."""

STEPS = 96

SOURCE_SHARE = 4
"""One image in so many is the source's, where there are any: what it knew is not to be lost."""

HELD_OUT_SHARE = 5
"""One field image in so many is not trained on but tells which epoch is best."""

MAX_HELD_OUT = 256

MAX_WEIGHT = 127

_DRAW = 7  # a stream of random numbers of its own


class LayerQuantization(NamedTuple):
    """How the input of one layer is rounded: ``saturate(round(x / scale) + zero_point)``."""

    scale: float
    zero_point: int
    low: int
    """Smallest integer; smaller ones saturate."""
    high: int


Layer: TypeAlias = nn.Conv2d | nn.Linear

Plan: TypeAlias = Mapping[str, LayerQuantization]
"""The layers to round, by their names in the checkpoint."""


def quantize_aware(
    model: ImageClassifier,
    plan: Plan,
    *,
    pixels: UInt8,
    field: Ints,
    source: Ints,
    augment: tuple[Augmentation, ...],
    seed: int,
    state_path: Path,
    device: Device,
    watch: Watcher,
    schedule: Schedule = SCHEDULE,
    steps: int = STEPS,
) -> tuple[ImageClassifier, History]:
    """A copy of ``model`` whose rounded answers are closer to the float answers of ``model``.

    ``field`` and ``source`` are rows of ``pixels`` uint8 ``[M, H, W, C]``, training images only;
    ``source`` may be empty. Scores in the history are the SQNR of the rounded network's logits in
    dB on field images that are held out; if no epoch beats the start, ``kept_epoch`` is 0 and
    there is nothing to gain. BatchNorm statistics stay.

    The layers' weights come back rounded, so that they are exact in int8 and quantizing them again
    leaves no error that a correction of biases would take out a second time. ``state_path`` holds
    the state of an interrupted training (train/resume), for the same arguments only; the caller
    removes it.

    Raises ExportError if ``model`` lacks a layer of ``plan``, and DataError for fewer than two
    images in ``field``.
    """
    if len(field) < 2:
        raise DataError(
            "quantization-aware fine-tuning needs 2 field training images or more, "
            f"got {len(field)}"
        )
    device = device._replace(precision=torch.float32)  # bfloat16 rounds as coarsely as int8
    _layers(model, plan)
    random = np.random.default_rng((seed, _DRAW))
    held_out, learned = np.split(
        random.permutation(field), [min(MAX_HELD_OUT, -(-len(field) // HELD_OUT_SHARE))]
    )
    tuned = copy.deepcopy(model)
    wanted = predict(tuned, pixels, device, rows=held_out)

    def validate(moving: ImageClassifier) -> float:
        return sqnr_db(wanted, predict_rounded(moving, plan, pixels, held_out, device))

    # No group may be so large that an epoch of it takes more than its part of the steps.
    passes = -(-steps // schedule.epochs)
    replay = schedule.batch // SOURCE_SHARE if len(source) else 0
    share = schedule.batch - replay
    groups = [
        _group("source", SOURCE, random.permutation(source)[: passes * replay], replay),
        _group("field", TARGET, learned[: passes * share], share),
    ]
    settings = (sorted(plan.items()), schedule, steps, augment, seed, weights_sha256(model))
    digest = hashlib.sha256(repr(settings).encode())
    for array in (field, source, wanted):
        digest.update(array.tobytes())
    history = fine_tune(
        QuantizationAware(tuned, plan), [group for group in groups if group.share],
        pixels=pixels, schedule=schedule,
        # Nothing is frozen, so nothing is cached.
        train=TrainSettings(augment=augment, cache_frozen=False), images_sha256="",
        cache=state_path.parent, min_steps=steps, tune=(), seed=seed, key=digest.hexdigest(),
        state_path=state_path, device=device, validate=validate, watch=watch,
    )  # fmt: skip
    with torch.no_grad():
        for layer in _layers(tuned, plan).values():
            layer.weight.copy_(rounded_weight(layer.weight))
    return tuned.eval(), history


class QuantizationAware(Objective):
    """The noise that rounding adds to logits and features, each as a share of their power.

    For the logits, centred, that is the gate's SQNR upside down: what is asked of every image,
    rather than of those that stand near a decision. A few logits teach a network little, though;
    of logits alone it learns the images by heart. The features before them are many (distillation
    by hints: Romero et al. 2015, arXiv:1412.6550).
    """

    def __init__(self, model: ImageClassifier, plan: Plan) -> None:
        """``model`` as it is now is the teacher."""
        super().__init__(model)
        self.plan = plan
        self.teacher = copy.deepcopy(model).requires_grad_(False)

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            wanted = self.teacher(batch.images)
        rounded = forward_rounded(self.model, self.plan, batch.images)
        logits, features = (_noise(one, other) for one, other in zip(rounded, wanted, strict=True))
        return logits + features, {"logits": logits.detach(), "features": features.detach()}


def _noise(values: Tensor, wanted: Tensor) -> Tensor:
    """Of ``values [B, D]``, as a share of the power of ``wanted``; rows are centred."""
    centred = wanted - wanted.mean(dim=1, keepdim=True)
    noise = values - values.mean(dim=1, keepdim=True) - centred
    return noise.square().sum() / centred.square().sum().clamp(min=1e-12)


def forward_rounded(model: ImageClassifier, plan: Plan, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[N, K]`` and features ``[N, D]`` with inputs and weights of the layers rounded.

    Gradients reach the weights as they are. Raises ExportError if ``model`` lacks a layer.
    """
    weights = {
        f"{name}.weight": rounded_weight(layer.weight)
        for name, layer in _layers(model, plan).items()
    }
    with _inputs_rounded(model, plan):
        outputs: tuple[Tensor, Tensor] = functional_call(model, weights, (images,))
    return outputs


def predict_rounded(
    model: ImageClassifier, plan: Plan, pixels: UInt8, rows: Ints, device: Device
) -> Float32:
    """Logits ``[N, K]`` of ``rows`` of ``pixels`` as ``forward_rounded`` gives them.

    ``model`` is on ``device``.
    """
    with torch.inference_mode():
        parts = [
            forward_rounded(model, plan, to_device(pixels[rows[i : i + BATCH]], device))[0].cpu()
            for i in range(0, len(rows), BATCH)
        ]
    return torch.cat(parts).numpy()


def rounded_weight(weight: Tensor) -> Tensor:
    """``weight [O, ...]`` on the int8 grid of each output channel, -127 to 127 steps.

    The scale follows the channel's largest weight, which stays as it is.
    """
    largest = weight.detach().abs().flatten(1).amax(dim=1)
    scales = torch.where(largest > 0, largest / MAX_WEIGHT, torch.ones_like(largest))
    zeros = torch.zeros(len(scales), dtype=torch.int32, device=weight.device)
    rounded: Tensor = torch.fake_quantize_per_channel_affine(
        weight, scales, zeros, 0, -MAX_WEIGHT, MAX_WEIGHT
    )
    return rounded


@contextlib.contextmanager
def _inputs_rounded(model: ImageClassifier, plan: Plan) -> Iterator[None]:
    with contextlib.ExitStack() as hooks:
        for name, layer in _layers(model, plan).items():
            rounding = functools.partial(_round_input, plan[name])
            hooks.callback(layer.register_forward_pre_hook(rounding).remove)
        yield


def _round_input(how: LayerQuantization, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(inputs[0], *how)


def _layers(model: ImageClassifier, plan: Plan) -> dict[str, Layer]:
    """The layers of ``plan`` by name."""
    modules, layers = dict(model.named_modules()), {}
    for name in plan:
        layer = modules.get(name)
        if not isinstance(layer, Layer):
            raise ExportError(
                f"quantization-aware fine-tuning: expected a convolution or linear layer {name!r}, "
                f"the network has {'none' if layer is None else type(layer).__name__} there"
            )
        layers[name] = layer
    return layers


def _group(name: str, domain: int, rows: Ints, share: int) -> Group:
    return Group(
        name=name, domain=domain, rows=rows, labels=np.full(len(rows), -1, dtype=np.int64),
        weights=np.ones(len(rows), np.float32), teacher=None, share=share,
    )  # fmt: skip
