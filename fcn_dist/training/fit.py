"""A cut that fits into memory: where micro-batch and accumulation are "auto", as few micro-batches as there is room.

What a step holds is predicted (footprint.py, memoryplan.py); that the prediction holds is seen in the first step, and
shortage.py has what comes after.
"""

from dataclasses import replace

import torch

from fcn_dist.config import Recipe
from fcn_dist.console import status_console
from fcn_dist.errors import UserError
from fcn_dist.model.columns import takes_columns
from fcn_dist.model.fcn import BATCH_NORM, FCN
from fcn_dist.model.flops import convolutions
from fcn_dist.model.freememory import free_memory
from fcn_dist.model.upsampling import TILE_ELEMENTS_CPU
from fcn_dist.ranks import BatchPlan, Rank, cut_anew
from fcn_dist.sizes import show_size
from fcn_dist.training.collective import device, largest_over_ranks, on_rank_zero
from fcn_dist.training.deepspeed_config import EngineConfig
from fcn_dist.training.footprint import Moment, Step, footprint
from fcn_dist.training.memoryplan import DTYPES, LAYOUTS, Partition, Weights, held, largest_micro_batch

# On a CPU, an engine and the code that is made for every shape of a convolution take some memory of their own.
RESERVE = {"cuda": 0, "cpu": 250_000_000}  # bytes a rank
# Of what is free beyond it; loader processes, libraries, holes between blocks, and what a CPU lays out anew need some.
USABLE = {"cuda": 0.85, "cpu": 0.7}
TILE_BYTES = 32  # an element of the loss's tiles, at most: scores, what is computed of them, and int64 targets


def fit(config: EngineConfig, recipe: Recipe, model: FCN, rank: Rank) -> tuple[EngineConfig, list[str]]:
    """The configuration, cut so that a step fits into every rank's memory, and a line that says so if it had to be.

    `model` is on the host, and no engine built yet. All ranks call it. Raises UserError, on all ranks alike, if there
    is not even room for one image.
    """
    if not config.automatic:
        return config, []
    where = device(rank)
    free = free_memory(where, rank)
    if where.type == "cpu":
        free += sum(parameter.nbytes for parameter in model.parameters())  # they become the engine's
    least = -largest_over_ranks(torch.tensor([-free], device=where), rank)
    memory = USABLE[where.type] * max(0, int(least) - RESERVE[where.type])
    by_columns = takes_columns(where.type, DTYPES[config.precision])
    plan = on_rank_zero(rank, lambda: plan_within(memory, config, recipe, model, by_columns))
    if plan == config.plan:
        return config, []
    line = (
        f"a micro-batch of {config.plan.micro_batch} does not fit into the "
        f"{show_size(round(memory))} that may be used of what is free: accumulation {plan.accumulation}"
    )
    return config.cut(plan), [line]


def plan_within(memory: float, config: EngineConfig, recipe: Recipe, model: FCN, by_columns: bool = False) -> BatchPlan:
    """The cut with the largest micro-batches that fit, unless those that are planned do; `by_columns`: see Weights."""
    plan = config.plan
    zero = config.values.get("zero_optimization", {})
    weights = Weights.of(model, by_columns)
    averages = recipe.train.ema is not None
    whole = Partition.of(zero, config.precision, plan.world_size, plan.accumulation > 1, averages)
    if at_most(model, whole, recipe, plan.micro_batch) <= memory:
        return plan
    status_console.print("rehearsing a step, to see which micro-batch fits")
    steps = footprint(recipe, model.num_outputs, DTYPES[config.precision], recipe.train.recompute_stages)
    if held(weights, whole, steps.step(plan.micro_batch)).most <= memory:
        return plan
    cut = replace(whole, accumulates=True)
    largest = min(largest_micro_batch(weights, cut, steps, memory), plan.micro_batch)
    if not largest:
        needed = show_size(round(held(weights, cut, steps.step(1)).most))
        raise UserError(
            f"training holds {needed} a rank for a micro-batch of one image of {recipe.data.crop[0]}x"
            f"{recipe.data.crop[1]}, and {show_size(round(memory))} may be used of what is free; free "
            "some memory, take more ranks with a higher ZeRO stage, a smaller data.crop or a narrower model.width"
        )
    return cut_anew(plan.global_batch, largest, plan.world_size, plan.lanes)


def at_most(model: FCN, partition: Partition, recipe: Recipe, images: int) -> float:
    """More than a rank holds for so many images, reckoned at once: small steps need no rehearsal.

    Outputs of all convolutions, those of batch normalisation, and the gradients of both would be held, and pixels in
    float32 beside the network's own; and of weights all that there may be.
    """
    size = DTYPES[partition.precision].itemsize
    height, width = recipe.data.crop
    cells = sum(use.cells * use.layer.out_channels for use in convolutions(model, (height, width)))
    normalised = 2 if model.config.backbone.endswith(BATCH_NORM) else 1
    an_image = cells * 2 * (1 + normalised) * size + height * width * 3 * 2 * (4 + size)
    weights = Weights.of(model)
    gradients = Moment(0, weights.all * size)
    fixed = held(weights, partition, Step(gradients, gradients, gradients)).most
    return fixed + images * an_image + LAYOUTS * weights.largest * size + TILE_BYTES * TILE_ELEMENTS_CPU
