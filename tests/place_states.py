"""Run under the `deepspeed` launcher: place training states into live engines, and save them again at once.

    deepspeed --num_gpus 3 tests/place_states.py OUT [FOLDER] CASE... [SOURCE:CASE...]

A case is as in save_checkpoints.py. CASE alone trains three steps and saves to OUT/CASE. SOURCE:CASE builds an engine
of CASE, places the state in OUT/SOURCE and saves it to OUT/SOURCE:CASE. Beside each, OUT/NAME.safetensors has what the
engine itself says of its masters and moments, and OUT/NAME.json whether its weights are the masters rounded. What has
trained also has OUT/NAME.averages.safetensors: the moving average of its masters, reckoned after every step.
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
from deepspeed.utils import safe_get_full_optimizer_state
from safetensors.torch import save_file
from save_checkpoints import FROZEN, configuration, gathered
from tiny_models import tiny_network
from torch import Tensor

from fcn_dist.checkpoints.store import DEEPSPEED_TAG
from fcn_dist.checkpoints.trainingstate import read_training_state
from fcn_dist.commands.ranks import among_ranks
from fcn_dist.config import ScheduleConfig
from fcn_dist.errors import UserError
from fcn_dist.model.fcn import FCN
from fcn_dist.training.average import WeightAverage
from fcn_dist.training.collective import start_ranks
from fcn_dist.training.engine import build_engine, set_learning_rate
from fcn_dist.training.placement import place
from fcn_dist.training.schedule import parameter_groups
from fcn_dist.training.state import take_state
from fcn_dist.training.writing import Writing

STEPS, DECAY = 3, 0.2  # more than 2 / 11, less than 3 / 12


def main() -> None:
    """One engine after another in the same process group."""
    torch.set_num_threads(1)
    out, *cases = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    # DeepSpeed refuses fp16 on CPUs without fast fp16 instructions, though torch computes in it on all.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    start_ranks()
    for case in cases:
        source, _, target = case.rpartition(":")
        run(Path(out), case, source, target)


def run(out: Path, name: str, source: str, case: str) -> None:
    """Train, or place what `source` saved; then save as `name`."""
    precision, stage, *options = case.split("-")
    # Weights, buffers and frozen parameters other than those that are to be placed.
    model = network(seed=1 if source else 0)
    groups = parameter_groups(model, ScheduleConfig(steps=2, bias_multiplier=2.0))
    engine = build_engine(model, configuration(precision, int(stage), options, dist.get_world_size()), groups)
    average = WeightAverage(engine, DECAY)
    try:
        if source:
            place(read_training_state(out / source / DEEPSPEED_TAG), engine, source)
            average.begin()
        else:
            average.begin()
            averages = train(engine, model, average, groups)
            if dist.get_rank() == 0:
                save_file(averages, out / f"{name}.averages.safetensors")
    except UserError as error:
        if dist.get_rank() == 0:
            (out / f"{name}.error").write_text(str(error))
        return
    masters = masters_of(engine, model)
    tensors = {**masters, **moments(engine, model)}
    rounded = weights_are_rounded(model, masters)
    if dist.get_rank() == 0:
        save_file(tensors, out / f"{name}.safetensors")
        (out / f"{name}.json").write_text(json.dumps({"rounded": rounded}))
    (out / name / DEEPSPEED_TAG).mkdir(parents=True, exist_ok=True)
    writing = Writing(take_state(engine, average, out / name, dist.get_rank() == 0), background=False)
    assert not writing.failure
    dist.barrier()


def network(seed: int) -> FCN:
    """Frozen parameters, a floating buffer and one that counts."""
    model = tiny_network(seed=seed).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in FROZEN)
    model.register_buffer("mean", torch.randn(7))
    model.register_buffer("seen", torch.tensor(2**40 + seed))
    return model


def masters_of(engine: Any, model: FCN) -> dict[str, Tensor]:
    """None with round-robin, where DeepSpeed's own accessors look in the wrong places."""
    return {} if engine.zero_round_robin_gradients() else gathered(engine, model)


def train(engine: Any, model: FCN, average: WeightAverage, groups: Any) -> dict[str, Tensor]:
    """Each rank on an image of its own; returns the moving average of what the accessors say in float64."""
    averages = {name: master.double() for name, master in masters_of(engine, model).items() if name not in FROZEN}
    for step in range(STEPS):
        set_learning_rate(engine, groups, 0.01)
        pixels = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        image = torch.randint(0, 256, (1, 40, 56, 3), generator=pixels).to(torch.uint8)
        engine.backward(engine(image, coarse=True).float().sub(1).square().mean())
        engine.step()
        average.update()
        masters = masters_of(engine, model)
        decay = 2 / 11 if step == 0 else DECAY
        averages = {name: decay * before + (1 - decay) * masters[name].double() for name, before in averages.items()}
    return averages


def moments(engine: Any, model: FCN) -> dict[str, Tensor]:
    """The optimizer's tensors through DeepSpeed's own accessors; stage 0 has none, and round-robin false ones."""
    if not engine.zero_optimization() or engine.zero_round_robin_gradients():
        return {}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links them in its first step, once the first group's exist; those of the others it then misses.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    keys = ["momentum_buffer"] if isinstance(engine.basic_optimizer, torch.optim.SGD) else ["exp_avg", "exp_avg_sq"]
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for key in (*keys, "ema"):
                value = safe_get_full_optimizer_state(parameter, key)
                found[f"{name} {key}"] = value.detach().float().cpu().clone().view(shape)
    return found


def weights_are_rounded(model: FCN, masters: dict[str, Tensor]) -> bool:
    """Whether the module computes with the masters, in its own precision, on every rank."""
    same = True
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if name not in masters:
                continue
            same = same and torch.equal(parameter.data, masters[name].to(parameter.dtype))
    everywhere = torch.tensor(int(same))
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere)


if __name__ == "__main__":
    with among_ranks():
        main()
