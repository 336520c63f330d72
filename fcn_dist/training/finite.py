"""Steps that are not finite: a NaN or infinity in a loss or gradient of any rank makes all ranks skip the step.

A loss that is not finite is carried into its gradients, and DeepSpeed looks at the gradients once they are summed over
the ranks, where all ranks find the same. Only for stage 0 in float32 it looks at nothing; there it is done here. So no
message between ranks decides on a step. Which rank met what is asked after a skip alone.

fp16's dynamic loss scale overflows now and then by design, and DeepSpeed lowers it: such a step is skipped, but is not
one of these unless the scale cannot be lowered any more.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcn_dist.data.crops import trained_samples
from fcn_dist.data.loader import Batch
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import EXIT_DIVERGED, EarlyEnd, UserError, named
from fcn_dist.training.collective import of_all_ranks, on_rank_zero, sum_over_ranks
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.engine import Engine, loss_scale
from fcn_dist.training.job import Job
from fcn_dist.training.runfolder import Journal, read_journal

EVENT = "not_finite"
REMEDIES = {
    "loss": "look at these samples and at the losses before, or lower schedule.learning_rate",
    "gradient": "look at these samples, lower schedule.learning_rate, or set gradient_clipping",
    "loss scale": "train in bf16 in place of fp16, or lower fp16.min_loss_scale",
}


class MicroBatchSeen(NamedTuple):
    """One rank's micro-batch of a skipped step."""

    rank: int
    bad: bool  # whether its own loss or gradients were not finite
    positions: tuple[int, ...]  # of the stream
    keys: list[str]


@dataclass
class StepCheck:
    """Watches the steps of a run and keeps their count, the same on every rank."""

    job: Job
    engine: Engine
    shard_set: ShardSet
    run_dir: Path
    progress: TrainingDisplay
    journal: Journal | None
    _losses: list[Tensor] = field(default_factory=list)  # of each micro-batch of this step
    _largest: list[Tensor] = field(default_factory=list)  # magnitude in this rank's own gradients, likewise

    def __post_init__(self) -> None:
        """Begin with the count that the journal tells of, if the run is continued. All ranks call it."""
        self._budget = self.job.recipe.train.max_skipped_steps
        self._count: int = on_rank_zero(self.job.rank, self._from_journal)
        self._scale = loss_scale(self.engine)
        self._least_scale = math.inf  # a static scale cannot be lowered
        if self.job.config.precision == "float16":
            if self.engine.dynamic_loss_scale():
                self._least_scale = float(self.job.config.values["fp16"].get("min_loss_scale", 1))
            if self.job.config.zero_stage:
                # DeepSpeed would end each rank with a bare Exception.
                self.engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        if self.engine.optimizer is self.engine.basic_optimizer:
            self.engine.optimizer.register_step_pre_hook(skip_unless_finite)
        for parameter in self.engine.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._look)
        # What forwards change, such as running means, is put back after a skip.
        self._buffers = list(self.engine.module.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._moved = False  # since they were kept
        if self._buffers:
            self.engine.module.register_forward_pre_hook(self._keep_buffers)

    def watch(self, loss: Tensor) -> Tensor:
        """The next micro-batch's loss, with a gradient that is NaN where the loss is not finite."""
        value = loss.detach()
        self._losses.append(value)
        self._largest.append(torch.zeros_like(value))
        return loss * (1 + 0 * value)

    def finite(self, done: int, micro_batches: list[Batch]) -> bool:
        """Whether the step that ends as step `done` was finite; if not, it changed nothing. All ranks call it.

        Raises EarlyEnd, on all ranks alike, when more steps were not than the budget allows.
        """
        losses, self._losses = self._losses, []
        largest, self._largest = self._largest, []
        scale, self._scale = self._scale, loss_scale(self.engine)
        self._moved = False
        if not self.engine.optimizer.overflow:
            return True
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        if self.job.config.zero_stage == 3:
            # DeepSpeed drops its views of this buffer, and not the values.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()
        what = self._what(losses, scale)
        if what:
            self._add(done, what, self._seen(losses, largest, micro_batches))
        return not what

    def forget_step(self) -> None:
        """The step is done again from the start: as if it had never begun."""
        self._losses, self._largest = [], []
        if self._moved:
            torch._foreach_copy_(self._buffers, self._kept)
            self._moved = False

    def _keep_buffers(self, module: torch.nn.Module, _arguments: Any) -> None:
        if module.training and not self._moved:  # before the first micro-batch of a step
            torch._foreach_copy_(self._kept, self._buffers)
            self._moved = True

    def _look(self, gradient: Tensor) -> None:
        """Note the largest magnitude in one parameter's gradient, before it meets those of other ranks."""
        # On a CPU, 9 ms for fc6's in bfloat16, where a norm takes 439 ms.
        low, high = torch.aminmax(gradient)
        self._largest[-1] = torch.maximum(self._largest[-1], torch.maximum(high, -low))  # NaN wins

    def _what(self, losses: list[Tensor], scale: float | None) -> str | None:
        """What was not finite in a step that was skipped; None for an overflow that lowered the loss scale."""
        bad = (~torch.isfinite(torch.stack(losses))).sum()
        if sum_over_ranks(bad, self.job.rank):
            return "loss"
        if scale is None:
            return "gradient"
        return "loss scale" if scale <= self._least_scale else None

    def _seen(self, losses: list[Tensor], largest: list[Tensor], micro_batches: list[Batch]) -> list[MicroBatchSeen]:
        """All ranks' micro-batches of the step, in the order of ranks."""
        bad = (~torch.isfinite(torch.stack(losses) + torch.stack(largest))).tolist()
        own = [
            MicroBatchSeen(self.job.rank.index, is_bad, batch.positions, self._keys(batch))
            for is_bad, batch in zip(bad, micro_batches, strict=True)
        ]
        return [seen for of_rank in of_all_ranks(own, self.job.rank) for seen in of_rank]

    def _keys(self, batch: Batch) -> list[str]:
        return [self._key(index) for index in trained_samples(self.job.stream, batch.positions, batch.bad_samples)]

    def _key(self, index: int) -> str:
        try:
            return self.shard_set.key(index)
        except UserError:
            # This rank alone would raise it. The loader will say what is wrong with the shard.
            return f"sample {index}"

    def _add(self, done: int, what: str, seen: list[MicroBatchSeen]) -> None:
        self._count += 1
        bad = [one for one in seen if one.bad]
        ranks = sorted({one.rank for one in bad})
        where = f"on rank {named([str(rank) for rank in ranks])}" if ranks else "in the sum over ranks"
        keys = named([repr(key) for one in bad or seen for key in one.keys])
        news = f"{what} not finite {where}, with samples {keys}"
        self.progress.say(f"step {done} changed no weight: {news}; {self._count} of {self._budget} such steps allowed")
        if self.journal:
            samples = [one._asdict() for one in seen]
            self.journal.write(EVENT, done, what=what, ranks=ranks, micro_batches=samples, allowed=self._budget)
        if self._count > self._budget:
            raise EarlyEnd(
                f"{self._count} steps were not finite and changed no weight, step {done} the last of them: {news}; "
                f"train.max_skipped_steps allows {self._budget}; the lines {EVENT!r} of "
                f"{self.run_dir}/metrics.jsonl list the samples of each; {REMEDIES[what]}, or raise "
                "train.max_skipped_steps",
                EXIT_DIVERGED,
            )

    def _from_journal(self) -> int:
        return sum(found["event"] == EVENT for _, found in read_journal(self.run_dir))


def skip_unless_finite(optimizer: Any, _args: Any, _options: Any) -> None:
    """Take the gradients from a plain optimizer before its step if their norm is not finite, as `overflow` then says.

    It leaves parameters without gradients as they are, and their moments and counts of steps.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    optimizer.overflow = not bool(torch.isfinite(norm))
    if optimizer.overflow:
        for parameter in parameters:
            parameter.grad = None
