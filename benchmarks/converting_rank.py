"""One rank of benchmarks/converting.py: two small training steps of the full network in, a committed checkpoint out."""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist

from fcn_dist.checkpoints.commit import WrittenFile, commit, prepare
from fcn_dist.checkpoints.store import CheckpointState
from fcn_dist.commands.ranks import among_ranks
from fcn_dist.config import ModelConfig, Recipe, ScheduleConfig, TrainConfig
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.preprocess import TORCHVISION
from fcn_dist.palette import palette
from fcn_dist.training.average import WeightAverage
from fcn_dist.training.collective import start_ranks
from fcn_dist.training.deepspeed_config import resolve
from fcn_dist.training.engine import backward, build_engine, set_learning_rate
from fcn_dist.training.schedule import parameter_groups
from fcn_dist.training.state import take_state
from fcn_dist.training.writing import Writing

CLASSES = 150
STEPS = 2  # the first makes the optimizer's state


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("precision", choices=("fp32", "bf16"))
    parser.add_argument("stage", type=int)
    parser.add_argument("width", type=float)
    parser.add_argument("--local_rank", type=int)  # the launcher adds it
    options = parser.parse_args()
    rank = start_ranks()
    values = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "zero_optimization": {"stage": options.stage},
        **({"bf16": {"enabled": True}} if options.precision == "bf16" else {}),
    }
    config = resolve(values, Recipe(train=TrainConfig(global_batch=rank.world_size)), rank.world_size)
    names = tuple(f"class {number}" for number in range(1, CLASSES + 1))
    model_config = ModelConfig(width=options.width, dropout=0.0)
    description = ModelDescription(model_config, TORCHVISION, names, palette(CLASSES), score_other=False)
    torch.manual_seed(0)
    model = description.build()
    for name, parameter in model.named_parameters():
        if name.startswith("score"):  # zero at first, as scores of a probe that prove nothing
            torch.nn.init.normal_(parameter, std=0.01)
    groups = parameter_groups(model, ScheduleConfig(steps=STEPS, learning_rate=1e-5))
    engine = build_engine(model, config, groups)
    for step in range(STEPS):
        set_learning_rate(engine, groups, 1e-5)
        pixels = torch.Generator().manual_seed(step * rank.world_size + rank.index)
        image = torch.randint(0, 256, (1, 64, 64, 3), generator=pixels, dtype=torch.uint8).to(engine.device)
        backward(engine, engine(image, coarse=True).float().sub(1).square().mean())
        engine.step()
    folder: list[Path | None] = [prepare(options.run, STEPS) if rank.index == 0 else None]
    dist.broadcast_object_list(folder)
    assert folder[0]
    writing = Writing(take_state(engine, WeightAverage(engine, None), folder[0], rank.index == 0), background=False)
    writing.wait()
    written: list[dict[Path, WrittenFile]] = [{}] * rank.world_size
    dist.all_gather_object(written, writing.files)
    if rank.index == 0:
        files = {path.relative_to(folder[0]).as_posix(): file for one in written for path, file in one.items()}
        state = CheckpointState(
            step=STEPS,
            position=STEPS * rank.world_size,
            world_size=rank.world_size,
            zero_stage=config.zero_stage,
            precision=config.precision,
            model=json.loads(json.dumps(description.as_dict())),
            recipe={},
            deepspeed=json.loads(json.dumps(config.values)),
            index_sha256="",
            scores=None,
        )
        commit(folder[0], state, files)


if __name__ == "__main__":
    with among_ranks():
        main()
