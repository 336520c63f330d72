"""Every recipe trains as its own head says, on a small network, and the head tells what a user needs to know."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
from launching import run_ranks
from test_train import ROOT, TIME_LIMIT, TRAIN, lines

from fcn_dist.model.fcn import FCN
from fcn_dist.recipefile import load_recipe
from fcn_dist.training.deepspeed_config import read_deepspeed_config, resolve
from fcn_dist.training.schedule import parameter_groups

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
TRAINED = [path for path in RECIPES if path.stem != "quickstart"]  # whose command is the script that CI users run
SMALL = ("data.crop=[48,64]", "data.workers=1", "model.width=0.0625", "model.head_width=24", "log.every=1")


def head(path: Path) -> str:
    """The comment at its head."""
    text = path.read_text()
    return re.sub(r"^# ?", "", text[: re.search(r"^[^#]", text, re.M).start()], flags=re.M)  # type: ignore[union-attr]


def options(path: Path) -> dict[str, str]:
    """Of the command in its head, without those that are set."""
    command = re.search(r"^ +(deepspeed .*?)\n\n", head(path).replace("\\\n", ""), re.M | re.S)
    assert command
    words = shlex.split(command[1])
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("--") and word != "--set"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_head_has_the_command_and_says_what_comes_of_it(path: Path) -> None:
    load_recipe(path)
    text = head(path)
    assert path.stem in text and re.search(r"^ +(deepspeed|bash) .*launch/", text, re.M)
    assert re.search(r"score|mean IoU|pixel accuracy", text) and re.search(r"time|hours|\d+ (min|s)\b", text)


def test_the_page_of_recipes_has_each_of_them_and_states_no_score_that_its_head_does_not() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    rows = {
        cells[0].strip("`"): cells[1:]
        for cells in re.findall(r"^\| (`\w+\.yaml`) \| (.+) \| (.+) \| (.+) \|$", page, re.M)
    }
    assert set(rows) == {path.name for path in RECIPES}
    for path in RECIPES:
        _, config, score = rows[path.name]
        text = " ".join(head(path).split())
        assert "measured" in score or score.startswith("aim: ")
        assert score.startswith("aim") == ("Aim:" in text)
        assert score.startswith("measured") == ("measured" not in text)  # heads say what was not
        for figure in re.findall(r"\d[\d.]*", score):
            assert figure in text, f"{path.name}: {figure}"
        if path in TRAINED:
            assert config.strip("`") == options(path)["--deepspeed_config"]
            assert f"--recipe launch/recipes/{path.name}" in page


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_it_trains_with_the_configuration_it_names(path: Path, shards: Path, tmp_path: Path) -> None:
    named = options(path)
    assert named["--recipe"] == f"launch/recipes/{path.name}"
    config = ROOT / named["--deepspeed_config"]
    run = tmp_path / "run"
    command = ["--shards", str(shards), "--output", str(run), "--recipe", str(path), "--deepspeed_config", str(config)]
    settings = [word for value in (*SMALL, "schedule.warmup_steps=0") for word in ("--set", value)]
    run_ranks(TRAIN, [*command, "--steps", "2", *settings], 1, tmp_path, TIME_LIMIT)
    losses = [line["loss"] for line in lines(run, "train")]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    scored = lines(run, "evaluate")[-1]
    assert scored["num_samples"] == 5


def test_the_optimizers_are_those_of_the_systems_they_follow() -> None:
    """Adam as it was first published; momentum with decay of weights alone, biases at twice the rate."""
    found, groups = {}, {}
    for stem in ("fcn_tensorflow", "reference_atonce"):
        recipe = load_recipe(ROOT / "launch" / "recipes" / f"{stem}.yaml")
        config = resolve(read_deepspeed_config(ROOT / "launch" / "recipes" / f"{stem}.json"), recipe, world_size=1)
        found[stem] = config.values["optimizer"]
        assert "gradient_clipping" not in config.values and config.precision == "float32"
        with torch.device("meta"):
            model = FCN(151, recipe.model)
        groups[stem] = [
            (config.learning_rate * group.multiplier, group.decays)
            for group in parameter_groups(model, recipe.schedule)
        ]
    adam, momentum = found.values()
    assert (adam["type"], adam["params"]) == ("Adam", {"lr": 1e-4, "adam_w_mode": False, "torch_adam": True})
    assert (momentum["type"], momentum["params"]) == ("SGD", {"lr": 1e-10, "momentum": 0.99, "weight_decay": 5e-4})
    assert groups["fcn_tensorflow"] == [(1e-4, True), (1e-4, False)] * 2
    assert groups["reference_atonce"] == [(1e-10, True), (2e-10, False)] * 2
