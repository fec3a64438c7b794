"""What a recipe may say, and what a person is told when it does not."""

from pathlib import Path

import pytest

from runtime.errors import RecipeError
from runtime.preprocess import Resize
from runtime.recipe import load_recipe, parse_recipe

LEAST = 'name = "solar"\n[data]\nsource = "elpv"\n'

REFUSED = [
    # missing keys: which table, and an example
    ("", 'the key name is missing; add for example: name = "solar"'),
    ('name = "a"', 'the key data is missing; add for example: [data] with source = "images/clean"'),
    (
        'name = "a"\n[data]\ntarget = "b"',
        '[data] source is missing; add for example: source = "images/clean"; without',
    ),
    # unknown keys: the nearest, the right table, or all
    (LEAST + "[expotr]", "unknown key 'expotr'; did you mean 'export'?"),
    (LEAST + "[source]\nepoch = 1", "[source]: unknown key 'epoch'; did you mean 'epochs'?"),
    ("freeze = []\n" + LEAST, "unknown key 'freeze'; it belongs to [train]"),
    (
        LEAST + "[model]\nxyz = 1",
        "[model]: unknown key 'xyz'; known keys: architecture, weights",
    ),
    (
        LEAST + "[data.splits]\nvalid = 0.1",
        "[data.splits]: unknown key 'valid'; did you mean 'validation'?",
    ),
    # choices, in Literals, lists and enums
    (
        LEAST + '[train]\nstrategy = "dann"',
        "[train.strategy]: 'dann' is not one of: auto, as-is, feature-extraction, coral, "
        "fine-tuning, adversarial",
    ),
    (
        LEAST + '[train]\nstrategy = "finetuning"',
        "[train.strategy]: 'finetuning' is not one of: auto, as-is, feature-extraction, coral, "
        "fine-tuning, adversarial; did you mean 'fine-tuning'?",
    ),
    (
        LEAST + '[train]\naugment = ["flip-vertical", "flip"]',
        "[train.augment[1]]: 'flip' is not one of: flip-horizontal, flip-vertical, rotate-90",
    ),
    (
        LEAST + '[input]\nresize = "squish"',
        "[input.resize]: 'squish' is not one of: squash, center, border; did you mean 'squash'?",
    ),
    (
        LEAST + "[train]\nmetric = 1",
        "[train.metric]: 1 is not one of: auc, balanced-accuracy, accuracy",
    ),
    # limits
    (
        LEAST + "[source]\nlearning_rate = 2.0",
        "[source.learning_rate]: expected a number, above 0 and at most 1, got 2.0",
    ),
    (
        LEAST + "[source]\nlearning_rate = nan",
        "[source.learning_rate]: expected a number, above 0 and at most 1, got nan",
    ),
    ("seed = -1\n" + LEAST, "seed: expected a whole number, at least 0 and at most 2147483648"),
    (
        LEAST + "[input]\nsize = [3, 224]",
        "[input.size[0]]: expected a whole number, at least 16 and at most 4096, got 3",
    ),
    (LEAST + "[input]\nsize = [224]", "[input.size]: expected a list of 2 values, got [224]"),
    (
        LEAST + "[train.head]\nl2 = [1, -1]",
        "[train.head.l2[1]]: expected a number, at least 0, got -1",
    ),
    (
        'name = "a b"\n[data]\nsource = "elpv"',
        "name: expected text, matching ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\\Z, got 'a b'",
    ),
    # types
    (
        LEAST + '[train.fine_tuning]\nbatch = "x"',
        "[train.fine_tuning.batch]: expected a whole number, at least 2 and at most 4096, got 'x'",
    ),
    (
        LEAST + "[source]\nepochs = true",
        "[source.epochs]: expected a whole number, at least 1, got true",
    ),
    (
        LEAST + "[export]\nmax_error_accepted = 2",
        "[export.max_error_accepted]: expected a number, above 0 and below 0.5, got 2",
    ),
    (LEAST + "[input]\nsize = 224", "[input.size]: expected a list of 2 values, got 224"),
    ("train = 1\n" + LEAST, "[train]: expected a table, got 1"),
    (LEAST + "target = 1", "[data.target]: expected text, got 1"),
    (LEAST + "[model.weights]\na = 1", "[model.weights]: expected text, got a table"),
    (LEAST + f"[train]\nfreeze = '{'x' * 99}'", f"expected a list, got '{'x' * 56}..."),
    # what only the whole table can tell
    (LEAST + "[input]\nchannels = 2", "[input]: channels must be 1 (gray) or 3 (RGB), got 2"),
    (LEAST + "[input]\nwindow = [5, 5]", "[input]: window must be [low, high] with low < high"),
    (LEAST + "[data.splits]\ntrain = 0.9", "train + validation + test must be 1, got 1.3"),
    # not TOML
    ("name = ", "not valid TOML"),
]


@pytest.mark.parametrize(("text", "expected"), REFUSED, ids=range(len(REFUSED)))
def test_refused_with_the_way_out(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "solar.toml")
    assert str(caught.value).startswith("solar.toml: ")
    assert expected in str(caught.value)
    assert "`" not in str(caught.value)


def test_a_brought_model_can_do_without_source_images() -> None:
    text = 'name = "a"\n[data]\ntarget = "field"\n[source]\ncheckpoint = "m.safetensors"\n'
    assert parse_recipe(text, "x").data.source is None
    with pytest.raises(RecipeError, match=r"simulated.* is made from source"):
        parse_recipe(text.replace('"field"', '"simulated"'), "x")


def test_the_least_recipe_has_defaults_for_the_rest() -> None:
    recipe = parse_recipe(LEAST, "x")
    assert recipe.build == Path("build/solar")
    assert recipe.input.shape == (224, 224, 3)
    assert recipe.input.resize is Resize.SQUASH
    assert recipe.data.target is None


def test_the_digest_is_of_the_configuration_not_of_the_text() -> None:
    same = parse_recipe("# a remark\nseed = 0\n" + LEAST, "x")
    assert parse_recipe(LEAST, "x").sha256 == same.sha256
    assert parse_recipe("seed = 1\n" + LEAST, "x").sha256 != same.sha256


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipes" / "solar.toml"
    file.parent.mkdir()
    file.write_text(
        'name = "a"\n[data]\nsource = "../clean"\ntarget = "elpv:poly"\n'
        '[model]\nweights = "w.safetensors"\n'
    )
    recipe = load_recipe(file)
    assert recipe.data.source == str(tmp_path / "clean")
    assert recipe.data.target == "elpv:poly"
    assert recipe.model.weights == str(tmp_path / "recipes" / "w.safetensors")


def test_a_missing_recipe_lists_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "solar.toml").write_text(LEAST)
    with pytest.raises(RecipeError, match=r"polar\.toml: no such recipe; .* has: solar\.toml"):
        load_recipe(tmp_path / "polar.toml")


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "a.toml")
