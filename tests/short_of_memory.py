"""Many short runs on the ranks of one launch, each twice: undisturbed, and with an error that says memory ran out.

Arguments: shards, a folder for the runs, and a JSON list of cases. Rank 1 meets the error once, in step 2, in the
micro-batch and place that the case names; what the run has logged is in OUT/NAME and OUT/NAME-short.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor

from fcn_dist.commands.ranks import among_ranks
from fcn_dist.ranks import Rank
from fcn_dist.recipefile import recipe_from_dict
from fcn_dist.training import loop, ready, run

CPU_Accelerator.is_fp16_supported = lambda self: True  # as in fp16_anywhere.py

SHARDS, OUT, CASES = sys.argv[-3:]  # the launcher puts an argument of its own before them
RANK = Rank.from_environment().index
BUILD_MODEL, TO_DEVICE = ready.build_model, vars(loop)["to_device"]
RECIPE = {
    "data": {"crop": [32, 40], "workers": 0},
    "model": {"width": 0.0625, "head_width": 24, "dropout": 0.3},
    "schedule": {"steps": 4, "learning_rate": 0.002},
    "train": {"seed": 5, "global_batch": 16},
    "evaluate": {"at_end": False},
    "log": {"every": 1},
}


class Fault:
    """Raises it once."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.where, self.micro = case["where"], case["accumulation"] + case["micro"]  # of the whole run
        self.forwards = 0

    def model(self, *arguments: Any) -> Any:
        model, *rest = BUILD_MODEL(*arguments)
        # Moved by every forward that counts, as batch normalisation's statistics are.
        model.register_buffer("forwards", torch.zeros(1), persistent=False)
        model.register_forward_hook(self.forward)
        # Halfway through backward: the head's gradients are there, the trunk's are not.
        model.fc6.weight.register_hook(self.backward)  # type: ignore[no-untyped-call]
        return model, *rest

    def forward(self, model: torch.nn.Module, _: Any, scores: Tensor) -> None:
        if model.training:
            assert isinstance(model.forwards, Tensor)
            model.forwards += len(scores)
            self.forwards += 1
            self.raise_in("forward")

    def backward(self, _: Tensor) -> None:
        self.raise_in("backward")

    def to_device(self, *arguments: Any) -> Any:
        self.raise_in("transfer", forwards=0)
        return TO_DEVICE(*arguments)

    def raise_in(self, where: str, forwards: int = 1) -> None:
        if where == self.where and RANK == 1 and self.forwards == self.micro + forwards:
            self.where = "nowhere"
            raise torch.OutOfMemoryError("CUDA out of memory, as a test says")


def run_case(case: dict[str, Any], name: str, fault: Fault) -> None:
    """Train; the sum of what the buffer has counted goes to NAME-rank<R>.json."""
    models = []

    def build(*arguments: Any) -> Any:
        models.append(fault.model(*arguments))
        return models[0]

    recipe = recipe_from_dict(RECIPE, "the test", [])
    config: dict[str, Any] = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.01, "torch_adam": True}},
        "gradient_clipping": 1.0,
        **case["config"],
    }
    with (
        patch.object(ready, "build_model", build),
        patch.object(ready, "fit", cut_into(case["accumulation"])),
        patch.object(loop, "to_device", fault.to_device),
    ):
        run.train(ready.RunConfig(SHARDS, Path(OUT) / name, recipe, config))
    Path(OUT, f"{name}-rank{RANK}.json").write_text(json.dumps(models[0][0].forwards.item()))


def cut_into(accumulation: int) -> Any:
    """In place of `fit`: as where memory has room for no larger micro-batches."""

    def fit(config: Any, *_: Any) -> Any:
        plan = config.plan
        return config.cut(type(plan)(16, 8 // accumulation, accumulation, plan.world_size)), []

    return fit


if __name__ == "__main__":
    with among_ranks():
        for case in json.loads(Path(CASES).read_text()):
            print(case["name"], flush=True)
            run_case(case, case["name"], Fault(case | {"where": "nowhere"}))
            run_case(case, f"{case['name']}-short", Fault(case))
