"""Which cut of the global batch fits into the memory there is."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from fcn_dist.config import Recipe
from fcn_dist.errors import UserError
from fcn_dist.model import freememory
from fcn_dist.model.fcn import FCN
from fcn_dist.model.freememory import control_groups_leave, free_memory
from fcn_dist.ranks import Rank
from fcn_dist.recipefile import load_recipe
from fcn_dist.training import fit as fitting
from fcn_dist.training.deepspeed_config import DEFAULT, EngineConfig, resolve
from fcn_dist.training.fit import RESERVE, USABLE, at_most, fit, plan_within
from fcn_dist.training.footprint import footprint
from fcn_dist.training.memoryplan import DTYPES, Partition, Weights, held

OUTPUTS = 20
SETTINGS = ["model.width=0.125", "data.crop=[96,96]", "train.global_batch=64", "schedule.learning_rate=0.1"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """A small network, whose steps are rehearsed in a second."""
    return load_recipe(None, SETTINGS)


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> FCN:
    """Its network."""
    return FCN(OUTPUTS, recipe.model)


def needed(config: EngineConfig, recipe: Recipe, model: FCN, images: int) -> float:
    cut = Partition.of(config.values["zero_optimization"], config.precision, config.plan.world_size, accumulates=True)
    return held(Weights.of(model), cut, footprint(recipe, OUTPUTS, DTYPES[config.precision], 0).step(images)).most


@pytest.mark.parametrize(("fits", "accumulation", "micro_batch"), [(16, 2, 16), (15, 3, 11), (5, 7, 5), (1, 32, 1)])
def test_there_are_as_few_micro_batches_as_memory_has_room_for(
    recipe: Recipe, model: FCN, fits: int, accumulation: int, micro_batch: int
) -> None:
    config = resolve(DEFAULT, recipe, 2)
    assert config.automatic
    memory = needed(config, recipe, model, fits) + 1
    plan = plan_within(memory, config, recipe, model)
    assert (plan.global_batch, plan.accumulation, plan.micro_batch) == (64, accumulation, micro_batch)
    assert config.cut(plan).values["gradient_accumulation_steps"] == accumulation
    assert config.cut(plan).values["train_micro_batch_size_per_gpu"] == micro_batch


def test_where_the_whole_batch_fits_nothing_changes_and_little_of_it_needs_no_rehearsal(
    recipe: Recipe, model: FCN, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(DEFAULT, recipe, 2)
    assert plan_within(needed(config, recipe, model, 32) + 1, config, recipe, model) == config.plan
    monkeypatch.setattr(fitting, "footprint", None)
    partition = Partition.of(config.values["zero_optimization"], config.precision, 2)
    assert plan_within(at_most(model, partition, recipe, 32), config, recipe, model) == config.plan


def test_averaged_weights_leave_room_for_fewer_images(recipe: Recipe, model: FCN) -> None:
    config = resolve(DEFAULT, recipe, 2)
    memory = needed(config, recipe, model, 16) + 1
    averaging = replace(recipe, train=replace(recipe.train, ema=0.999))
    assert plan_within(memory, config, averaging, model).micro_batch < 16
    share = 4 * Weights.of(model).all / 2
    assert plan_within(memory + share, config, averaging, model).micro_batch == 16


def test_no_room_for_one_image_is_an_error_with_both_sizes(recipe: Recipe, model: FCN) -> None:
    config = resolve(DEFAULT, recipe, 2)
    with pytest.raises(UserError, match=r"holds .*MB a rank for a micro-batch of one image of 96x96, and 1 MB may be"):
        plan_within(1e6, config, recipe, model)


@pytest.mark.parametrize("backbone", ["vgg16", "vgg19_bn"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_quick_bound_is_above_what_is_held(
    recipe: Recipe, backbone: Literal["vgg16", "vgg19_bn"], precision: str, stage: int
) -> None:
    recipe = replace(recipe, model=replace(recipe.model, backbone=backbone), data=replace(recipe.data, jitter=0.1))
    model = FCN(OUTPUTS, recipe.model)
    partition = Partition(stage, precision, 2, 1000)
    steps = footprint(recipe, OUTPUTS, DTYPES[precision], 0)
    for images in (1, 8, 100):
        bound = at_most(model, partition, recipe, images)
        assert held(Weights.of(model), partition, steps.step(images)).most < bound
    assert bound < 5 * held(Weights.of(model), partition, steps.step(100)).most


def test_only_auto_is_fitted_and_a_share_of_what_is_free_is_used(
    recipe: Recipe, model: FCN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "free_memory", lambda device, rank: 0)
    fixed = resolve(DEFAULT | {"train_micro_batch_size_per_gpu": 64}, recipe, 1)
    assert fit(fixed, recipe, model, Rank()) == (fixed, [])
    config = resolve(DEFAULT, recipe, 1)
    own = sum(parameter.nbytes for parameter in model.parameters())
    free = needed(config, recipe, model, 16) / USABLE["cpu"] + RESERVE["cpu"] - own + 2
    monkeypatch.setattr(fitting, "free_memory", lambda device, rank: int(free))
    fitted, (line,) = fit(config, recipe, model, Rank())
    assert fitted.plan.micro_batch == 16
    assert re.fullmatch(r"a micro-batch of 64 does not fit into the .* that may be used .*: accumulation 4", line)
    assert json.dumps(fitted.values)


@pytest.mark.parametrize(
    ("version", "membership", "names"),
    [
        (2, "0::/job/step", ("memory.max", "memory.current", "inactive_file")),
        (1, "4:memory:/job/step", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_limits_of_control_groups_and_of_those_above_them_count(
    tmp_path: Path, version: int, membership: str, names: tuple[str, str, str]
) -> None:
    (tmp_path / "cgroup").write_text(f"7:cpu:/elsewhere\n{membership}\n")
    root = tmp_path / "fs"
    top = root if version == 2 else root / "memory"
    (top / "job/step").mkdir(parents=True)

    def limited(folder: Path, limit: str, used: int, cached: int) -> None:
        for name, content in zip(names, (limit, used, f"anon 5\n{names[2]} {cached}"), strict=True):
            (folder / (name if name != names[2] else "memory.stat")).write_text(f"{content}\n")

    assert min(control_groups_leave(tmp_path / "cgroup", root)) == freememory.UNLIMITED
    limited(top / "job", "1000", used=400, cached=100)
    assert min(control_groups_leave(tmp_path / "cgroup", root)) == 700
    limited(top / "job/step", "500", used=300, cached=10)
    assert min(control_groups_leave(tmp_path / "cgroup", root)) == 210
    if version == 2:
        limited(top / "job/step", "max", used=300, cached=10)
        assert min(control_groups_leave(tmp_path / "cgroup", root)) == 700


def test_ranks_of_a_host_share_what_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freememory, "host_leaves", lambda: 4000)
    monkeypatch.setattr(freememory, "control_groups_leave", lambda *_: [9000])
    monkeypatch.setattr(freememory, "process_limits_leave", lambda: 3000)
    assert free_memory(torch.device("cpu"), Rank(0, 8, 0, 2)) == 2000
    assert free_memory(torch.device("cpu"), Rank()) == 3000


def test_this_host_says_what_it_leaves() -> None:
    assert 1 << 20 < free_memory(torch.device("cpu"), Rank()) < 1 << 50
