"""BatchNorm folded into convolutions: the same answers and gradients, and the same network after.

Figures of speed are benchmarks/training's.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_training import CPU, SPEC, network, pictures
from train.cut import Cut
from train.fold import Fold, find_folds, folded
from train.model import ImageClassifier

IMAGES = torch.from_numpy(pictures(4)[0])


def gradients(model: ImageClassifier) -> dict[str, Tensor]:
    model.zero_grad()
    model(IMAGES)[0].square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def small(*layers: nn.Module) -> ImageClassifier:
    """A network of ``layers`` from 1 channel to 8, whose statistics are not those of its start."""
    torch.manual_seed(0)
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            assert module.running_mean is not None
            nn.init.uniform_(module.running_var, 0.2, 3.0)
            nn.init.normal_(module.running_mean)
            if module.affine:
                nn.init.uniform_(module.weight, 0.2, 3.0)
    return ImageClassifier(backbone, 8, 2, SPEC).eval()


def test_answers_and_gradients_are_those_of_the_network_as_it_is() -> None:
    model = network()
    folds, reason = find_folds(model, IMAGES, CPU, None)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(folds) == len(convolutions) > 40
    assert reason.startswith(f"{len(folds)} BatchNorms are folded in each step: features agree to")

    expected, answers = gradients(model), model(IMAGES)[0]
    with folded(model, folds):
        found, same = gradients(model), model(IMAGES)[0]

    torch.testing.assert_close(same, answers, rtol=1e-4, atol=1e-5)
    assert not torch.equal(same, answers), "folding did something"
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        apart = (found[name] - gradient).norm() / gradient.norm()
        assert apart < 1e-3, (name, apart)


def test_the_network_is_what_it_was_after_a_step_even_one_that_fails() -> None:
    model = network()
    folds, _ = find_folds(model, IMAGES, CPU, None)
    before, names = model(IMAGES)[0], set(model.state_dict())
    with pytest.raises(ZeroDivisionError), folded(model, folds):
        raise ZeroDivisionError
    assert torch.equal(model(IMAGES)[0], before)
    assert set(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_convolution_with_a_bias_is_folded_with_it() -> None:
    model = small(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    folds, _ = find_folds(model, IMAGES, CPU, None)
    assert folds == (Fold("0", "1"),)
    expected = gradients(model)
    with folded(model, folds):
        found = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((nn.Conv2d(1, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)), "none follows a convolution"),
        ((nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, affine=False)), "none follows a convolution"),
        ((nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8)), "none follows a convolution"),
        # What comes in is the convolution's own tensor, with other numbers in it.
        ((nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(8)), "features would differ"),
    ],
)
def test_what_cannot_be_folded_is_left_with_the_reason(
    layers: tuple[nn.Module, ...], reason: str
) -> None:
    folds, why = find_folds(small(*layers), IMAGES, CPU, None)
    assert folds == ()
    assert why.startswith(f"BatchNorm is not folded: {reason}")


def test_stages_that_are_skipped_are_left_alone() -> None:
    model = network()
    cut = Cut("blocks.0", ("conv_stem", "bn1", "blocks.0"))
    folds, _ = find_folds(model, IMAGES, CPU, cut)
    every, _ = find_folds(model, IMAGES, CPU, None)
    left_out = [fold for fold in every if fold not in folds]
    assert left_out
    assert all(name.startswith(cut.skipped) for fold in left_out for name in fold)
    assert not any(name.startswith(cut.skipped) for fold in folds for name in fold)


def test_mixed_precision_is_left_as_it_is() -> None:
    folds, why = find_folds(network(), IMAGES, CPU._replace(precision=torch.bfloat16), None)
    assert (folds, why.partition(":")[0]) == ((), "BatchNorm is not folded")
