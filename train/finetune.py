"""Fine-tuning at a low rate from a fitted head, source and target images in every epoch.

BatchNorm statistics stay frozen (the whole network is in eval mode), the rate warms up and decays
by a cosine, and the epoch with the best validation score is kept. The state is saved as it goes:
the order of images and every augmentation are functions of seed and step, so a run that was
interrupted goes on as if it had not been.

Order and reasons: Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022 (a fitted head first, then a low rate).
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from runtime import atomic
from runtime.errors import RecipeError
from runtime.recipe import Augmentation, TrainSettings
from train.device import Device
from train.features import to_device
from train.model import ImageClassifier, freeze_modules

UInt8 = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

SAVE_EVERY_S = 60.0
"""Longest work, in seconds, that a kill -9 can cost."""

CLIP_NORM = 1.0


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the history."""

    epoch: int
    loss: float
    score: float
    """The recipe's metric on the field's validation images."""
    seconds: float


class _State(msgspec.Struct, kw_only=True):
    """What a resumed run needs beside tensors."""

    key: str
    step: int = 0
    best_epoch: int = -1
    best_score: float | None = None
    losses: float = 0.0
    seconds: float = 0.0
    scaler: dict[str, int | float] = {}
    history: list[Epoch] = []


class Watcher(NamedTuple):
    """How a run is watched; each is called with numbers only."""

    step: Callable[[int, int, float, float], None]
    """Step done, steps in all, loss, rate."""
    epoch: Callable[[Epoch], None]
    resumed: Callable[[int, int], None]
    """Step it goes on from, steps in all."""


def fine_tune(
    model: ImageClassifier,
    pixels: UInt8,
    rows: Ints,
    labels: Ints,
    weights: npt.NDArray[np.float32],
    *,
    settings: TrainSettings,
    seed: int,
    key: str,
    state_path: Path,
    device: Device,
    validate: Callable[[ImageClassifier], float],
    watch: Watcher,
) -> list[Epoch]:
    """Train ``model`` in place and leave it at its best epoch; returns the history.

    ``pixels`` uint8 ``[M, H, W, C]`` may be larger than memory: it is read batch by batch.
    ``rows [N]`` are those to train on, with their ``labels [N]`` and ``weights [N]`` of mean 1.
    ``validate`` scores the model, higher is better. ``state_path`` holds the resumable state; it
    is used only if ``key`` is the same, and removed by the caller when its result is safe.

    KeyboardInterrupt saves the state first. Raises RecipeError if the loss stops being finite.
    """
    freeze_modules(model, settings.freeze)
    model.to(device.torch, memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps_per_epoch = max(1, len(labels) // settings.batch)
    steps = steps_per_epoch * settings.epochs
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(trained, settings)
    scaler = torch.amp.GradScaler(device.kind, enabled=device.precision == torch.float16)
    state, best = _restore(state_path, key, model, trained, optimizer, scaler)
    if state.step:
        watch.resumed(state.step, steps)
    model.eval()  # BatchNorm and dropout stay as in use; weights are trained all the same
    started = saved = time.monotonic()
    spent = state.seconds
    with _interruptible() as interrupted:
        while state.step < steps:
            epoch, index = divmod(state.step, steps_per_epoch)
            order = _order(len(labels), seed, epoch)
            batch = np.sort(order[index * settings.batch : (index + 1) * settings.batch])
            rate = _rate(state.step, steps, settings.warmup)
            images = to_device(pixels[rows[batch]], device)
            loss = _step(
                model,
                optimizer,
                scaler,
                trained,
                rate,
                device,
                _augment(images, settings.augment, seed, state.step),
                torch.from_numpy(labels[batch]).to(device.torch),
                torch.from_numpy(weights[batch]).to(device.torch),
            )
            if not math.isfinite(loss):
                raise RecipeError(
                    f"[train] learning_rate: fine-tuning diverged at step {state.step + 1} of "
                    f"{steps} (the loss is {loss}); lower it"
                )
            state.losses += loss
            state.step += 1
            state.seconds = spent + time.monotonic() - started
            watch.step(state.step, steps, loss, rate * settings.learning_rate)
            if state.step % steps_per_epoch == 0:
                done = Epoch(
                    epoch=epoch + 1,
                    loss=state.losses / steps_per_epoch,
                    score=validate(model),
                    seconds=state.seconds,
                )
                state.losses = 0.0
                state.history.append(done)
                if state.best_score is None or done.score > state.best_score:
                    state.best_score, state.best_epoch = done.score, done.epoch
                    best = {n: p.detach().clone() for n, p in trained.items()}
                watch.epoch(done)
            if interrupted() or time.monotonic() - saved > SAVE_EVERY_S:
                _save(state_path, state, trained, best, optimizer, scaler)
                saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(best[name])
    model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return state.history


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until a step is whole; a second one does not wait.

    Between the optimizer's update and the count of steps, an interruption would save a state in
    which a step is done but not counted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    heard = False
    usual = signal.getsignal(signal.SIGINT)

    def hear(number: int, frame: object) -> None:
        nonlocal heard
        heard = True
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, hear)
    try:
        yield lambda: heard
    finally:
        signal.signal(signal.SIGINT, usual)


def _optimizer(trained: Mapping[str, Tensor], settings: TrainSettings) -> torch.optim.AdamW:
    head = [p for n, p in trained.items() if n.startswith("head.")]
    body = [p for n, p in trained.items() if not n.startswith("head.")]
    groups = [
        {"params": body, "peak": settings.learning_rate},
        {"params": head, "peak": settings.head_learning_rate},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )


def _step(
    model: ImageClassifier,
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
    trained: Mapping[str, Tensor],
    rate: float,
    device: Device,
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"]
    optimizer.zero_grad(set_to_none=True)
    with device.autocast():
        logits, _ = model(images)
    entropy = F.cross_entropy(logits.float(), labels, reduction="none")
    loss = (entropy * weights).mean()
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(list(trained.values()), CLIP_NORM)
    scaler.step(optimizer)
    scaler.update()
    return float(loss.detach())


def _order(count: int, seed: int, epoch: int) -> Ints:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _augment(images: Tensor, kinds: tuple[Augmentation, ...], seed: int, step: int) -> Tensor:
    """Flip and turn each image of ``[N, H, W, C]`` by its own coin."""
    random = np.random.default_rng((seed, 1, step))
    for kind in kinds:
        if kind == "rotate-90":
            if images.shape[1] != images.shape[2]:
                continue  # turning would change the shape
            turns = torch.from_numpy(random.integers(0, 4, len(images))).to(images.device)
            turned = torch.stack([torch.rot90(images, k, (1, 2)) for k in range(4)])
            images = turned[turns, torch.arange(len(images), device=images.device)]
        else:
            axis = 2 if kind == "flip-horizontal" else 1
            coin = torch.from_numpy(random.random(len(images)) < 0.5).to(images.device)
            images = torch.where(coin[:, None, None, None], images.flip(axis), images)
    return images


def _save(
    path: Path,
    state: _State,
    trained: Mapping[str, Tensor],
    best: dict[str, Tensor],
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
) -> None:
    tensors = {f"model.{n}": p for n, p in trained.items()}
    tensors |= {f"best.{n}": p for n, p in best.items()}
    names = {id(p): n for n, p in trained.items()}
    for parameter, values in optimizer.state.items():
        for kind, value in values.items():
            tensors[f"optimizer.{kind}.{names[id(parameter)]}"] = value
    state.scaler = scaler.state_dict() if scaler.is_enabled() else {}
    data = save(
        {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()},
        metadata={"state": msgspec.json.encode(state).decode()},
    )
    atomic.write_bytes(path, data)


def _restore(
    path: Path,
    key: str,
    model: ImageClassifier,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler,
) -> tuple[_State, dict[str, Tensor]]:
    """The saved state if it belongs to this run, else a fresh one."""
    fresh = _State(key=key), {n: p.detach().clone() for n, p in trained.items()}
    if not path.is_file():
        return fresh
    try:
        with safe_open(path, framework="pt") as file:
            state = msgspec.json.decode((file.metadata() or {})["state"], type=_State)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, msgspec.DecodeError):
        return fresh  # a damaged state costs the time to train again
    if state.key != key or not {f"model.{n}" for n in trained} <= set(tensors):
        return fresh
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"model.{name}"])
    for parameter in trained.values():
        optimizer.state[parameter] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            kind, _, owner = rest.partition(".")
            parameter = trained[owner]
            on = "cpu" if kind == "step" else parameter.device
            optimizer.state[parameter][kind] = tensor.to(on)
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    device = next(iter(trained.values())).device
    return state, {n: tensors[f"best.{n}"].to(device) for n in trained}
