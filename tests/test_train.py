"""What training leaves behind: the checkpoint, and the key of a run."""

from pathlib import Path

import pytest
import torch

from runtime.dataset import Dataset
from runtime.errors import DataError
from runtime.preprocess import InputSpec
from runtime.recipe import ModelSettings, parse_recipe
from train.checkpoint import CheckpointFacts, read_checkpoint, write_checkpoint
from train.model import build_model
from train.record import training_key

SPEC = InputSpec(size=(32, 32), channels=1)


def test_a_checkpoint_comes_back_as_it_went(tmp_path: Path) -> None:
    model = build_model(ModelSettings(), SPEC, 2)
    facts = CheckpointFacts(
        name="t", classes=("a", "b"), model=ModelSettings(), input=SPEC, recipe_sha256="0" * 64,
        dataset_sha256="1" * 64, rung="test", temperature=1.5, verified=True,
        adaptation="it scored best", labels_used=12,
    )  # fmt: skip
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, model, facts)
    loaded, read = read_checkpoint(path)
    assert read == facts
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    with pytest.raises(DataError, match="no checkpoint; run `make train`"):
        read_checkpoint(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged"):
        read_checkpoint(path)


def test_other_weights_in_the_same_file_are_another_run(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    dataset = Dataset(classes=("a", "b"), examples=())
    text = f'name = "t"\n[data]\nsource = "s"\n[model]\nweights = "{file}"\n'
    recipe = parse_recipe(text, "t.toml")
    first = training_key(recipe, dataset)
    assert training_key(recipe, dataset) == first
    file.write_bytes(b"two")
    assert training_key(recipe, dataset) != first
