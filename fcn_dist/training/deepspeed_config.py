"""The DeepSpeed configuration: a JSON file and the recipe in, one resolved configuration out.

DeepSpeed's usual names and its usual "auto": batch sizes and the learning rate are then taken from the recipe, and
any other "auto" leaves DeepSpeed its default. What both state differently is an error that names both places.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fcn_dist.config import Recipe
from fcn_dist.errors import UserError
from fcn_dist.ranks import BatchPlan, cut_anew, plan_batches
from fcn_dist.shipped import shipped

AUTO = "auto"
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
BUCKET = 50_000_000  # elements; DeepSpeed's own 500 million hold more than the whole network
DEFAULT: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
    "optimizer": {"type": "AdamW", "params": {"lr": AUTO, "weight_decay": 0.01, "torch_adam": True, "fused": True}},
    "gradient_clipping": 1.0,
}


@dataclass(frozen=True)
class EngineConfig:
    """A DeepSpeed configuration with nothing left open."""

    values: dict[str, Any]
    plan: BatchPlan
    learning_rate: float
    precision: str  # "float32", "bfloat16" or "float16"
    zero_stage: int
    automatic: bool = False  # micro-batch and accumulation are both "auto": memory decides, see fit.py

    def cut(self, plan: BatchPlan) -> "EngineConfig":
        """The same with the global batch cut otherwise."""
        return replace(self, values=self.values | sizes_of(plan), plan=plan)


def read_deepspeed_config(path: Path | None) -> dict[str, Any]:
    """The JSON file's content; bf16 and ZeRO stage 1 with AdamW if `path` is None.

    A bare name, such as `zero2_bf16`, is one of launch/zero.
    """
    if path is None:
        return DEFAULT
    path = shipped(path, "zero", ".json")
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"DeepSpeed configuration {path} cannot be read ({error.strerror}); give a JSON file such as "
            "launch/zero/zero2_bf16.json, or the name of one there"
        ) from error
    except ValueError as error:
        raise UserError(f"DeepSpeed configuration {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"DeepSpeed configuration {path} is a {type(values).__name__}; a JSON object is needed")
    return values


def resolve(values: dict[str, Any], recipe: Recipe, world_size: int, begun: BatchPlan | None = None) -> EngineConfig:
    """Fill in every "auto". Raises UserError where the two conflict, or something is missing.

    With `begun`, how a run that is continued was cut when it began, its global batch stays, and it is cut anew where
    the sizes given do not fit.
    """
    _refuse_what_the_recipe_owns(values)
    _section(values["optimizer"], "params")
    precision = _precision(values)
    plan = _plan(values, recipe, world_size, begun)
    rate = _learning_rate(values, recipe)
    stage = _section(values, "zero_optimization").get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage is {stage!r}; 0, 1, 2 or 3 is needed")
    _refuse_unchecked_steps(values, precision, stage)
    optimizer = values["optimizer"]
    resolved = _without_auto(values) | {
        **sizes_of(plan),
        "optimizer": {**optimizer, "params": {**_without_auto(optimizer.get("params", {})), "lr": rate}},
    }
    # Progress is shown by the loop, from figures that are right for the whole global batch.
    resolved.setdefault("steps_per_print", 1 << 62)
    if stage:
        # DeepSpeed's list of tested optimizers lacks SGD; ZeRO is right for every elementwise update.
        resolved.setdefault("zero_allow_untested_optimizer", True)
    automatic = all(values.get(key, AUTO) == AUTO for key in BATCH_KEYS[1:])
    return EngineConfig(resolved, plan, rate, precision, stage, automatic)


def sizes_of(plan: BatchPlan) -> dict[str, int]:
    """A cut in DeepSpeed's words."""
    return dict(zip(BATCH_KEYS, (plan.nominal_batch, plan.micro_batch, plan.accumulation), strict=True))


def _refuse_what_the_recipe_owns(values: dict[str, Any]) -> None:
    if "scheduler" in values:
        raise UserError(
            "the DeepSpeed configuration has a 'scheduler', and the recipe's schedule section owns the learning "
            "rate; only one can; remove 'scheduler' from the JSON and set schedule.kind"
        )
    if not isinstance(values.get("optimizer"), dict) or "type" not in values["optimizer"]:
        raise UserError(
            "the DeepSpeed configuration names no optimizer; optimizer.type is needed, such as "
            '{"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}'
        )


def _refuse_unchecked_steps(values: dict[str, Any], precision: str, stage: int) -> None:
    """With these, DeepSpeed 0.19.8 was seen to train a NaN gradient into all weights."""
    if stage not in (1, 2):
        return
    if precision == "bfloat16" and _section(values, "bf16").get("check_grad_overflow") is False:
        unchecked = "bf16.check_grad_overflow"
    elif precision == "float32" and _section(values, "zero_optimization").get("compute_grad_norm") is False:
        unchecked = "zero_optimization.compute_grad_norm"
    else:
        return
    raise UserError(
        f"{unchecked} is false in the DeepSpeed configuration, so that a single NaN gradient would spoil all weights; "
        "steps must be checked; remove it"
    )


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    section = values.get(key, {})
    if not isinstance(section, dict):
        raise UserError(f"{key} is {section!r} in the DeepSpeed configuration; a section of keys is needed")
    return section


def _precision(values: dict[str, Any]) -> str:
    enabled = [key for key in PRECISIONS if _section(values, key).get("enabled") is True]
    if len(enabled) > 1:
        raise UserError("the DeepSpeed configuration enables both bf16 and fp16; one is needed; disable the other")
    return PRECISIONS[enabled[0]] if enabled else "float32"


def _plan(values: dict[str, Any], recipe: Recipe, world_size: int, begun: BatchPlan | None) -> BatchPlan:
    sizes: list[int | None] = []
    for key in BATCH_KEYS:
        size = values.get(key, AUTO)
        if size != AUTO and (type(size) is not int or size < 1):
            raise UserError(f'{key} is {size!r} in the DeepSpeed configuration; 1 or more, or "auto", is needed')
        sizes.append(None if size == AUTO else size)
    total, micro_batch, accumulation = sizes
    stated = recipe.train.global_batch
    if total is not None and stated is not None and total != stated:
        raise UserError(
            f"train_batch_size is {total} in the DeepSpeed configuration, and train.global_batch {stated} in the "
            'recipe; one value is needed; set one of them to "auto" or null'
        )
    total = total or stated or (begun.global_batch if begun else None)
    if begun and total is not None:
        most = micro_batch or begun.micro_batch
        plan = _plan_if_it_fits(total, micro_batch, accumulation, world_size)
        if plan is None or plan.micro_batch > most:
            plan = cut_anew(total, most, world_size)
    else:
        plan = plan_batches(total, micro_batch, accumulation, world_size)
    return replace(plan, lanes=recipe.data.lanes)


def _plan_if_it_fits(
    total: int, micro_batch: int | None, accumulation: int | None, world_size: int
) -> BatchPlan | None:
    try:
        return plan_batches(total, micro_batch, accumulation, world_size)
    except UserError:
        return None


def _learning_rate(values: dict[str, Any], recipe: Recipe) -> float:
    rate = values["optimizer"].get("params", {}).get("lr", AUTO)
    stated = recipe.schedule.learning_rate
    if rate == AUTO:
        if stated is None:
            raise UserError(
                "no learning rate is given; set schedule.learning_rate in the recipe or optimizer.params.lr in the "
                "DeepSpeed configuration"
            )
        return stated
    if type(rate) not in (int, float) or not 0 < rate < math.inf:
        raise UserError(
            f'optimizer.params.lr is {rate!r} in the DeepSpeed configuration; a positive number, or "auto", is needed'
        )
    if stated is not None and stated != rate:
        raise UserError(
            f"optimizer.params.lr is {rate} in the DeepSpeed configuration, and schedule.learning_rate {stated} in "
            'the recipe; one value is needed; set one of them to "auto" or null'
        )
    return float(rate)


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != AUTO
    }
