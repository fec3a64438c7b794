"""A brought model answers as it did where it came from, or says in words why it cannot."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.errors import DataError, FieldfitError, RecipeError
from runtime.preprocess import InputSpec
from runtime.recipe import ModelSettings, SourceSettings
from train.bring import Brought, bring
from train.checkpoint import CheckpointFacts, write_checkpoint
from train.model import ImageClassifier, build_model

SPEC = InputSpec(size=(32, 32), channels=3)
GRAY = InputSpec(size=(32, 32), channels=1)
RESNET = ModelSettings(architecture="resnet18")
NAMES = ("good", "broken", "dirty")
"""The order of the outputs; sorted it is broken, dirty, good."""


def whole(architecture: str = "resnet18", *, classes: int = 3, **options: Any) -> nn.Module:
    """A classifier as timm makes it, with weights of every layer at random."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(architecture, num_classes=classes, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return network.eval()


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("brought") / "resnet18.safetensors", whole().state_dict())


def brought(
    path: Path,
    names: tuple[str, ...] = NAMES,
    *,
    model: ModelSettings = RESNET,
    spec: InputSpec = SPEC,
) -> Brought:
    return bring(SourceSettings(checkpoint=str(path), classes=names), model, spec)


def refused(path: Path, names: tuple[str, ...] = NAMES, **options: Any) -> str:
    with pytest.raises(FieldfitError) as refusal:
        brought(path, names, **options)
    assert type(refusal.value) in (DataError, RecipeError)
    return str(refusal.value)


def images(spec: InputSpec = SPEC) -> Tensor:
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (4, *spec.shape), dtype=np.uint8))


def reference(network: nn.Module, pixels: Tensor) -> Tensor:
    """What ``network`` says to images ``[N, H, W, C]`` normalised as SPEC does."""
    with torch.no_grad():
        logits: Tensor = network((pixels.permute(0, 3, 1, 2).float() - 128) / 128)
    return logits


def logits_of(model: ImageClassifier, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(pixels)[0]
    return logits


@pytest.mark.parametrize(
    "architecture", ["resnet18", "efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto"]
)
def test_a_timm_classifier_answers_as_before_in_sorted_order(
    architecture: str, tmp_path: Path
) -> None:
    network = whole(architecture)
    path = saved(tmp_path / "w.safetensors", network.state_dict())
    result = brought(path, model=ModelSettings(architecture=architecture))
    assert result.classes == ("broken", "dirty", "good")
    expected = reference(network, images())
    torch.testing.assert_close(
        logits_of(result.model, images()), expected[:, [1, 2, 0]], rtol=1e-4, atol=1e-4
    )
    assert not result.model.training
    assert "w.safetensors" in result.note
    assert architecture in result.note


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        (None, ""),
        ("state_dict", "module."),
        ("model", "model."),
        ("model_state_dict", "backbone."),
        (None, "module.model."),
    ],
)
def test_other_tools_wrappers_and_prefixes_are_known(
    wrapper: str | None, prefix: str, tmp_path: Path
) -> None:
    network = whole()
    tensors: Any = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 3, wrapper: tensors} if wrapper else tensors, tmp_path / "w.pt")
    result = brought(tmp_path / "w.pt")
    torch.testing.assert_close(result.model.head.weight, network.get_parameter("fc.weight")[
        [1, 2, 0]
    ])  # fmt: skip


def test_an_image_classifier_of_ours_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(msgspec.structs.replace(RESNET, weights="random"), SPEC, 3)
    nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "own.pt")
    result = brought(tmp_path / "own.pt")
    expected = logits_of(model, images())[:, [1, 2, 0]]
    torch.testing.assert_close(logits_of(result.model, images()), expected)


def test_a_colour_model_on_a_gray_sensor_answers_as_to_gray_pictures(resnet: Path) -> None:
    gray = images(GRAY)
    expected = reference(whole(), gray.repeat(1, 1, 1, 3))[:, [1, 2, 0]]
    got = logits_of(brought(resnet, spec=GRAY).model, gray)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_one_sigmoid_output_becomes_two_logits(tmp_path: Path) -> None:
    network = whole(classes=1)
    path = saved(tmp_path / "sigmoid.safetensors", network.state_dict())
    result = brought(path, ("good", "broken"))
    assert result.classes == ("broken", "good")
    broken = torch.sigmoid(reference(network, images())[:, 0])
    torch.testing.assert_close(torch.softmax(logits_of(result.model, images()), 1)[:, 0], broken)
    assert "its one output is taken for the score of 'broken'" in result.note
    assert "has one output for two classes, the list has 3" in refused(path)
    assert "has one output for two classes, the list has 1" in refused(path, ("good",))


def test_every_class_that_it_knows_is_kept(resnet: Path) -> None:
    assert brought(resnet).classes == ("broken", "dirty", "good")


# --- fieldfit's own checkpoint


def own(path: Path, model: ModelSettings = RESNET, spec: InputSpec = SPEC) -> ImageClassifier:
    torch.manual_seed(0)
    network = build_model(msgspec.structs.replace(model, weights="random"), spec, 2)
    nn.init.normal_(network.head.weight)
    facts = CheckpointFacts(
        name="line-3", classes=("broken", "good"), model=model, input=spec,
        recipe_sha256="0" * 64, dataset_sha256="1" * 64, rung="fine-tuning", temperature=1.0,
        verified=True, adaptation="a test", labels_used=9,
    )  # fmt: skip
    write_checkpoint(path, network, facts)
    return network


def test_a_checkpoint_of_fieldfit_knows_its_classes(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    network = own(path)
    result = brought(path, ())
    assert result.classes == ("broken", "good")
    torch.testing.assert_close(logits_of(result.model, images()), logits_of(network, images()))
    assert brought(path, ("broken", "good")).classes == ("broken", "good")
    assert "knows its own: broken, good; leave the key out" in refused(path, ("good", "broken"))


def test_a_checkpoint_of_fieldfit_may_see_another_size(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    network = own(path)
    larger = msgspec.structs.replace(SPEC, size=(48, 64))
    result = brought(path, (), spec=larger)
    assert "trained with size = [32, 32], used with [48, 64]" in result.note
    pixels = images(larger)
    torch.testing.assert_close(logits_of(result.model, pixels), logits_of(network, pixels))


def test_a_checkpoint_of_fieldfit_says_what_to_write_into_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    own(path)
    words = refused(path, (), model=ModelSettings(architecture="resnet34"))
    assert words.endswith('is a resnet18, the recipe says resnet34; write [model] architecture = '
                          '"resnet18"')  # fmt: skip
    other = InputSpec(size=(32, 32), channels=1, mean=124, std=58.0)
    words = refused(path, (), spec=other)
    assert "the recipe's channels = 1, mean = 124, std = 58.0;" in words
    assert words.endswith("write [input] channels = 3, mean = 128, std = 128.0")


def test_a_transformer_of_fieldfit_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    vit = ModelSettings(architecture="vit_tiny_patch16_224")
    own(path, vit)
    words = refused(path, (), model=vit, spec=InputSpec(size=(64, 64)))
    assert "the recipe's size = [64, 64]; write [input] size = [32, 32]" in words


# --- what does not fit


def test_a_missing_file_and_one_that_would_run_code_are_refused(tmp_path: Path) -> None:
    assert "no such checkpoint; correct [source] checkpoint" in refused(tmp_path / "none.pt")
    torch.save(whole(), tmp_path / "module.pt")
    assert "would run code; save model.state_dict()" in refused(tmp_path / "module.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    assert "damaged weights file" in refused(tmp_path / "cut.safetensors")


def test_a_backbone_alone_is_no_source_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "b.safetensors", whole(classes=0).state_dict())
    words = refused(path)
    assert "has no classifier layer (fc.weight or head.weight), only a backbone" in words
    assert "use it as [model] weights" in words


def test_a_classifier_that_is_not_one_linear_layer_is_refused(tmp_path: Path) -> None:
    tensors = whole().state_dict()
    narrow = {**tensors, "fc.weight": torch.zeros(3, 100)}
    words = refused(saved(tmp_path / "n.safetensors", narrow))
    assert "expected one linear classifier [classes, 512] on the backbone" in words
    assert "got fc.weight [3, 100]" in words
    double = {**tensors, "head.weight": torch.zeros(3, 512)}
    words = refused(saved(tmp_path / "d.safetensors", double))
    assert "got fc.weight [3, 512], head.weight [3, 512]" in words


def test_the_list_of_classes_must_describe_the_outputs(resnet: Path) -> None:
    words = refused(resnet, ())
    assert "does not carry the names of its classes; list them in the order of its outputs" in words
    words = refused(resnet, ("good", "broken"))
    assert "has 3 outputs, the list has 2 (good, broken)" in words


@pytest.mark.parametrize("real", ["resnet34", "mobilenetv2_100"])
def test_another_architecture_is_recognised(real: str, tmp_path: Path) -> None:
    """Also one that has every tensor of the recipe's architecture, and more."""
    path = saved(tmp_path / "w.safetensors", whole(real).state_dict())
    words = refused(path)
    assert "not the weights of resnet18" in words
    assert f'it looks like {real}: set [model] architecture = "{real}"' in words


def test_an_unusual_architecture_is_refused_with_the_first_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", whole("mobilenetv3_small_050").state_dict())
    words = refused(path)
    assert "(conv1.weight is missing; bn1.weight is [16], expected [64]; " in words
    assert words.endswith("set [model] architecture to the one they were made for")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (RESNET, {"in_chans": 1}),
        (ModelSettings(architecture="vit_tiny_patch16_224"), {}),
    ],
    ids=["channels", "size"],
)
def test_the_same_architecture_for_another_input_is_recognised(
    model: ModelSettings, options: dict[str, Any], tmp_path: Path
) -> None:
    network = whole(model.architecture, **options)
    path = saved(tmp_path / "w.safetensors", network.state_dict())
    assert "for another input: set [input] channels and size" in refused(path, model=model)
