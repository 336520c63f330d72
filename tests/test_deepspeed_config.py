"""DeepSpeed's JSON and the recipe: what is left open is filled in, what both state is refused naming both places."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fcn_dist.config import Recipe
from fcn_dist.errors import UserError
from fcn_dist.ranks import BatchPlan
from fcn_dist.recipefile import load_recipe
from fcn_dist.training.deepspeed_config import EngineConfig, read_deepspeed_config, resolve

ZERO_DIR = Path(__file__).parents[1] / "launch" / "zero"
OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.01}}


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["schedule.learning_rate=0.001", "train.global_batch=12", *overrides])


def resolved(world_size: int = 2, recipe_: Recipe | None = None, **values: Any) -> EngineConfig:
    return resolve({"optimizer": OPTIMIZER, **values}, recipe_ or recipe(), world_size)


def autos(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return [found for value in values.values() for found in autos(value)]
    return [values] if values == "auto" else []


def test_every_auto_is_resolved_and_the_input_is_left_alone() -> None:
    values = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-6}},
        "bf16": {"enabled": True},
    }
    before = copy.deepcopy(values)
    config = resolve(values, recipe(), 2)
    assert values == before
    assert autos(config.values) == []
    assert config.values["train_batch_size"] == 12
    assert config.values["train_micro_batch_size_per_gpu"] == 3
    assert config.values["gradient_accumulation_steps"] == 2
    assert config.values["optimizer"] == {"type": "AdamW", "params": {"lr": 0.001, "eps": 1e-6}}
    assert config.values["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert "gradient_clipping" not in config.values
    assert (config.learning_rate, config.precision, config.zero_stage) == (0.001, "bfloat16", 2)
    assert (config.plan.global_batch, config.plan.micro_batch, config.plan.accumulation) == (12, 3, 2)


@pytest.mark.parametrize("batch", [{}, {"train_batch_size": 12}, {"train_batch_size": "auto"}])
def test_the_global_batch_may_stand_in_either_place_or_the_same_in_both(batch: dict[str, Any]) -> None:
    assert resolved(3, **batch).plan.global_batch == 12
    if batch.get("train_batch_size") == 12:
        assert resolved(3, recipe("train.global_batch=null"), **batch).plan.global_batch == 12


def test_the_learning_rate_may_stand_in_either_place_or_the_same_in_both() -> None:
    stated = {"type": "SGD", "params": {"lr": 0.001}}
    assert resolved(optimizer=stated).learning_rate == 0.001
    assert resolved(recipe_=recipe("schedule.learning_rate=null"), optimizer=stated).learning_rate == 0.001
    assert resolved(optimizer={"type": "SGD"}).values["optimizer"]["params"] == {"lr": 0.001}


@pytest.mark.parametrize(
    ("overrides", "values", "places"),
    [
        ((), {"train_batch_size": 24}, ["train_batch_size is 24", "train.global_batch 12"]),
        (
            (),
            {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}},
            ["optimizer.params.lr is 0.5", "schedule.learning_rate 0.001"],
        ),
        ((), {"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "schedule.kind"]),
        ((), {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["bf16", "fp16"]),
        (
            ("schedule.learning_rate=null",),
            {},
            ["no learning rate", "schedule.learning_rate", "optimizer.params.lr"],
        ),
        (
            ("train.global_batch=null",),
            {},
            ["train.global_batch", "train_micro_batch_size_per_gpu"],
        ),
        ((), {"train_micro_batch_size_per_gpu": 5}, ["micro-batch 5", "global batch 12", "2 ranks", "multiple of 10"]),
        (
            (),
            {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 3},
            ["micro-batch 3 x accumulation 3", "global batch 12", "multiple of 18"],
        ),
        ((), {"gradient_accumulation_steps": 5}, ["global batch 12", "accumulation 5", "multiple of 10"]),
    ],
)
def test_what_conflicts_or_is_missing_is_refused_naming_every_place(
    overrides: tuple[str, ...], values: dict[str, Any], places: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        resolved(2, recipe(*overrides), **values)
    for place in places:
        assert place in str(caught.value)


@pytest.mark.parametrize("optimizer", [None, {}, {"params": {"lr": 1}}, "AdamW", []])
def test_a_configuration_without_an_optimizer_is_refused_with_an_example(optimizer: Any) -> None:
    values = {} if optimizer is None else {"optimizer": optimizer}
    with pytest.raises(UserError, match=r"names no optimizer; optimizer\.type is needed"):
        resolve(values, recipe(), 1)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu is 0"),
        ({"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu is True"),
        ({"train_batch_size": "many"}, "train_batch_size is 'many'"),
        ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps is None"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage is 4"),
        ({"zero_optimization": 2}, "zero_optimization is 2"),
        ({"bf16": True}, "bf16 is True"),
        ({"fp16": "auto"}, "fp16 is 'auto'"),
        ({"optimizer": {"type": "AdamW", "params": "auto"}}, "params is 'auto'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}, r"optimizer\.params\.lr is 'fast'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": None}}}, r"optimizer\.params\.lr is None"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": -1}}}, r"optimizer\.params\.lr is -1"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_naming_its_key(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        resolved(1, **values)


@pytest.mark.parametrize(
    ("values", "precision"),
    [
        ({}, "float32"),
        ({"bf16": {"enabled": False}}, "float32"),
        ({"bf16": {"enabled": "auto"}}, "float32"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "float16"),
    ],
)
def test_precision_is_what_is_enabled(values: dict[str, Any], precision: str) -> None:
    assert resolved(1, **values).precision == precision


def test_without_a_file_there_is_a_default_that_resolves() -> None:
    config = resolve(read_deepspeed_config(None), recipe(), 4)
    assert (config.precision, config.zero_stage, config.plan.micro_batch) == ("bfloat16", 1, 3)
    assert autos(config.values) == []


def test_a_file_that_is_missing_or_no_json_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    with pytest.raises(UserError, match=r"ds\.json cannot be read"):
        read_deepspeed_config(path)
    path.write_text("{'a': 1}")
    with pytest.raises(UserError, match=r"ds\.json is not JSON"):
        read_deepspeed_config(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"ds\.json is a list; a JSON object"):
        read_deepspeed_config(path)


@pytest.mark.parametrize(
    ("world_size", "values", "cut"),
    [
        (2, {}, (6, 1)),  # nothing changed
        (4, {}, (3, 1)),
        (1, {}, (6, 2)),  # never more images at a time than the run had
        (5, {}, (3, 1)),  # 2 or 3
        (1, {"train_micro_batch_size_per_gpu": 3}, (3, 4)),
        (5, {"train_micro_batch_size_per_gpu": 2}, (2, 2)),  # 1 or 2
        (1, {"train_micro_batch_size_per_gpu": 12}, (12, 1)),  # unless told
        (1, {"gradient_accumulation_steps": 4}, (3, 4)),
        (1, {"gradient_accumulation_steps": 1}, (6, 2)),
        # As run.json has them, all resolved for two ranks.
        (3, {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 1}, (4, 1)),
    ],
)
@pytest.mark.parametrize("stated", ["12", "null"])
def test_a_run_that_is_continued_is_cut_anew_where_the_sizes_do_not_fit(
    world_size: int, values: dict[str, Any], cut: tuple[int, int], stated: str
) -> None:
    begun = BatchPlan(12, 6, 1, 2)
    config = resolve({"optimizer": OPTIMIZER, **values}, recipe(f"train.global_batch={stated}"), world_size, begun)
    assert (config.plan.micro_batch, config.plan.accumulation) == cut
    assert config.plan.global_batch == 12
    assert config.values["train_batch_size"] == world_size * cut[0] * cut[1]  # what DeepSpeed insists on


SHIPPED = sorted(ZERO_DIR.glob("*.json"))


def test_one_file_is_shipped_for_every_stage_and_precision() -> None:
    names = {f"zero{stage}_{precision}" for stage in range(4) for precision in ("bf16", "fp16", "fp32")}
    assert {path.stem for path in SHIPPED} == names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.stem))
def test_a_shipped_file_resolves_to_what_its_name_says(path: Path) -> None:
    stage, precision = path.stem.removeprefix("zero").split("_")
    config = resolve(read_deepspeed_config(path), recipe(), 2)
    assert config.zero_stage == int(stage)
    assert config.precision == {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    assert autos(config.values) == []


def test_shipped_files_differ_in_stage_and_precision_alone() -> None:
    rest = []
    for path in SHIPPED:
        values = json.loads(path.read_text())
        zero = values.pop("zero_optimization")
        buckets = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
        used = {0: 0, 1: 2, 2: 2, 3: 1}[zero.pop("stage")]  # DeepSpeed gathers without such buckets under ZeRO-3
        assert zero == dict(list(buckets.items())[:used])
        values = {key: value for key, value in values.items() if key not in ("bf16", "fp16")}
        rest.append(values)
    assert all(values == rest[0] for values in rest)
