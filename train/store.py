"""What a long run has finished, on disk, so that the same command goes on from there.

One safetensors file holds the weights of a model and a record of how it came to be. It does not
know what the record says.
"""

from pathlib import Path
from typing import TypeVar

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from runtime import atomic
from train.model import ImageClassifier

T = TypeVar("T")


def remember(path: Path, key: str, model: ImageClassifier, record: msgspec.Struct) -> None:
    """Keep the weights of ``model`` and ``record`` under ``key``, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    metadata = {"key": key, "record": msgspec.json.encode(record).decode()}
    atomic.write_bytes(path, save(tensors, metadata=metadata))


def recall(path: Path, key: str, model: ImageClassifier, kind: type[T]) -> T | None:
    """Load what was kept under ``key`` into ``model`` and return its record.

    None, and ``model`` as it was, if there is nothing, it is damaged, or of another key.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            record = msgspec.json.decode(metadata["record"], type=kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, RuntimeError, msgspec.DecodeError):
        return None  # costs the time to make it again
    return record
