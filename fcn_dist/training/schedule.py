"""Learning rates: pure functions of the step, so that a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from fcn_dist.config import ScheduleConfig
from fcn_dist.errors import UserError
from fcn_dist.model.fcn import FCN


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and weight decay."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    multiplier: float  # on the schedule's learning rate
    decays: bool


def total_steps(config: ScheduleConfig, num_samples: int, global_batch: int) -> int:
    """Steps of the whole run; epochs are rounded up to whole global batches."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    # Exactly as written: 2.2 epochs of 25 samples are 55 samples, and a little more in floating point.
    return math.ceil(Fraction(str(config.epochs)) * num_samples / global_batch)


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """The rate of 0-based `step` of `steps`, before group multipliers."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.kind == "poly":
        remaining = float((1 - progress) ** config.power)
    else:
        remaining = (1 + math.cos(math.pi * progress)) / 2
    return peak * (config.final_fraction + (1 - config.final_fraction) * remaining)


def parameter_groups(model: FCN, config: ScheduleConfig) -> list[ParameterGroup]:
    """Trunk and head, weights and biases: up to four groups, in an order that checkpoints rely on."""
    groups = []
    for part, is_head in (("trunk", False), ("head", True)):
        for kind, is_bias in (("weights", False), ("biases", True)):
            parameters = tuple(
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
                and name.startswith(model.new_layers) == is_head
                and (parameter.ndim == 1) == is_bias
            )
            if not parameters:  # DeepSpeed would drop the group, and those after it would move up
                continue
            multiplier = (config.head_multiplier if is_head else 1.0) * (config.bias_multiplier if is_bias else 1.0)
            groups.append(ParameterGroup(f"{part}_{kind}", parameters, multiplier, not is_bias or config.decay_biases))
    return groups


def check_warmup(config: ScheduleConfig, steps: int) -> None:
    """Raise UserError if the warm-up would never end."""
    if config.warmup_steps >= steps:
        raise UserError(
            f"schedule.warmup_steps is {config.warmup_steps}, and the run has {steps} steps; fewer warm-up steps than "
            "steps are needed; change one of them"
        )
