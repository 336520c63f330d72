"""Recipes: what is accepted, what is refused and by which name."""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from fcn_dist.config import Recipe, ScheduleConfig
from fcn_dist.errors import UserError
from fcn_dist.recipefile import load_recipe, recipe_from_dict


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(None) == Recipe()
    assert load_recipe(write(tmp_path / "r.yaml", "")) == Recipe()
    assert load_recipe(write(tmp_path / "r.yaml", "data: {}\n")) == Recipe()
    assert Recipe().schedule.steps == 1000


def test_a_recipe_s_values_reach_their_fields_in_their_types(tmp_path: Path) -> None:
    text = """
    data: {crop: [64, 48], scale: [1, 1.5], score_other: true}
    model: {variant: fcn16s, width: 0.25, head_width: 32, weights: a.pth, weights_convention: caffe}
    schedule: {steps: 7, learning_rate: 1e-3, kind: cosine}
    """
    recipe = load_recipe(write(tmp_path / "r.yaml", text))
    assert recipe.data.crop == (64, 48) and isinstance(recipe.data.crop, tuple)
    assert recipe.data.scale == (1.0, 1.5)
    assert recipe.data.score_other is True
    assert (recipe.model.variant, recipe.model.width, recipe.model.head_width) == ("fcn16s", 0.25, 32)
    assert (recipe.model.weights, recipe.model.weights_convention) == ("a.pth", "caffe")
    # YAML 1.1 reads 1e-3 without a point as text; users write it all the same.
    assert recipe.schedule.learning_rate == 0.001
    assert (recipe.schedule.steps, recipe.schedule.epochs, recipe.schedule.kind) == (7, None, "cosine")
    assert recipe.log == Recipe().log


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "checkpoint: {every: 10, keep: 2}\n")
    overrides = ["checkpoint.every=500", "checkpoint.every=600", "data.crop=[8, 9]", "train.global_batch=null"]
    recipe = load_recipe(path, [*overrides, "schedule.learning_rate=1e-4", "model.weights=x=y.pth"])
    assert (recipe.checkpoint.every, recipe.checkpoint.keep) == (600, 2)
    assert recipe.data.crop == (8, 9)
    assert recipe.train.global_batch is None
    assert recipe.schedule.learning_rate == 0.0001
    assert recipe.model.weights == "x=y.pth"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedul: {steps: 3}", r"r\.yaml: unknown recipe key schedul; did you mean schedule\?"),
        ("schedule: {step: 3}", r"r\.yaml: unknown recipe key schedule\.step; did you mean schedule\.steps\?"),
        ("model: {zzz: 3}", r"r\.yaml: unknown recipe key model\.zzz; known are variant, geometry, backbone"),
        ("data: 5", r"r\.yaml: data is 5; a section of keys is needed"),
        ("data:", r"r\.yaml: data is None; a section of keys is needed"),
        ("- 1", r"r\.yaml: the recipe is \[1\]; a section of keys is needed"),
        ("1: 2", r"unknown recipe key 1"),
        ("data: {crop: [1", r"r\.yaml is not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name_and_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path / "r.yaml", text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.evry=5", r"--set checkpoint\.evry=5: unknown recipe key checkpoint\.evry; did you mean .*every"),
        ("nonsense=5", r"unknown recipe key nonsense"),
        ("data.crop.x=5", r"data\.crop"),
        ("checkpoint.every", r"has no '='"),
        ("data=5", r"--set data=5: data is 5; a section"),
        ("data.crop=[1", r"not YAML"),
        ("=3", r"unknown recipe key"),
    ],
)
def test_an_override_that_cannot_be_is_refused_naming_it(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(None, [override])


def test_an_override_below_a_value_of_the_file_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "data: {crop: [8, 8]}\n")
    with pytest.raises(UserError, match=r"'crop' is a value, not a section"):
        load_recipe(path, ["data.crop.x=5"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint.every", "often"),
        ("checkpoint.every", "1.5"),
        ("checkpoint.every", "true"),
        ("checkpoint.every", "-1"),
        ("checkpoint.keep", "0"),
        ("log.every", "0"),
        ("evaluate.every", "-1"),
        ("data.crop", "256"),
        ("data.crop", "[1, 2, 3]"),
        ("data.crop", "[0, 5]"),
        ("data.scale", "[2, 1]"),
        ("data.scale", "[0, 1]"),
        ("data.scale", "[1, .inf]"),
        ("data.flip", "1.1"),
        ("data.jitter", "1"),
        ("data.score_other", "1"),
        ("data.workers", "-1"),
        ("model.variant", "fcn4s"),
        ("model.backbone", "resnet"),
        ("model.width", "0"),
        ("model.width", "5"),
        ("model.head_width", "0"),
        ("model.dropout", "1"),
        ("model.weights", "5"),
        ("schedule.learning_rate", "fast"),
        ("schedule.learning_rate", "0"),
        ("schedule.learning_rate", ".nan"),
        ("schedule.learning_rate", ".inf"),
        ("schedule.steps", "0"),
        ("schedule.epochs", "0"),
        ("schedule.epochs", ".inf"),
        ("schedule.final_fraction", "1.5"),
        ("schedule.warmup_steps", "-1"),
        ("train.global_batch", "0"),
        ("train.auxiliary", "-0.1"),
        ("train.auxiliary", ".nan"),
        ("train.ema", "0"),
        ("train.ema", "1"),
        ("train.ema", ".nan"),
    ],
)
def test_a_value_of_the_wrong_kind_or_size_is_refused_naming_its_key(key: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(None, [f"{key}={value}"])
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.steps=abc", "schedule.steps is 'abc'; int | None is needed"),
        ("log.every=1.5", "log.every is 1.5; int is needed"),
        ("model.variant=fcn9", "model.variant is 'fcn9'; one of fcn8s, fcn16s, fcn32s is needed"),
        ("data.crop=[1, 2, 3]", "data.crop is [1, 2, 3]; tuple[int, int] is needed"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_with_what_is_needed_and_where_it_stands(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError) as by_option:
        load_recipe(None, ["log.every=5", override, "checkpoint.every=7"])
    assert str(by_option.value) == f"--set {override}: {message}; change it"
    key, _, value = override.partition("=")
    section, _, name = key.partition(".")
    (tmp_path / "recipe.yaml").write_text(f"{section}: {{{name}: {value}}}\n")
    with pytest.raises(UserError) as by_file:
        load_recipe(tmp_path / "recipe.yaml", ["checkpoint.every=7"])
    assert str(by_file.value) == f"{tmp_path}/recipe.yaml: {message}; change it"


def test_null_is_refused_by_name_wherever_a_recipe_of_defaults_cannot_hold_it() -> None:
    """With hints of types as the oracle; among them are some that hold null though they are not null by default."""
    refused = set()
    for name, section in get_type_hints(Recipe).items():
        for key, kind in get_type_hints(section).items():
            try:
                load_recipe(None, [f"{name}.{key}=null"])
            except UserError as error:
                assert f"{name}.{key} is null; a value is needed" in str(error)
                refused.add(f"{name}.{key}")
                assert not re.search("None|Optional", str(kind))
            else:
                assert re.search("None|Optional", str(kind))
    assert {"train.seed", "log.every", "data.crop"} <= refused and "model.weights" not in refused


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml cannot be read \(No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_counts_in_steps_or_in_epochs_and_never_both() -> None:
    assert load_recipe(None, ["schedule.epochs=2.5"]).schedule == ScheduleConfig(epochs=2.5)
    assert load_recipe(None, ["schedule.steps=5"]).schedule == ScheduleConfig(steps=5)
    # Other keys of the section do not take its default length away.
    assert load_recipe(None, ["schedule.kind=constant"]).schedule == ScheduleConfig(steps=1000, kind="constant")
    with pytest.raises(UserError, match=r"schedule\.steps and schedule\.epochs is \(5, 2\.0\); needed: exactly one"):
        load_recipe(None, ["schedule.steps=5", "schedule.epochs=2"])
    with pytest.raises(UserError, match="exactly one of the two"):
        ScheduleConfig()


def test_a_recipe_cannot_be_changed_and_no_two_share_state() -> None:
    recipe = load_recipe(None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.data = recipe.data  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.data.flip = 0.1  # type: ignore[misc]
    assert hash(recipe) == hash(Recipe())


def test_a_recipe_comes_back_equal_from_its_json_form_through_yaml() -> None:
    recipe = load_recipe(None, ["schedule.epochs=3", "data.crop=[7, 8]", "model.head_width=16"])
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(_lists(recipe.as_dict()))), "here") == recipe


def test_building_a_recipe_leaves_the_tree_it_was_given_alone() -> None:
    tree = {"schedule": {"epochs": 2}}
    recipe_from_dict(tree, "here")
    assert tree == {"schedule": {"epochs": 2}}


def _lists(value: object) -> object:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
