"""Run under the `deepspeed` launcher: train one run after another, each rank writing down its buffers.

    deepspeed --num_gpus 2 tests/train_cases.py OUT SHARDS RECIPE [--resume] CASE...

A case is PRECISION-STAGE, such as bf16-2; OUT/CASE becomes its run folder. OUT/CASE.buffers-RANK gains a line a step:
the SHA-256 of the model's buffers before the ranks average them, and after. A run that resumes begins with a network
whose every tensor is wrong, frozen ones and buffers as well, so that all of them must come from the checkpoint.
"""

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepspeed.accelerator import get_accelerator
from torch import nn

from fcn_dist.commands.ranks import among_ranks
from fcn_dist.commands.train import run_config
from fcn_dist.console import run_command
from fcn_dist.ranks import Rank
from fcn_dist.training import loop, ready, run
from fcn_dist.training.ready import build_model
from fcn_dist.training.statistics import average_statistics

ROOT = Path(__file__).resolve().parents[1]


def digest(model: nn.Module) -> str:
    """Of every buffer, floating or not."""
    content = hashlib.sha256()
    for name, buffer in model.named_buffers():
        content.update(name.encode() + buffer.cpu().numpy().tobytes())
    return content.hexdigest()


def average_and_write(path: Path, model: nn.Module, rank: Rank) -> None:
    """What the loop calls in place of average_statistics."""
    before = digest(model)
    average_statistics(model, rank)
    with path.open("a") as file:
        file.write(f"{before} {digest(model)}\n")


def build_wrong(*arguments: Any) -> Any:
    """What the run calls in place of build_model."""
    model, *rest = build_model(*arguments)
    for tensor in model.state_dict().values():
        tensor.add_(1)
    return model, *rest


def main(argv: list[str]) -> None:
    """Train every case in the same process group."""
    # DeepSpeed refuses fp16 on CPUs without fast fp16 instructions, though torch computes in it on all.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    # The launcher puts --local_rank=N first.
    out, shards, recipe, *cases = [argument for argument in argv if not argument.startswith("--")]
    resume = [argument for argument in argv if argument == "--resume"]
    if resume:
        vars(ready)["build_model"] = build_wrong
    with among_ranks():
        train(cases, Path(out), shards, recipe, resume)


def train(cases: list[str], out: Path, shards: str, recipe: str, resume: list[str]) -> None:
    """One run after another."""
    for case in cases:
        precision, stage = case.split("-")
        config = json.loads((ROOT / "launch" / "zero" / f"zero{stage}_{precision}.json").read_text())
        config["gradient_accumulation_steps"] = 2
        if precision == "fp16":
            config["fp16"]["initial_scale_power"] = 10  # the usual first scale overflows for some steps
        config_path = out / f"{case}.rank{Rank.from_environment().index}.json"
        config_path.write_text(json.dumps(config))
        buffers = out / f"{case}.buffers-{Rank.from_environment().index}"
        vars(loop)["average_statistics"] = partial(average_and_write, buffers)
        arguments = ["--shards", shards, "--output", str(out / case), "--recipe", recipe]
        run.train(run_config([*arguments, "--deepspeed_config", str(config_path), *resume]))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
