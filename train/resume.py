"""The state of a training on disk, from which it goes on as if it had not been interrupted.

One safetensors file: weights, the best ones so far, the optimizer's moments, and a record of where
the training was. It does not know how a step is made.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from runtime import atomic
from train import distributed
from train.history import Epoch
from train.optimize import Optimization


class State(msgspec.Struct, kw_only=True):
    """Where a training is, beside its tensors."""

    key: str
    step: int = 0
    start_score: float | None = None
    best_epoch: int = 0
    best_score: float | None = None
    loss: float = 0.0
    """Sum over the steps of the epoch that is under way."""
    parts: dict[str, float] = {}
    """The same for the loss's parts, by name."""
    seconds: float = 0.0
    scaler: dict[str, int | float] = {}
    history: list[Epoch] = []


def save_state(
    path: Path, state: State, optimization: Optimization, best: Mapping[str, Tensor]
) -> None:
    """Write the state, atomically."""
    trained, scaler = optimization.trained, optimization.scaler
    tensors: dict[str, Tensor] = {f"now.{n}": p for n, p in trained.items()}
    tensors |= {f"best.{n}": p for n, p in best.items()}
    names = {id(p): n for n, p in trained.items()}
    for parameter, values in optimization.optimizer.state.items():
        for kind, value in values.items():
            tensors[f"optimizer.{kind}.{names[id(parameter)]}"] = value
    state.scaler = scaler.state_dict() if scaler.is_enabled() else {}
    data = save(
        {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()},
        metadata={"state": msgspec.json.encode(state).decode()},
    )
    atomic.write_bytes(path, data)


def restore_state(
    path: Path, key: str, optimization: Optimization, best: Mapping[str, Tensor]
) -> State:
    """The saved state if it belongs to this training, else a fresh one.

    Fills weights, moments and ``best`` in place. Of several processes the first one's file counts.
    """
    trained = optimization.trained
    known = distributed.broadcast(_read(path, key, set(trained)) if distributed.main() else None)
    if known is None:
        return State(key=key)
    state, tensors = known
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"now.{name}"])
        for name, tensor in best.items():
            tensor.copy_(tensors[f"best.{name}"])
    moments = optimization.optimizer.state
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            kind, _, owner = rest.partition(".")
            parameter = trained[owner]
            moments[parameter][kind] = tensor.to("cpu" if kind == "step" else parameter.device)
    if state.scaler:
        optimization.scaler.load_state_dict(state.scaler)
    return state


def _read(path: Path, key: str, names: set[str]) -> tuple[State, dict[str, Tensor]] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = msgspec.json.decode((file.metadata() or {})["state"], type=State)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, msgspec.DecodeError):
        return None  # a damaged state costs the time to train again
    fits = state.key == key and {f"now.{name}" for name in names} <= set(tensors)
    return (state, tensors) if fits else None
