"""What benchmarks of training make of times and accuracies, and that their forms really train.

No test here measures time.
"""

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from benchmarks import adaptation, dann, dann_step, harness, training
from benchmarks.dann_step import Form
from benchmarks.training import Speeds
from tests.tiny_training import CPU, pictures
from train import model as model_module
from train.model import ImageClassifier

BATCH = 4


def times(*seconds: float) -> harness.Times:
    return harness.Times(cpu=list(seconds), wall=[2 * one for one in seconds])


@pytest.fixture
def material(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Six tiny images of each domain under the recipe's settings."""
    monkeypatch.setattr(training, "BATCH", BATCH)
    monkeypatch.setattr(dann_step, "BATCH", BATCH)
    recipe = training.make_recipe(10)
    recipe = msgspec.structs.replace(
        recipe, input=msgspec.structs.replace(recipe.input, size=(32, 32))
    )
    pixels, labels = pictures(12)
    rows = {"source": np.arange(6), "target": np.arange(6, 12)}
    return SimpleNamespace(
        recipe=recipe, pixels=pixels, labels=labels, classes=2, device=CPU,
        rows=lambda domain, split: rows[domain],
    )  # fmt: skip


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[ImageClassifier]:
    """Every network that is built."""
    built: list[ImageClassifier] = []
    build = model_module.build_model

    def remember(*given: Any) -> ImageClassifier:
        built.append(build(*given))
        return built[-1]

    monkeypatch.setattr(model_module, "build_model", remember)
    return built


def moved(network: ImageClassifier, start: dict[str, torch.Tensor]) -> set[str]:
    """Names of the network's parts that are not as they were."""
    return {n for n, t in network.state_dict().items() if not torch.equal(t, start[n])}


def state(network: ImageClassifier) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("way", [dann_step.TWO, dann_step.THREE, dann_step.TUTORIAL])
def test_a_tutorial_of_dann_trains_what_ours_trains(
    way: str, material: Any, networks: list[ImageClassifier]
) -> None:
    theirs = dann_step.tutorial(way, material)
    ours = training.make_stepper(material, kept=False, method="dann")
    starts = [state(network) for network in networks]

    for _ in range(2):  # the head starts at zero, so that the first step reaches no other layer
        theirs()
        ours()

    tutorial, own = (moved(n, s) for n, s in zip(networks, starts, strict=True))
    assert tutorial == own
    assert "backbone.blocks.2.0.conv_pw.weight" in own
    assert not any(name.startswith(("backbone.conv_stem", "backbone.blocks.1.")) for name in own)
    assert not any("running" in name for name in own)


def test_the_plain_loop_trains_what_ours_trains(
    material: Any, networks: list[ImageClassifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    def few(candidates: Any, **settings: Any) -> Any:
        starts = [state(network) for network in networks]
        for name in candidates:
            candidates[name]()
            candidates[name]()
        parts = [moved(n, s) for n, s in zip(networks, starts, strict=True)]
        found.update(zip(candidates, parts, strict=True))
        return {name: times(1.0) for name in candidates}

    found: dict[str, set[str]] = {}
    monkeypatch.setattr(training, "interleave", few)
    stepper = training.make_stepper
    monkeypatch.setattr(
        training, "make_stepper", lambda *given, kept, **more: stepper(*given, kept=False, **more)
    )

    training._time_steps(material, 0.0)

    assert found[training.PLAIN] == found[training.COMPUTED]
    assert found[training.COMPUTED] == found["CDAN"] == found["MCC"]
    assert {n for n in found[training.TRAIN_MODE] if "running_mean" in n}


def test_speeds_are_images_a_second_whatever_a_call_goes_through() -> None:
    speeds = Speeds({"slow": times(1.0, 2.0), "fast": times(0.5, 1.0)}, {"slow": 10, "fast": 100})
    assert speeds.rate("slow") == str(harness.spread([5.0, 2.5]))
    assert str(speeds.against("fast", "slow")) == "20.0 (20.0 to 20.0)"


@pytest.mark.parametrize(("seconds", "holds"), [(0.9, True), (1.1, False)])
def test_fine_tuning_is_held_to_the_plain_loop(seconds: float, holds: bool) -> None:
    steps = {training.PLAIN: times(1.0, 10.0), training.COMPUTED: times(seconds, seconds * 10)}
    features = {training.PLAIN_HEAD: times(1.0), training.FURTHER: times(0.1)}

    report = training.report(
        1000, 12.0, 13.0, Speeds(features, {training.PLAIN_HEAD: 48, training.FURTHER: 4800}),
        Speeds(steps, dict.fromkeys(steps, 48)), "CPU",
    )  # fmt: skip

    assert [bar.holds for bar in report.bars] == [False, holds]
    assert report.tables[0].rows[0][1:] == (
        "13.2 (4.56 to 21.8)", "1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)",
    )  # fmt: skip
    assert report.tables[1].rows[1][-1] == "1000 (1000 to 1000)"


def test_on_a_gpu_fine_tuning_is_held_to_batches_that_are_there_already() -> None:
    steps = {
        training.PLAIN: times(1.0), training.COMPUTED: times(0.5), training.READY: times(0.4),
    }  # fmt: skip
    speeds = Speeds(steps, dict.fromkeys(steps, 48))
    features = Speeds({training.PLAIN_HEAD: times(1.0)}, {training.PLAIN_HEAD: 48})

    report = training.report(1000, 1.0, 1.0, features, speeds, "a GPU")

    assert report.bars[1].what.endswith(training.READY)
    assert (report.bars[1].bar, report.bars[1].holds) == ("at least 0.9", False)
    assert "waits for images: 0.200" in report.tables[0].notes[1]


def test_dann_is_held_to_each_tutorial_with_the_same_layers_trained() -> None:
    every, frozen = dann_step.TRAINED
    seconds = {
        # Ours takes 1.5 seconds, a tutorial as many as it makes passes; half with frozen blocks.
        Form(way, trained): max(passes, 1.5) / (1 if trained == every else 2)
        for way, (passes, _) in dann_step.FORWARD.items()
        for trained in dann_step.TRAINED
        if way != dann_step.LIBRARY
    }

    report = dann_step.report({form: times(one, 3.0 * one) for form, one in seconds.items()})

    assert [(bar.what, bar.holds) for bar in report.bars] == [
        (f"ours / {way}, {trained}", holds)
        for way, holds in [
            (dann_step.TUTORIAL, True),
            (dann_step.THREE, True),
            (dann_step.TWO, False),
        ]
        for trained in (every, frozen)
    ]
    last = report.tables[0].rows[-1]
    assert last[:4] == (dann_step.TUTORIAL, frozen, "4", "96")
    assert last[5:] == ("0.750 (0.750 to 0.750)", "0.375 (0.375 to 0.375)")
    assert "pytorch-adapt was not measured: pip install" in report.tables[0].notes[-1]


def test_gains_of_adaptation_are_taken_seed_by_seed_and_held_to_the_bars() -> None:
    accuracies = {
        dann.Run(shift, seed, method, 0): 0.5 + 0.1 * seed + better
        for shift, gain in zip(dann.SHIFTS, (0.09, 0.07), strict=True)
        for method, better in zip(dann.METHODS, (0.0, gain, 0.2), strict=True)
        for seed in range(3)
    }

    report = dann.report(accuracies)

    photographs, small = dann.SHIFTS
    assert report.tables[0].rows[1] == (
        photographs, "DANN", "69.0 ± 10.0", "9.0 ± 0.0", "+9.0, +9.0, +9.0",
    )  # fmt: skip
    assert [(bar.what, bar.value, bar.holds) for bar in report.bars] == [
        (f"{photographs}, DANN: mean gain in points", "9.00", True),
        (f"{photographs}, CDAN: mean gain in points", "20.0", True),
        (f"{small}, DANN: mean gain in points", "7.00", False),
        (f"{small}, CDAN: mean gain in points", "20.0", True),
    ]


@pytest.mark.parametrize(
    ("values", "at_most", "holds"),
    [((0.9, 0.7), False, True), ((0.9, 0.69), False, False), ((0.9, 0.69), True, True)],
)
def test_the_mean_of_the_seeds_is_held_to_the_bar(
    values: tuple[float, ...], at_most: bool, holds: bool
) -> None:
    bar = adaptation._bar("what", 0.8, 0.85, values, at_most=at_most)
    assert bar.holds is holds
    assert bar.bar == f"{'at most' if at_most else 'at least'} 0.8, goal 0.85"
    assert bar.value.endswith(f"({min(values):.3f} to {max(values):.3f})")
