"""Which of a live engine's tensors hold which elements of which parameters: one function for each of DeepSpeed's
optimizers. Knows their attributes (DeepSpeed 0.19.8), which `checkpoints.layout` turns into pieces.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from fcn_dist.checkpoints.layout import Piece, in_a_row, in_a_run, in_shares
from fcn_dist.errors import UserError
from fcn_dist.training.engine import Engine


@dataclass(frozen=True)
class Holder:
    """A tensor of masters that the optimizer updates; it is also the key of the optimizer's own state."""

    tensor: Tensor
    pieces: list[Piece]


@dataclass(frozen=True)
class Wrapper:
    """How one of DeepSpeed's optimizers is written to."""

    holders: Callable[[Engine], Iterator[Holder]]
    refresh: Callable[[Any], object]  # gives the module the masters, rounded; all ranks call it
    partitioned: bool  # over ranks, so that only together they hold everything


def wrapper_of(engine: Engine, cure: str) -> Wrapper:
    """How to write to the optimizer of `engine`. Raises UserError, which ends in `cure`, if it is not a known one."""
    if engine.optimizer is engine.basic_optimizer:
        return Wrapper(_plain, lambda optimizer: None, partitioned=False)
    kind = type(engine.optimizer)
    if kind not in WRAPPERS:
        raise UserError(
            f"DeepSpeed made a {kind.__name__} of this configuration, whose masters cannot be told apart; {cure}, or "
            "leave out what asks for it"
        )
    return WRAPPERS[kind]


@contextmanager
def rewriting(engine: Engine, wrapper: Wrapper) -> Iterator[None]:
    """The masters may be changed in the block; after it, the module has them, rounded. All ranks call it."""
    partitions_weights = hasattr(engine.optimizer, "checkpoint_event_prologue")
    if partitions_weights:
        engine.optimizer.checkpoint_event_prologue()  # stage 3 keeps small parameters whole, which would hide a change
    yield
    wrapper.refresh(engine.optimizer)
    if partitions_weights:
        engine.optimizer.checkpoint_event_epilogue()


def _plain(engine: Engine) -> Iterator[Holder]:
    """Stage 0 in float32: the optimizer has the module's parameters themselves."""
    for options in engine.optimizer.param_groups:
        for parameter in options["params"]:
            yield Holder(parameter, in_a_row(_sizes(engine, [parameter])))


def _unfused(engine: Engine) -> Iterator[Holder]:
    """Stage 0 in 16 bits: a master for each parameter."""
    for parameters, masters in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            yield Holder(master, in_a_row(_sizes(engine, [parameter])))


def _fused(engine: Engine) -> Iterator[Holder]:
    """Stage 0 in 16 bits with DeepSpeed's own Adam: a row for each group."""
    for parameters, row in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups_flat, strict=True):
        yield Holder(row, in_a_row(_sizes(engine, parameters)))


def _runs(engine: Engine) -> Iterator[Holder]:
    """Stages 1 and 2. The round-robin groups are the ones that are laid out, whether round-robin is set or not."""
    optimizer = engine.optimizer
    for parameters, paddings, run in zip(
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_padding,
        optimizer.single_partition_of_fp32_groups,
        strict=True,
    ):
        yield Holder(run, in_a_run(_sizes(engine, parameters), paddings, run.numel(), dist.get_rank()))


def _bf16_runs(engine: Engine) -> Iterator[Holder]:
    """Stage 1 in bf16 with float32 accumulation."""
    optimizer = engine.optimizer
    for parameters, run in zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True):
        sizes = _sizes(engine, parameters)
        yield Holder(run, in_a_run(sizes, [0] * len(sizes), run.numel(), dist.get_rank()))


def _shares(engine: Engine) -> Iterator[Holder]:
    """Stage 3."""
    optimizer = engine.optimizer
    for parameters, shares in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        yield Holder(shares, in_shares(_sizes(engine, parameters), dist.get_world_size(), dist.get_rank()))


def numel_of(parameter: nn.Parameter) -> int:
    """The elements of a whole parameter, of which stage 3 leaves none in the parameter itself."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _sizes(engine: Engine, parameters: Iterable[nn.Parameter]) -> dict[str, int]:
    return {engine.param_names[parameter]: numel_of(parameter) for parameter in parameters}


def _round_unfused(optimizer: Any) -> None:
    for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data.copy_(master.data)


def _round_fused(optimizer: Any) -> None:
    for parameters, row in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        for parameter, master in zip(parameters, row.data.split([p.numel() for p in parameters]), strict=True):
            parameter.data.copy_(master.view_as(parameter))


def _round_shares(optimizer: Any) -> None:
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)


def _round_runs(optimizer: Any) -> None:
    optimizer.update_lp_params()


# By the very class: those that derive from them keep their state elsewhere.
WRAPPERS: dict[type, Wrapper] = {
    FP16_UnfusedOptimizer: Wrapper(_unfused, _round_unfused, partitioned=False),
    FP16_Optimizer: Wrapper(_fused, _round_fused, partitioned=False),
    DeepSpeedZeroOptimizer: Wrapper(_runs, _round_runs, partitioned=True),
    BF16_Optimizer: Wrapper(_bf16_runs, _round_runs, partitioned=True),
    DeepSpeedZeroOptimizer_Stage3: Wrapper(_shares, _round_shares, partitioned=True),
}
