"""What DeepSpeed 0.19.8 saved of its optimizers in, flat tensors and what of which parameter lies in them out.

Where the float32 masters are, with the optimizer's tensors laid out alike beside them:

stage 0     in float32, the module's weights; under bf16 and fp16 `optimizer` of the one model file: by group, a list
            of tensors (`fp32_groups`) or, with a fused optimizer, one flat vector (`fp32_groups_flat`). DeepSpeed
            saves no names; `GROUPS_KEY`, which is ours, does
stage 1, 2  `single_partition_of_fp32_groups` of each rank's optimizer file: by group, the rank's run of one row of
            parameters, in the order of `param_shapes`
stage 3     `fp32_flat_groups` of each rank's optimizer file: by sub-group, the rank's shares, in the order of
            `param_shapes`

`param_slice_mappings`, which stages 1 and 2 save as well, is not used: with round_robin_gradients it is wrong, made
for the parameters in the order that they had before.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from fcn_dist.checkpoints.layout import Piece, in_a_row, in_a_run, in_shares
from fcn_dist.checkpoints.savedfiles import SavedFiles

GROUPS_KEY = "parameter_groups"  # names of the optimizer's parameters by group, in stage 0

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Holding:
    """One tensor that the optimizer updated on one rank."""

    masters: Tensor
    state: Mapping[str, Any]  # the optimizer's own: tensors as long as the masters or longer by padding, and scalars
    pieces: Sequence[Piece]
    rank: int


def holdings(files: SavedFiles) -> Iterator[Holding]:
    """All that the ranks held, rank by rank."""
    if files.stage == 0:
        yield from _unpartitioned(files.modules[0])
    for rank, optimizer in enumerate(files.optimizers):
        yield from (_shares if files.stage == 3 else _runs)(files, optimizer, rank)


def trained_shapes(files: SavedFiles) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter that the optimizer updated."""
    if files.stage == 0:
        weights = files.modules[0]["module"]
        return {name: tuple(weights[name].shape) for group in files.modules[0][GROUPS_KEY] for name in group}
    return {name: tuple(shape) for shapes in files.modules[0]["param_shapes"] for name, shape in shapes.items()}


def _runs(files: SavedFiles, optimizer: Mapping[str, Any], rank: int) -> Iterator[Holding]:
    """Stages 1 and 2."""
    groups = files.modules[0]["param_shapes"]
    nothing = [[0] * len(shapes) for shapes in groups]
    between = optimizer.get("param_alignment_paddings", nothing)  # behind each parameter
    base = optimizer["base_optimizer_state"]  # a list where zero_optimization.elastic_checkpoint is set
    states = base if isinstance(base, list) else _by_tensor(base["state"], len(groups))
    for index, (shapes, masters) in enumerate(zip(groups, optimizer["single_partition_of_fp32_groups"], strict=True)):
        length = max(_run_length(each, index) for each in files.optimizers)
        pieces = in_a_run(_sizes(shapes), between[index], length, rank)
        yield Holding(masters, states[index], pieces, rank)


def _run_length(optimizer: Mapping[str, Any], group: int) -> int:
    """The elements of a rank's run with those behind its last parameter, which stages 1 and 2 do not save."""
    saved = int(optimizer["single_partition_of_fp32_groups"][group].numel())
    padded_already = "zero_stage" not in optimizer  # the optimizer for bf16 with float32 accumulation
    return saved if padded_already else saved + int(optimizer["group_paddings"][group])


def _shares(files: SavedFiles, optimizer: Mapping[str, Any], rank: int) -> Iterator[Holding]:
    """Stage 3. Its sub-groups are numbered through all groups, and so is the optimizer's state."""
    groups = files.modules[0]["param_shapes"]
    states = _by_tensor(optimizer["optimizer_state_dict"]["state"], len(groups))
    for shapes, masters, state in zip(groups, optimizer["fp32_flat_groups"], states, strict=True):
        yield Holding(masters, state, in_shares(_sizes(shapes), files.world_size, rank), rank)


def _unpartitioned(module: Mapping[str, Any]) -> Iterator[Holding]:
    """Stage 0."""
    weights, groups, optimizer = module["module"], module[GROUPS_KEY], module["optimizer"]
    if "fp32_groups_flat" in optimizer:
        rows = [(names, masters) for names, masters in zip(groups, optimizer["fp32_groups_flat"], strict=True)]
    elif "fp32_groups" in optimizer:
        rows = [
            ([name], master)
            for names, masters in zip(groups, optimizer["fp32_groups"], strict=True)
            for name, master in zip(names, masters, strict=True)
        ]
    else:
        rows = [([name], weights[name]) for names in groups for name in names]
    states = _by_tensor(optimizer.get("optimizer_state_dict", optimizer)["state"], len(rows))
    for (names, masters), state in zip(rows, states, strict=True):
        sizes = {name: weights[name].numel() for name in names}
        yield Holding(masters.detach(), state, in_a_row(sizes), rank=0)


def _by_tensor(states: Mapping[int, Any], count: int) -> list[Mapping[str, Any]]:
    """The optimizer's state of each of its `count` tensors; empty before the first step."""
    if unknown := states.keys() - set(range(count)):
        raise ValueError(f"the optimizer has {count} tensors, and state of number {max(unknown)}")
    return [states.get(index, {}) for index in range(count)]


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: prod(shape) for name, shape in shapes.items()}
