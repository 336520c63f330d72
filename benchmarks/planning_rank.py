"""One rank of benchmarks/planning.py: two training steps in, the most bytes that torch held at once out.

On a GPU that is what torch's allocator says; on a CPU, the sum of what it reports to torch's profiler. Both count what
operations hold for themselves, such as weights laid out for a convolution, but not what libraries keep apart.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fcn_dist.commands.ranks import among_ranks
from fcn_dist.model.fcn import FCN
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.recipefile import load_recipe
from fcn_dist.training.collective import device, start_ranks
from fcn_dist.training.deepspeed_config import read_deepspeed_config, resolve
from fcn_dist.training.engine import backward, build_engine, set_learning_rate
from fcn_dist.training.schedule import parameter_groups

STEPS = 2  # the first allocates the optimizer's state


class Peak:
    """The most bytes that were held at once."""

    most = 0


def main() -> None:
    """Train, and write the figure of this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("output", type=Path)
    parser.add_argument("--local_rank", type=int)  # the launcher adds it
    options = parser.parse_args()
    settings = options.settings
    recipe = load_recipe(None, [*settings["recipe"], "schedule.steps=1", "schedule.learning_rate=1e-4"])
    rank = start_ranks()
    config = resolve(read_deepspeed_config(Path(settings["config"])), recipe, rank.world_size)
    images, (height, width) = config.plan.micro_batch, recipe.data.crop
    torch.manual_seed(0)
    with most_held(device(rank)) as peak:
        model = FCN(settings["outputs"], recipe.model)
        model.recompute_stages = recipe.train.recompute_stages
        model.recompute_images = recipe.train.recompute_images
        groups = parameter_groups(model, recipe.schedule)
        engine = build_engine(model, config, groups)
        engine.train()
        for _ in range(STEPS):
            pixels = torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8).to(engine.device)
            labels = torch.randint(0, settings["outputs"], (images, height, width), dtype=torch.uint8)
            set_learning_rate(engine, groups, 1e-4)
            scores = engine(pixels, coarse=True, dropout_keys=range(images))
            loss = summed_cross_entropy(scores, labels.to(engine.device), model.stride)
            backward(engine, loss / labels.numel())
            del scores, loss
            engine.step()
    (options.output / f"{rank.index}.json").write_text(json.dumps(peak.most))


@contextmanager
def most_held(where: torch.device) -> Iterator[Peak]:
    """In the block; `most` is there once it has ended."""
    peak = Peak()
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        yield peak
        peak.most = torch.cuda.max_memory_allocated(where)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    results = profiler.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    held = 0
    for _, change in changes:
        held += change
        peak.most = max(peak.most, held)


if __name__ == "__main__":
    with among_ranks():
        main()
