"""The adversarial objectives against hand-computed gradients, NumPy and each other, on one tiny
network and a batch of both domains."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.preprocess import InputSpec
from runtime.recipe import Adversarial, AdversarialSettings
from train.adversarial import (
    DomainAdversarial,
    MultilinearMap,
    certainty,
    class_confusion,
    distrust,
    make_objective,
    ramp,
    reverse,
)
from train.model import ImageClassifier
from train.objective import SOURCE, TARGET, Batch, Objective, TaskLoss

FEATURES, CLASSES = 6, 3
METHODS: tuple[Adversarial, ...] = ("dann", "cdan", "mcc")


def tiny_model() -> ImageClassifier:
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, FEATURES), nn.Tanh())
    model = ImageClassifier(backbone, FEATURES, CLASSES, InputSpec(size=(32, 32), channels=1))
    nn.init.normal_(model.head.weight)
    return model.eval()


def batch(labels: tuple[int, ...] = (0, 1, 2, -1, -1)) -> Batch:
    """Three source images, then target images that are darker."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (len(labels), 4, 4, 1), generator=generator)
    images[3:] //= 3
    return Batch(
        images=images.to(torch.uint8),
        labels=torch.tensor(labels),
        domains=torch.tensor([SOURCE] * 3 + [TARGET] * (len(labels) - 3)),
        weights=torch.ones(len(labels)),
        teacher=torch.randn(len(labels), CLASSES, generator=generator),
    )


def objective(method: Adversarial, *, weight: float = 1.0, dropout: float = 0.0) -> Objective:
    settings = AdversarialSettings(method=method, max_weight=weight, dropout=dropout, hidden=8)
    return make_objective(tiny_model(), settings, keep_answers=0.5)


def gradients(chosen: Objective, given: Batch, progress: float = 1.0) -> dict[str, Tensor]:
    """Of the model's parameters, by name."""
    loss, _ = chosen(given, progress)
    loss.backward()
    return {n: p.grad for n, p in chosen.model.named_parameters() if p.grad is not None}


def test_reversed_gradient_is_minus_weight_times_the_usual() -> None:
    usual = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    turned = usual.detach().clone().requires_grad_()
    torch.autograd.backward(usual.pow(3).sum())
    out = reverse(turned, 0.25)
    assert torch.equal(out, turned)
    torch.autograd.backward(out.pow(3).sum())
    assert usual.grad is not None
    assert turned.grad is not None
    torch.testing.assert_close(turned.grad, -0.25 * usual.grad)


def test_ramp_starts_at_nothing_and_ends_at_its_weight() -> None:
    assert ramp(0.0, 0.3) == 0.0
    assert ramp(1.0, 0.3) == pytest.approx(0.3, rel=1e-4)
    assert ramp(0.1, 1.0) == pytest.approx((1 - math.exp(-1)) / (1 + math.exp(-1)))
    values = [ramp(step / 20, 1.0) for step in range(21)]
    assert values == sorted(values)


def test_dann_gives_the_features_the_task_gradient_minus_that_of_the_discriminator() -> None:
    given, dann = batch(), objective("dann")
    assert isinstance(dann, DomainAdversarial)
    found = gradients(dann, given, progress=0.1)

    model = tiny_model()
    logits, features = model(given.images)
    task, _ = TaskLoss(model, keep_answers=0.5).losses(logits, given)
    told = dann.discriminator(features, drop=False)
    # By hand: each domain's mean of -log of what was said of the truth, and of both the mean.
    source = -F.logsigmoid(-told[:3]).mean()
    target = -F.logsigmoid(told[3:]).mean()
    weight = ramp(0.1, 1.0)
    torch.autograd.backward(task - weight * (source + target) / 2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("method", METHODS)
def test_with_weight_0_the_model_learns_exactly_the_task(method: Adversarial) -> None:
    given = batch()
    found = gradients(objective(method, weight=0.0, dropout=0.5), given)
    expected = gradients(TaskLoss(tiny_model(), keep_answers=0.5), given)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("method", METHODS)
def test_with_weight_1_the_model_learns_something_else(method: Adversarial) -> None:
    found = gradients(objective(method), batch())
    expected = gradients(TaskLoss(tiny_model(), keep_answers=0.5), batch())
    name = "backbone.1.weight"
    assert not torch.allclose(found[name], expected[name], rtol=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_through_the_network_per_step(method: Adversarial) -> None:
    chosen, passes = objective(method), []
    chosen.model.backbone.register_forward_hook(lambda *_: passes.append(1))
    chosen(batch(), 0.5)
    assert len(passes) == 1


@pytest.mark.parametrize("method", METHODS)
def test_only_known_labels_give_a_task_loss(method: Adversarial) -> None:
    chosen = objective(method)
    none = chosen(batch((0, 1, 2, -1, -1)), 0.5)[1]["task"]
    one = chosen(batch((0, 1, 2, -1, 2)), 0.5)[1]["task"]
    logits, _ = chosen.model(batch().images)
    source = F.cross_entropy(logits[:3], torch.tensor([0, 1, 2]))
    target = F.cross_entropy(logits[4:], torch.tensor([2]))
    torch.testing.assert_close(none, source.detach())
    torch.testing.assert_close(one, (source + target).detach() / 2)


def test_parts_name_what_the_loop_shows() -> None:
    keep = {"task", "kept answers", "weight"}
    loss, parts = objective("dann")(batch(), 1.0)
    assert parts.keys() == keep | {"domain loss", "discriminator accuracy"}
    torch.testing.assert_close(
        loss.detach(), parts["task"] + 0.5 * parts["kept answers"] + parts["domain loss"]
    )
    loss, parts = objective("mcc", weight=0.1)(batch(), 1.0)
    assert parts.keys() == keep | {"class confusion"}
    assert parts["weight"] == pytest.approx(0.1, rel=1e-4)
    torch.testing.assert_close(
        loss.detach(),
        parts["task"] + 0.5 * parts["kept answers"] + parts["weight"] * parts["class confusion"],
    )


def test_discriminator_accuracy_is_balanced_over_the_domains() -> None:
    chosen = objective("dann")
    assert isinstance(chosen, DomainAdversarial)
    nn.init.zeros_(chosen.discriminator.out.weight)
    nn.init.ones_(chosen.discriminator.out.bias)  # it calls everything the target: 2 of 5
    assert chosen(batch(), 0.5)[1]["discriminator accuracy"] == 0.5


def test_dropout_of_the_discriminator_acts_in_eval_mode_and_follows_the_seed_of_the_step() -> None:
    chosen = objective("dann", dropout=0.5).eval()

    def domain_loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(chosen(batch(), 1.0)[1]["domain loss"])

    assert domain_loss(1) == domain_loss(1)
    assert domain_loss(1) != domain_loss(2)
    drawn = [chosen(batch(), 1.0)[1]["discriminator accuracy"] for _ in range(5)]
    assert drawn == drawn[:1] * 5  # what is shown is not blurred by dropout


def test_extra_parameters_are_the_discriminator_and_the_seed_draws_them() -> None:
    def drawn(method: Adversarial, seed: int) -> dict[str, nn.Parameter]:
        chosen = make_objective(tiny_model(), AdversarialSettings(method=method), seed=seed)
        extra = dict(chosen.extra_parameters())
        every, model = dict(chosen.named_parameters()), dict(chosen.model.named_parameters())
        assert extra.keys() == {n for n in every if n.removeprefix("model.") not in model}
        return extra

    assert drawn("mcc", 0) == {}
    for method in METHODS[:2]:
        one, same, other = drawn(method, 0), drawn(method, 0), drawn(method, 1)
        name = "discriminator.hidden.weight"
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])


def test_the_discriminator_learns_while_the_features_move_together() -> None:
    chosen = objective("dann")
    assert isinstance(chosen, DomainAdversarial)
    images = batch((-1,) * 6)  # nothing but the domains to learn from
    images = images._replace(teacher=torch.full_like(images.teacher, torch.nan))

    def gap() -> float:
        features = chosen.model.extract(images.images).detach()
        return float((features[:3].mean(dim=0) - features[3:].mean(dim=0)).norm())

    def train(parameters: list[nn.Parameter], rate: float) -> list[Tensor]:
        optimizer, losses = torch.optim.SGD(parameters, lr=rate), []
        for _ in range(60):
            loss, parts = chosen(images, 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(parts["domain loss"])
        return losses

    start, discriminator = gap(), [p for _, p in chosen.extra_parameters()]
    alone = train(discriminator, 0.1)
    assert alone[-1] < 0.35 < 0.7 < alone[0]
    assert chosen(images, 1.0)[1]["discriminator accuracy"] == 1.0
    assert gap() == start
    both = train([*discriminator, *chosen.model.backbone.parameters()], 0.005)
    assert gap() < 0.85 * start
    assert both[-1] > 1.3 * alone[-1]


def test_multilinear_map_is_the_outer_product() -> None:
    features, probabilities = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25, 0.25]])
    outer = MultilinearMap(2, 3, seed=0)
    assert outer.width == 6
    assert outer(features, probabilities).tolist() == [[0.5, 0.25, 0.25, 1.0, 0.5, 0.5]]


def test_a_wide_multilinear_map_is_projected_and_keeps_inner_products() -> None:
    projected = MultilinearMap(500, 10, seed=0)
    assert projected.width == 1024
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(2, 500, generator=generator)
    probabilities = torch.rand(2, 10, generator=generator).softmax(dim=1)
    one, other = projected(features, probabilities)
    expected = (features[0] @ features[1]) * (probabilities[0] @ probabilities[1])
    # Its standard error is about sqrt(3 / 1024) of the norms' product: 5 %.
    assert float(one @ other) == pytest.approx(float(expected), rel=0.2)
    again = MultilinearMap(500, 10, seed=0)
    assert torch.equal(again(features, probabilities)[0], one)


def test_cdan_counts_images_by_certainty_and_gives_the_head_no_domain_gradient() -> None:
    given, cdan = batch(), objective("cdan")
    assert isinstance(cdan, DomainAdversarial)
    assert cdan.multilinear is not None
    found = gradients(cdan, given)
    task = gradients(TaskLoss(tiny_model(), keep_answers=0.5), given)
    torch.testing.assert_close(found["head.weight"], task["head.weight"])

    logits, features = cdan.model(given.images)
    probabilities = logits.softmax(dim=1)
    told = cdan.discriminator(cdan.multilinear(features, probabilities), drop=False)
    counts = 1 + (probabilities * probabilities.log()).sum(dim=1).exp()
    source = (counts * -F.logsigmoid(-told))[:3].sum() / counts[:3].sum()
    target = (counts * -F.logsigmoid(told))[3:].sum() / counts[3:].sum()
    shown = cdan(given, 1.0)[1]["domain loss"]
    torch.testing.assert_close(shown, (source + target).detach() / 2)


def test_certainty_is_2_for_a_sure_answer_and_lowest_at_chance() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [1 / 3] * 3])
    torch.testing.assert_close(certainty(rows), torch.tensor([2.0, 1 + 1 / 3]))


def reference_confusion(logits: npt.NDArray[np.float64], temperature: float) -> float:
    """Jin et al. 2020, equations 3 to 7, term by term."""
    count, classes = logits.shape
    scaled = np.exp(logits / temperature)
    y = scaled / scaled.sum(axis=1, keepdims=True)
    entropy = [-sum(p * math.log(p) for p in row) for row in y]
    total = sum(1 + math.exp(-h) for h in entropy)
    w = [count * (1 + math.exp(-h)) / total for h in entropy]
    confusion = np.zeros((classes, classes))
    for j in range(classes):
        for k in range(classes):
            confusion[j, k] = sum(y[i, j] * w[i] * y[i, k] for i in range(count))
    loss = 0.0
    for j in range(classes):
        row = confusion[j].sum()
        loss += sum(confusion[j, k] / row for k in range(classes) if k != j)
    return float(loss / classes)


def test_class_confusion_is_that_of_the_paper_and_of_the_target_only() -> None:
    logits = np.random.default_rng(0).normal(size=(7, CLASSES)) * 3
    counts = torch.tensor([0.0, 1, 1, 0, 1, 1, 1])
    found = class_confusion(torch.from_numpy(logits), counts, 2.5)
    expected = reference_confusion(logits[counts.numpy() > 0], 2.5)
    assert float(found) == pytest.approx(expected, rel=1e-12)

    chosen = objective("mcc")
    answers = chosen.model(batch().images)[0][3:].detach().double().numpy()
    shown = float(chosen(batch(), 1.0)[1]["class confusion"])
    assert shown == pytest.approx(reference_confusion(answers, 2.5), rel=1e-5)


def test_class_confusion_without_field_images_is_0() -> None:
    assert float(class_confusion(torch.randn(4, 3), torch.zeros(4), 2.5)) == 0.0


@pytest.mark.parametrize(
    ("accuracy", "reason"),
    [
        (0.7, None),
        (0.5, None),
        (0.9, None),
        (1.0, "accuracy 1.00 in the last epoch, above 0.9: the domains' features did not mix"),
        (0.05, "accuracy 0.05 in the last epoch, below 0.5: the discriminator was overrun"),
    ],
)
def test_runs_are_distrusted_by_the_discriminators_last_epoch(
    accuracy: float, reason: str | None
) -> None:
    found = distrust(accuracy)
    assert (found is None) == (reason is None)
    assert reason is None or (found is not None and reason in found)
