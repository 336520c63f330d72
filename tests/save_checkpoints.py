"""Run under the `deepspeed` launcher: train tiny networks for two steps and save a checkpoint of each.

    deepspeed --num_gpus 2 tests/save_checkpoints.py OUT CASE...

A case is PRECISION-STAGE with options, such as bf16-2 or bf16-1-accumulate. OUT/CASE becomes a run folder, and
OUT/CASE.safetensors what the engine itself says its float32 weights are.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from tiny_models import DESCRIPTION, tiny_network

from fcn_dist.checkpoints.commit import WrittenFile, commit, prepare
from fcn_dist.checkpoints.store import CheckpointState
from fcn_dist.commands.ranks import among_ranks
from fcn_dist.config import Recipe, ScheduleConfig
from fcn_dist.model.fcn import FCN
from fcn_dist.training.average import WeightAverage
from fcn_dist.training.collective import start_ranks
from fcn_dist.training.deepspeed_config import EngineConfig, resolve
from fcn_dist.training.engine import build_engine, set_learning_rate
from fcn_dist.training.schedule import parameter_groups
from fcn_dist.training.state import take_state
from fcn_dist.training.writing import Writing

FROZEN = ("features.0.weight", "features.2.bias")


def main() -> None:
    """Save one checkpoint after another in the same process group."""
    torch.set_num_threads(1)
    # The launcher puts --local_rank=N first.
    out, *cases = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    # DeepSpeed refuses fp16 on CPUs without fast fp16 instructions, though torch computes in it on all.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    start_ranks()
    for case in cases:
        save(Path(out), case)
    dist.barrier()


def save(out: Path, case: str) -> None:
    """Train, ask the engine for its weights, and save."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    precision, stage, *options = case.split("-")
    config = configuration(precision, int(stage), options, world_size)
    model = tiny_network().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in FROZEN)
    groups = parameter_groups(model, ScheduleConfig(steps=2, bias_multiplier=2.0))
    engine = build_engine(model, config, groups)
    average = WeightAverage(engine, 0.9)
    average.begin()
    for step in range(2):
        set_learning_rate(engine, groups, 0.01)
        pixels = torch.Generator().manual_seed(step * world_size + rank)
        image = torch.randint(0, 256, (1, 40, 56, 3), generator=pixels).to(torch.uint8)
        engine.backward(engine(image, coarse=True).float().sub(1).square().mean())
        engine.step()
        average.update()
    weights = gathered(engine, model)
    run_dir = out / case
    folder: list[Path | None] = [None]
    if rank == 0:
        save_file(weights, out / f"{case}.safetensors")
        folder = [prepare(run_dir, step=2)]
    dist.broadcast_object_list(folder)
    assert folder[0]
    writing = Writing(take_state(engine, average, folder[0], rank == 0), background=False)
    written: list[dict[Path, WrittenFile]] = [{}] * world_size
    dist.all_gather_object(written, writing.files)
    if rank == 0:
        files = {path.relative_to(folder[0]).as_posix(): file for one in written for path, file in one.items()}
        commit(folder[0], state(config, world_size), files)


def configuration(precision: str, stage: int, options: list[str], world_size: int) -> EngineConfig:
    """The DeepSpeed configuration of a case."""
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        # Sub-groups of a few parameters each, as large models have them.
        "zero_optimization": {"stage": stage, **({"sub_group_size": 2000} if stage == 3 else {})},
    }
    if precision != "fp32":
        values[precision] = {"enabled": True}
    if precision == "fp16":
        values["fp16"]["loss_scale"] = 8.0
    if "accumulate" in options:
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    if "offload" in options:
        values["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        values["zero_force_ds_cpu_optimizer"] = False
    if "dynamic" in options:
        # Raised after every step from the third on, so that where it stands shows.
        values["fp16"] |= {"loss_scale": 0, "initial_scale_power": 3, "loss_scale_window": 1}
    if "roundrobin" in options:
        values["zero_optimization"]["round_robin_gradients"] = True
    if "aligned" in options:
        values["zero_optimization"]["parameter_alignment"] = True
    if "elastic" in options:
        values["zero_optimization"]["elastic_checkpoint"] = True
    if "sgd" in options:
        values["optimizer"] = {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}
    if "fused" in options:
        values["optimizer"]["params"]["torch_adam"] = False
    return resolve(values, Recipe(), world_size)


def gathered(engine: Any, model: FCN) -> dict[str, torch.Tensor]:
    """The engine's float32 masters through DeepSpeed's own accessors; the weights where it has no masters."""
    weights = {}
    for name, parameter in model.named_parameters():
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is None:
            with deepspeed.zero.GatheredParameters([parameter]):
                master = unpartitioned_master(engine, parameter).detach().float().clone()
        weights[name] = master.detach().cpu().clone().view(getattr(parameter, "ds_shape", parameter.shape))
    return weights


def unpartitioned_master(engine: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Stage 0: the master that lies beside the parameter itself, found by identity."""
    optimizer = engine.optimizer
    for index, group in enumerate(getattr(optimizer, "fp16_groups", [])):
        offset = 0
        for position, own in enumerate(group):
            if own is parameter and hasattr(optimizer, "fp32_groups"):
                master: torch.Tensor = optimizer.fp32_groups[index][position]
                return master
            if own is parameter and hasattr(optimizer, "fp32_groups_flat"):
                flat: torch.Tensor = optimizer.fp32_groups_flat[index]
                return flat[offset : offset + parameter.numel()].view(parameter.shape)
            offset += own.numel()
    return parameter


def state(config: EngineConfig, world_size: int) -> CheckpointState:
    """What the manifest says."""
    return CheckpointState(
        step=2,
        position=2 * world_size,
        world_size=world_size,
        zero_stage=config.zero_stage,
        precision=config.precision,
        model=DESCRIPTION.as_dict(),
        recipe={},
        deepspeed=json.loads(json.dumps(config.values)),
        index_sha256="0" * 64,
        scores=None,
    )


if __name__ == "__main__":
    with among_ranks():
        main()
