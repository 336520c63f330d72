"""Many short runs on the ranks of one launch, a fault in each: what a step left of weights and optimizer, by digests.

Arguments: shards, a folder for the runs, and a JSON list of cases. Each rank writes OUT/NAME-rank<R>.json: for each
step the digests of its state before and after, and what in it and in gradients is not finite; then how it ended.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor

from fcn_dist.commands.ranks import among_ranks
from fcn_dist.data.loader import Batch
from fcn_dist.errors import EarlyEnd
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.ranks import Rank
from fcn_dist.recipefile import recipe_from_dict
from fcn_dist.training import objective, ready, run
from fcn_dist.training.engine import build_engine, loss_scale
from fcn_dist.training.finite import StepCheck
from fcn_dist.training.intake import Agreement, Intake

CPU_Accelerator.is_fp16_supported = lambda self: True  # as in fp16_anywhere.py

SHARDS, OUT, CASES = sys.argv[-3:]  # the launcher puts an argument of its own before them
RANK = Rank.from_environment().index
BUILD_MODEL, AGREE, FINITE = ready.build_model, Intake.agree, StepCheck.finite
BACKWARD = deepspeed.DeepSpeedEngine.backward
RECIPE = {
    "data": {"crop": [32, 40], "workers": 0},
    "model": {"width": 0.0625, "head_width": 24, "dropout": 0.3},
    "schedule": {"steps": 4, "learning_rate": 0.002, "bias_multiplier": 2},
    "train": {"seed": 5, "ema": 0.9},
    "evaluate": {"at_end": False},
    "log": {"every": 1},
}
BAD = {"nan": float("nan"), "inf": float("inf")}


class Fault:
    """Spoils what rank `rank` computes in micro-batch `micro` (from 0, over the run) of each of `steps`."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.backwards = 0
        self.engine: Any = None

    @property
    def now(self) -> bool:
        step, micro = divmod(self.backwards, self.case["accumulation"])
        return bool(self.case["rank"] == RANK and step + 1 in self.case["steps"] and micro == self.case.get("micro", 0))

    def loss(self, *arguments: Any) -> Tensor:
        loss = summed_cross_entropy(*arguments)
        kind = self.case["what"]
        if self.now and kind == "loss":
            loss = loss * BAD[self.case["value"]]
        if self.now and kind == "loss_alone":  # the gradient stays finite
            loss = loss + BAD[self.case["value"]]
        return loss

    def gradient(self, gradient: Tensor) -> Tensor | None:
        if not self.now or self.case["what"] != "gradient":
            return None
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = BAD[self.case["value"]]
        return spoilt

    def running_mean(self, model: torch.nn.Module, _: Any, scores: Tensor) -> None:
        if model.training:
            assert isinstance(model.mean, Tensor)
            model.mean.mul_(0.9).add_(scores.detach().mean() * (BAD[self.case["value"]] if self.now else 1))

    def run(self) -> None:
        with (
            patch.object(objective, "summed_cross_entropy", self.loss),
            patch.object(ready, "build_model", self.model_with_hook),
        ):
            run_case(self)

    def model_with_hook(self, *arguments: Any) -> Any:
        model, *rest = BUILD_MODEL(*arguments)
        # A running mean, as batch normalisation keeps, into which every NaN would go for good.
        model.register_buffer("mean", torch.zeros(1), persistent=False)
        model.register_forward_hook(self.running_mean)
        model.fc7.weight.register_hook(self.gradient)  # type: ignore[no-untyped-call]
        return model, *rest


def tensors(engine: Any) -> dict[str, Tensor]:
    """All that a step may change on this rank: weights, masters, moments, counts of steps."""
    optimizer = engine.optimizer
    found = {f"weight {name}": getattr(p, "ds_tensor", p).detach() for name, p in engine.module.named_parameters()}
    found |= {f"buffer {name}": b for name, b in engine.module.named_buffers()}
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        found |= {f"{name} {i}": t.detach() for i, t in enumerate(getattr(optimizer, name, ()))}
    for i, group in enumerate(getattr(optimizer, "fp32_groups", ())):
        found |= {f"master {i} {j}": p.detach() for j, p in enumerate(group)}
    for number, state in enumerate(engine.basic_optimizer.state.values()):
        found |= {f"state {number} {key}": torch.as_tensor(value) for key, value in state.items()}
    for number, group in enumerate(engine.basic_optimizer.param_groups):
        if "step" in group:
            found[f"group {number} step"] = torch.as_tensor(group["step"])
    return found


def digest_of(found: dict[str, Tensor]) -> str:
    sums = {key: hashlib.sha256(t.float().numpy().tobytes()).hexdigest() for key, t in found.items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def not_finite(found: dict[str, Tensor]) -> list[str]:
    return [name for name, t in found.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]


def gradients(engine: Any) -> dict[str, Tensor]:
    """What is left of gradients, in buffers of any kind."""
    found = {f"grad {name}": p.grad for name, p in engine.module.named_parameters() if p.grad is not None}
    for name, value in vars(engine.optimizer).items():
        if isinstance(value, Tensor):
            found[name] = value
        elif "grad" in name:
            found |= {f"{name} {i}": t for i, t in enumerate(flat(value))}
    return found


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for one in values for tensor in flat(one)]


@torch.no_grad()
def built(*arguments: Any) -> Any:
    """The engine; what stage 3 pads with is whatever its memory held, a NaN now and then."""
    engine = build_engine(*arguments)
    for tensor in tensors(engine).values():
        if tensor.is_floating_point():
            tensor.nan_to_num_(0, 0, 0)
    return engine


def run_case(fault: Fault) -> None:
    case = fault.case
    out = Path(OUT) / case["name"]
    seen: list[dict[str, Any]] = []

    def agree(intake: Intake, done: int, micro_batches: list[Batch]) -> Agreement:
        assert fault.engine is not None or done == 1
        before = digest_of(tensors(fault.engine)) if fault.engine else None
        seen.append({"step": done, "before": before, "positions": [batch.positions for batch in micro_batches]})
        return AGREE(intake, done, micro_batches)

    def backward(engine: Any, loss: Tensor) -> None:
        fault.engine = engine
        BACKWARD(engine, loss)
        fault.backwards += 1

    def finite(check: StepCheck, done: int, micro_batches: list[Batch]) -> bool:
        engine = check.engine
        try:
            return FINITE(check, done, micro_batches)
        finally:
            seen[-1] |= {
                "after": digest_of(tensors(engine)),
                "weights": digest_of({name: p.detach() for name, p in engine.module.named_parameters()}),
                "not_finite": not_finite({**tensors(engine), **gradients(engine)}),
                "skipped": engine.skipped_steps,
                "scale": loss_scale(engine),
            }

    recipe = recipe_from_dict(RECIPE, "the test", case.get("set", []))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case["accumulation"],
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.01, "torch_adam": True}},
        "gradient_clipping": case["clipping"],
        **case["config"],
    }
    ended = "done"
    with (
        patch.object(ready, "build_engine", built),
        patch.object(Intake, "agree", agree),
        patch.object(deepspeed.DeepSpeedEngine, "backward", backward),
        patch.object(StepCheck, "finite", finite),
    ):
        try:
            run.train(ready.RunConfig(SHARDS, out, recipe, config))
        except EarlyEnd as end:
            ended = f"{end.code}: {end}"
    Path(OUT, f"{case['name']}-rank{RANK}.json").write_text(json.dumps({"steps": seen, "ended": ended}))


if __name__ == "__main__":
    with among_ranks():
        for case in json.loads(Path(CASES).read_text()):
            print(case["name"], flush=True)
            Fault(case).run()
