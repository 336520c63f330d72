"""The DeepSpeed engine: a network and a resolved configuration in, an engine out."""

from typing import Any

import deepspeed
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from fcn_dist.errors import UserError
from fcn_dist.model.fcn import FCN
from fcn_dist.ranks import BatchPlan
from fcn_dist.training.deepspeed_config import EngineConfig, sizes_of
from fcn_dist.training.schedule import ParameterGroup
from fcn_dist.training.snapshot import Snapshots

Engine = Any  # deepspeed.DeepSpeedEngine, which is not typed


def build_engine(model: FCN, config: EngineConfig, groups: list[ParameterGroup]) -> Engine:
    """Wrap `model`, whose weights must be loaded already: DeepSpeed copies its masters from them now."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # DeepSpeed views them as one dimension
    parameters: list[dict[str, Any]] = []
    for group in groups:
        options: dict[str, Any] = {"params": list(group.parameters), "lr": 0.0}  # set before every step
        if not group.decays:
            options["weight_decay"] = 0.0
        parameters.append(options)
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config.values)
    except deepspeed.runtime.config.DeepSpeedConfigError as error:
        raise UserError(f"DeepSpeed refuses its configuration: {error}") from error
    except ValueError as error:
        if "not supported on your device" not in str(error):
            raise
        raise UserError(f"{config.precision} cannot be trained here: {error}; enable bf16 in its place") from error
    if config.zero_stage == 0:
        _forget_warm_up(engine)
    engine.checkpoint_engine = Snapshots()
    engine._copy_recovery_script = lambda _: None  # its converter; a checkpoint holds data only
    return engine


def _forget_warm_up(engine: Engine) -> None:
    """Undo the step with zero gradients that DeepSpeed 0.19.8 takes to allocate stage 0's state in low precision.

    At learning rate 0 it changes no weight, but Adam would count one step too many and correct its averages wrongly:
    measured here, the first update was 0.74 times what the other stages made of the same gradient.
    """
    engine.basic_optimizer.state.clear()
    for options in engine.basic_optimizer.param_groups:
        options.pop("step", None)  # where DeepSpeed's own Adam counts


def recut(engine: Engine, before: BatchPlan, plan: BatchPlan) -> None:
    """Have a live engine, cut as `before`, accumulate as `plan`, and forget a step that ended before its reduction."""
    optimizer = engine.optimizer
    engine.zero_grad()
    optimizer.zero_grad()
    if hasattr(optimizer, "gradient_accumulation_steps"):
        optimizer.gradient_accumulation_steps = plan.accumulation
    for key, size in sizes_of(plan).items():
        setattr(engine._config, key, size)
    engine.micro_steps = engine.micro_steps // before.accumulation * plan.accumulation


def set_learning_rate(engine: Engine, groups: list[ParameterGroup], rate: float) -> None:
    """Give each parameter group the schedule's rate times its multiplier."""
    own = engine.optimizer.param_groups
    assert len(own) == len(groups)
    for options, group in zip(own, groups, strict=True):
        options["lr"] = rate * group.multiplier


def backward(engine: Engine, loss: Tensor) -> None:
    """Add the gradients of `loss`, scaled in fp16.

    DeepSpeed 0.19.8 scales the loss in stages 1 to 3 alone, but its optimizer of stage 0 divides by the scale as well:
    gradients would be too small by that factor, never be clipped, and drown in Adam's epsilon.
    """
    if engine.fp16_enabled() and engine.zero_optimization_stage() == 0:
        loss = loss * engine.optimizer.loss_scale
    engine.backward(loss)


def gradient_norm(engine: Engine) -> float | None:
    """Of the last update, before clipping; None where DeepSpeed does not compute it."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return None
    # The optimizer of stage 0 tells the norm of scaled gradients, the others of their own.
    return float(norm) / (engine.optimizer.loss_scale if isinstance(engine.optimizer, FP16_UnfusedOptimizer) else 1.0)


def loss_scale(engine: Engine) -> float | None:
    """The dynamic loss scale of fp16, None in other precisions."""
    # Not engine.loss_scale(), which gives what the configuration says: 0 for a dynamic one.
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None
