"""The training loop: what it draws, what it moves, what it keeps, and that it can be stopped."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from runtime.errors import RecipeError
from runtime.recipe import AdversarialSettings, Augmentation, ModelSettings, TrainSettings
from tests.tiny_training import CPU, FREEZE, SPEC, Seen, groups, network, pictures, train
from train.adversarial import make_objective
from train.batches import Pictures, Shared, Steps, load, move, to_batch, variants
from train.finetune import History, plan_course
from train.model import ImageClassifier, build_model
from train.objective import SOURCE, Objective, TaskLoss
from train.optimize import rate_at
from train.resume import State

ALL_KINDS: tuple[Augmentation, ...] = ("flip-horizontal", "flip-vertical", "rotate-90")
ROOT = Path(__file__).resolve().parent.parent


def adversary(model: ImageClassifier) -> Objective:
    return make_objective(model, AdversarialSettings(hidden=8, max_weight=1.0), keep_answers=0.5)


def steps_of(count: int, **changes: Any) -> Steps:
    pixels, _ = pictures(count)
    settings: dict[str, Any] = {"augment": (), "degrade": 0.0, "seed": 1, "classes": 2}
    return Steps(groups(count), Pictures(pixels), square=True, **{**settings, **changes})


def test_every_step_has_its_share_of_each_group_and_no_image_is_seen_twice_as_often() -> None:
    steps = steps_of(24)
    seen: Counter[bytes] = Counter()
    for step in range(16):
        drawn = steps[step]
        assert drawn.domains.tolist() == [0] * 4 + [1] * 3
        assert torch.isfinite(drawn.teacher).all(dim=1).tolist() == [True] * 4 + [False] * 3
        seen.update(image.numpy().tobytes() for image in drawn.images)
    # 16 steps: 64 draws of 16 source images, 48 of 8 from the field.
    assert sorted(seen.values()) == [4] * 16 + [6] * 8


def test_a_share_larger_than_its_group_goes_round_it_more_than_once() -> None:
    data = groups(6, shares=(4, 5))  # of the field there are two images
    steps = Steps(
        data, Pictures(pictures(6)[0]), augment=(), degrade=0.0, seed=0, classes=2, square=True
    )
    field = steps[0].images[4:]
    assert Counter(i.numpy().tobytes() for i in field).most_common(2)[0][1] == 3


def test_a_step_is_a_function_of_seed_and_number_in_any_order_and_process() -> None:
    steps = steps_of(24, augment=ALL_KINDS, degrade=0.5)
    ahead = list(load(steps, 0, 4, CPU))
    for number in (3, 0, 2):
        for one, other in zip(steps[number], ahead[number], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    other_seed = steps_of(24, augment=ALL_KINDS, degrade=0.5, seed=2)
    assert not torch.equal(steps[0].images, other_seed[0].images)
    assert not torch.equal(steps[0].moves, steps[1].moves)


def test_a_memory_map_goes_to_another_process_as_its_name(tmp_path: Path) -> None:
    import pickle

    np.save(tmp_path / "a.npy", np.arange(60_000, dtype=np.uint8).reshape(600, 10, 10, 1))
    shared = Shared(np.load(tmp_path / "a.npy", mmap_mode="r"))
    sent = pickle.dumps(shared)
    assert len(sent) < 1000
    at = np.array([5, 2])
    np.testing.assert_array_equal(pickle.loads(sent)[at], shared[at])


def test_augmentation_moves_pixels_and_invents_none() -> None:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (64, 8, 8, 1), dtype=np.uint8))
    moves = torch.from_numpy(random.integers(0, [2, 2, 4], (64, 3)))
    moved = move(images, ALL_KINDS, moves)
    assert moved.dtype == torch.uint8
    for one, other, (across, down, quarters) in zip(images, moved, moves.tolist(), strict=True):
        expected = one.numpy()[:, ::-1] if across else one.numpy()
        expected = expected[::-1] if down else expected
        np.testing.assert_array_equal(other.numpy(), np.rot90(expected, quarters))


@pytest.mark.parametrize(
    ("kinds", "square", "count"),
    [
        ((), True, 1), (("flip-vertical",), True, 2), (("rotate-90",), True, 4),
        (ALL_KINDS[:2], True, 4), (ALL_KINDS, True, 8), (ALL_KINDS, False, 4),
    ],
)  # fmt: skip
def test_augmentation_makes_a_known_number_of_different_pictures(
    kinds: tuple[Augmentation, ...], square: bool, count: int
) -> None:
    rows, numbers = variants(kinds, square=square)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 6, 6, 1), np.uint8))
    made = {move(image, kinds, torch.from_numpy(row[None])).numpy().tobytes() for row in rows}
    assert len(made) == len(rows) == count
    for moves, number in numbers.items():
        other = torch.from_numpy(np.frombuffer(moves, np.int64)[None].copy())
        same = torch.from_numpy(rows[number][None])
        assert torch.equal(move(image, kinds, other), move(image, kinds, same))


def test_field_photos_are_made_of_a_share_of_the_source_only() -> None:
    plain, worse = steps_of(24), steps_of(24, degrade=0.5)
    changed = []
    for step in range(12):
        before, after = (to_batch(s[step], s, CPU) for s in (plain, worse))
        differs = (before.images != after.images).flatten(1).any(dim=1)
        assert not differs[before.domains != SOURCE].any()
        changed.append(differs[before.domains == SOURCE])
    assert 0.3 < torch.cat(changed).float().mean() < 0.7
    again = to_batch(worse[3], worse, CPU)
    assert torch.equal(to_batch(worse[3], worse, CPU).images, again.images)


def test_the_course_is_a_pass_over_the_largest_labelled_group() -> None:
    data = groups(24)  # 16 source images, 4 of them in each step; 8 of the field, 3 in each
    assert plan_course(data, 3, 1) == (12, 4)
    assert plan_course(data, 3, 20) == (20, 7), "few images make longer epochs, not more"
    unlabelled = data[0]._replace(labels=np.full(16, -1))
    assert plan_course([unlabelled, data[1]], 3, 1) == (9, 3)


def test_the_rate_warms_up_and_decays() -> None:
    rates = [rate_at(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert np.argmax(rates) in (9, 10)
    assert rates[-1] < 0.01


def test_training_learns_and_keeps_statistics_and_frozen_weights(tmp_path: Path) -> None:
    start = network().state_dict()
    seen = Seen()
    objective, history = train(
        tmp_path, seen, make=TaskLoss,
        schedule={"learning_rate": 1e-3, "head_learning_rate": 1e-3, "epochs": 4},
    )  # fmt: skip
    pixels, labels = pictures(24)
    logits, _ = objective.model(torch.from_numpy(pixels))
    assert (logits.argmax(1).numpy() == labels).mean() > 0.9
    assert [e.epoch for e in seen.epochs] == [1, 2, 3, 4]
    assert list(history.epochs) == seen.epochs
    assert history.epochs[-1].loss == pytest.approx(np.mean(seen.losses[-4:]))
    assert history.epochs[-1].parts["task"] == pytest.approx(history.epochs[-1].loss)
    for name, tensor in objective.model.state_dict().items():
        frozen = any(name.startswith(f"backbone.{module}.") for module in FREEZE)
        if "running" in name or "tracked" in name or frozen:
            assert torch.equal(tensor, start[name]), name


def test_only_what_is_to_be_tuned_moves_and_freeze_has_the_last_word(tmp_path: Path) -> None:
    start = network().state_dict()
    objective, _ = train(
        tmp_path, tune=("blocks.5", "conv_head"), settings={"freeze": ("blocks.5.0",)}
    )
    moved = {n for n, t in objective.model.state_dict().items() if not torch.equal(t, start[n])}
    assert {n.split(".")[0] for n in moved} == {"head", "backbone"}
    body = {n.removeprefix("backbone.") for n in moved if n.startswith("backbone.")}
    assert {n.partition(".")[0] for n in body} == {"blocks", "conv_head"}
    assert {n.split(".")[1] for n in body if n.startswith("blocks")} == {"5"}
    assert not any(n.startswith("blocks.5.0.") for n in body)


@pytest.mark.parametrize(
    ("changes", "table"),
    [({"tune": ("blocks.99",)}, "tune"), ({"settings": {"freeze": ("stem",)}}, "freeze")],
)
def test_a_module_that_the_network_lacks_is_named_with_those_it_has(
    tmp_path: Path, changes: dict[str, Any], table: str
) -> None:
    with pytest.raises(RecipeError, match=rf"{table}: no module .* has: .*conv_stem"):
        train(tmp_path, **changes)


def scores(*values: float) -> Callable[[ImageClassifier], float]:
    left = iter(values)
    return lambda model: next(left)


def test_the_best_epoch_is_kept_and_patience_ends_the_training(tmp_path: Path) -> None:
    weights = []

    def validate(model: ImageClassifier) -> float:
        weights.append(model.head.weight.detach().clone())
        return [0.5, 0.6, 0.9, 0.8, 0.7][len(weights) - 1]

    objective, history = train(tmp_path, validate=validate, schedule={"epochs": 9, "patience": 2})
    assert history.kept_epoch == 2
    assert (history.start_score, len(history.epochs)) == (0.5, 4)
    assert (history.steps, history.planned_steps) == (16, 36)
    assert history.reason == "no better score in 2 epochs; epoch 2 is kept, it scored best"
    assert torch.equal(objective.model.head.weight, weights[2])


def test_the_start_is_kept_if_no_epoch_is_better(tmp_path: Path) -> None:
    objective, history = train(tmp_path, validate=scores(0.9, 0.9, 0.8))
    assert history.kept_epoch == 0
    assert history.reason == "all 8 steps are done; the start is kept, no epoch scored better"
    for name, tensor in network().state_dict().items():
        assert torch.equal(objective.model.state_dict()[name], tensor), name


def test_a_handicapped_start_must_be_ahead_by_more_than_that(tmp_path: Path) -> None:
    for handicap, kept in [(0.02, 0), (0.04, 2)]:
        _, history = train(tmp_path, validate=scores(0.93, 0.88, 0.9), start_handicap=handicap)
        assert (history.start_score, history.kept_epoch) == (0.93, kept)


@pytest.mark.parametrize("validate", [None, lambda model: float("nan")])
def test_the_last_epoch_is_kept_where_nothing_can_tell(
    tmp_path: Path, validate: Callable[[ImageClassifier], float] | None
) -> None:
    objective, history = train(tmp_path, validate=validate, schedule={"patience": 1})
    assert (history.kept_epoch, history.steps, history.start_score) == (2, 8, None)
    assert not torch.equal(objective.model.head.weight, network().head.weight)
    back = msgspec.json.decode(msgspec.json.encode(history), type=History)
    assert back == history


@pytest.mark.parametrize("at", [2, 4, 5])
@pytest.mark.parametrize("make", [TaskLoss, adversary])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    tmp_path: Path, at: int, make: Callable[[ImageClassifier], Objective]
) -> None:
    """With the discriminator, its optimizer and its dropout, if there is one."""
    steps = Seen()
    whole, history = train(tmp_path / "whole", steps, make=make, validate=scores(3, 1, 2))

    def interrupt(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)

    first, second = Seen(interrupt), Seen()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", first, make=make, validate=scores(3, 1))
    left = scores(*([1, 2] if at < 4 else [2]))
    resumed, after = train(tmp_path / "parts", second, make=make, validate=left)
    assert second.resumed_at == at
    assert first.steps + second.steps == list(range(1, 9))
    assert first.losses + second.losses == steps.losses
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    assert [(e.loss, e.score, e.parts) for e in after.epochs] == [
        (e.loss, e.score, e.parts) for e in history.epochs
    ]
    assert after.reason == history.reason


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """kill -9 in a process of its own, in the step after a state was saved."""
    code = f"""
import os, signal
from pathlib import Path
from tests.test_finetune import adversary
from tests.tiny_training import Seen, train
die = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 6 else None
train(Path({str(tmp_path / "parts")!r}), Seen(die), make=adversary, save_every_s=0.0)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    seen = Seen()
    resumed, _ = train(tmp_path / "parts", seen, make=adversary)
    assert seen.steps == [6, 7, 8]
    whole, _ = train(tmp_path / "whole", make=adversary)
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_patience_is_not_forgotten_over_an_interruption(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    schedule = {"epochs": 5, "patience": 2}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Seen(interrupt), validate=scores(2, 1, 1), schedule=schedule)
    seen = Seen()
    _, history = train(tmp_path, seen, validate=scores(), schedule=schedule)
    assert seen.steps == []
    assert (
        history.reason == "no better score in 2 epochs; the start is kept, no epoch scored better"
    )


def test_a_state_of_another_run_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Seen(interrupt))
    other = Seen()
    train(tmp_path, other, key="another recipe")
    assert other.resumed_at is None
    (tmp_path / "resume.safetensors").write_bytes(b"\x00" * 100)
    damaged = Seen()
    train(tmp_path, damaged)
    assert damaged.resumed_at is None


def test_a_loss_scaler_survives_its_record() -> None:
    """Half precision on older GPUs: the interval must come back as the integer it was."""
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    state = State(key="k", scaler=scaler.state_dict())
    back = msgspec.json.decode(msgspec.json.encode(state), type=State)
    assert back.scaler == scaler.state_dict()
    assert isinstance(back.scaler["growth_interval"], int)


def test_a_diverging_training_stops_with_the_way_out(tmp_path: Path) -> None:
    poisoned = groups(24)
    poisoned[1].weights[5] = np.inf
    with pytest.raises(RecipeError, match=r"diverged at step \d+ of 8 .*lower it"):
        train(tmp_path, data=poisoned)


def test_the_discriminator_learns_at_its_own_rate(tmp_path: Path) -> None:
    start = adversary(network())
    still, _ = train(tmp_path / "still", make=adversary, extra_rate=1e-12)
    moved, history = train(tmp_path / "moved", make=adversary, extra_rate=1e-2)
    before = dict(start.extra_parameters())
    for name, parameter in still.extra_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6)
    assert any(not torch.allclose(p, before[n], atol=1e-3) for n, p in moved.extra_parameters())
    assert 0 <= history.epochs[-1].parts["discriminator accuracy"] <= 1


@pytest.mark.slow
def test_without_a_compiler_training_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    def loss(_: ImageClassifier) -> TaskLoss:
        torch.manual_seed(0)
        settings = ModelSettings(architecture="test_resnet", weights="random")
        return TaskLoss(build_model(settings, SPEC, 2))

    monkeypatch.setattr(config.cpp, "cxx", ("/no/such/compiler",))
    plain, _ = train(tmp_path / "plain", make=loss, settings={"freeze": ()})
    settings: dict[str, Any] = {"freeze": (), "compile": True}
    other, history = train(tmp_path / "other", make=loss, settings=settings)
    assert any("compile: going on without" in note for note in history.notes), history.notes
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    assert TrainSettings().compile is False
