"""One rank of benchmarks/communication.py: settings in, seconds of their steps and what the links carry out."""

import argparse
import gc
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from fcn_dist.commands.ranks import among_ranks
from fcn_dist.config import ModelConfig, Recipe
from fcn_dist.model.fcn import FCN
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.ranks import Rank
from fcn_dist.recipefile import load_recipe
from fcn_dist.training.collective import device, start_ranks
from fcn_dist.training.deepspeed_config import resolve
from fcn_dist.training.engine import Engine, backward, build_engine, set_learning_rate
from fcn_dist.training.schedule import ParameterGroup, parameter_groups

WARM_UP = 2  # steps
PROBE = 32 * 1024**2  # elements that are reduced to see what the links carry


def main() -> None:
    """Time every setting, and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("output", type=Path)
    parser.add_argument("--local_rank", type=int)  # the launcher adds it
    options = parser.parse_args()
    values = options.settings
    rank = start_ranks()
    found: dict[str, Any] = {
        "bandwidth": bandwidth(rank, getattr(torch, values["precision"])) if rank.world_size > 1 else None
    }
    recipe = load_recipe(
        None,
        [
            f"data.crop=[{values['size']},{values['size']}]",
            f"model.width={values['width']}",
            f"train.global_batch={values['batch'] * rank.world_size}",
            "schedule.steps=1",
            "schedule.learning_rate=1e-4",
        ],
    )
    found["steps"] = [timed(config, recipe, values, rank) for config in values["configs"]]
    if rank.index == 0:
        options.output.write_text(json.dumps(found))


def bandwidth(rank: Rank, dtype: torch.dtype) -> float:
    """Bytes a second that each rank sends in a reduction by a ring."""
    tensor = torch.ones(PROBE, dtype=dtype, device=device(rank))
    seconds = []
    for _ in range(WARM_UP + 3):
        dist.barrier()
        began = perf_counter()
        dist.all_reduce(tensor)
        _finish(tensor.device)
        seconds.append(perf_counter() - began)
    n = rank.world_size
    return 2 * tensor.nbytes * (n - 1) / n / median(seconds[WARM_UP:])


def timed(config: dict[str, Any], recipe: Recipe, values: dict[str, Any], rank: Rank) -> dict[str, float]:
    """Medians of forward with backward, and of the update; reductions are in either."""
    torch.manual_seed(0)
    model = FCN(values["outputs"], ModelConfig(width=values["width"]))
    groups = parameter_groups(model, recipe.schedule)
    engine = build_engine(model, resolve(config, recipe, rank.world_size), groups)
    engine.train()
    work, update = [], []
    for number in range(WARM_UP + values["steps"]):
        if rank.world_size > 1:
            dist.barrier()
        began = perf_counter()
        train(engine, groups, values)
        _finish(engine.device)
        trained = perf_counter()
        engine.step()
        _finish(engine.device)
        if number >= WARM_UP:
            work.append(trained - began)
            update.append(perf_counter() - trained)
    engine.destroy()
    gc.collect()
    return {"work": median(work), "update": median(update)}


def train(engine: Engine, groups: list[ParameterGroup], values: dict[str, Any]) -> None:
    """Forward and backward of a micro-batch."""
    images, size = values["batch"], values["size"]
    set_learning_rate(engine, groups, 1e-4)
    pixels = torch.zeros(images, size, size, 3, dtype=torch.uint8, device=engine.device)
    labels = torch.zeros(images, size, size, dtype=torch.uint8, device=engine.device)
    scores = engine(pixels, coarse=True, dropout_keys=range(images))
    backward(engine, summed_cross_entropy(scores, labels, engine.module.stride) / labels.numel())


def _finish(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    with among_ranks():
        main()
