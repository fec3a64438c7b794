"""The trained model as one safetensors file: weights, and the recipe that made them.

No pickle: a checkpoint that somebody mails you can be opened without running it.
"""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from runtime import atomic
from runtime.errors import DataError
from runtime.preprocess import InputSpec
from runtime.recipe import ModelSettings
from train.model import ImageClassifier, build_model


class CheckpointFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known to rebuild the model, kept in the file's own metadata."""

    format: int = 1
    name: str
    classes: tuple[str, ...]
    model: ModelSettings
    input: InputSpec
    recipe_sha256: str
    dataset_sha256: str
    rung: str
    temperature: float
    """Divides the logits before softmax; fitted on validation images."""
    verified: bool
    """Whether enough held-out field labels proved the rung; else it must not pass as proven."""
    adaptation: str
    """Why, in one sentence without the rung's name, e.g. "12 labelled field images, 50 needed"."""
    labels_used: int
    """Labelled field images that training used."""


def write_checkpoint(path: Path, model: ImageClassifier, facts: CheckpointFacts) -> str:
    """Write the checkpoint atomically and return its SHA-256."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    data = save(tensors, metadata={"fieldfit": msgspec.json.encode(facts).decode()})
    atomic.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def is_checkpoint(path: Path) -> bool:
    """Whether the file at ``path`` is a checkpoint of fieldfit, by its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return "fieldfit" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_checkpoint(path: Path) -> tuple[ImageClassifier, CheckpointFacts]:
    """Rebuild the model, in eval mode, on the CPU.

    Raises DataError if the file is missing, damaged, or no checkpoint of fieldfit.
    """
    if not path.is_file():
        raise DataError(f"{path}: no checkpoint; run `make train` (python -m train RECIPE) first")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = msgspec.json.decode(metadata["fieldfit"], type=CheckpointFacts)
    except (SafetensorError, OSError, KeyError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: damaged, or no checkpoint of fieldfit: {error}") from error
    # Every tensor is replaced below; downloading or reading starting weights would be waste.
    settings = msgspec.structs.replace(facts.model, weights="random")
    model = build_model(settings, facts.input, len(facts.classes))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(f"{path}: its tensors do not fit {facts.model.architecture}") from error
    return model.eval(), facts
