"""Out of memory in a step: the same global batch is trained again, by all ranks, in micro-batches half the size.

Forward and backward are a rank's own affair under ZeRO stages 0 and 1: gradients meet those of other ranks once all
are there. Just before that the ranks ask each other whether all had memory enough; if not, nothing has been changed
that cannot be forgotten. Higher stages talk to each other all through backward, where a rank that fails is lost.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fcn_dist.data.loader import Batch
from fcn_dist.errors import UserError
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.model.devices import out_of_memory
from fcn_dist.ranks import BatchPlan
from fcn_dist.training.collective import of_all_ranks, on_rank_zero, sum_over_ranks
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.engine import Engine, recut
from fcn_dist.training.finite import StepCheck
from fcn_dist.training.job import Job
from fcn_dist.training.meter import Meter
from fcn_dist.training.runfolder import Journal, RunRecord, write_run_record

EVENT = "out_of_memory"


class PeerRanOut(Exception):
    """Another rank had not memory enough for this step."""


class Shortage:
    """Trains the micro-batches of steps so that memory suffices. Every method is called by all ranks."""

    def __init__(
        self,
        job: Job,
        engine: Engine,
        check: StepCheck,
        meter: Meter,
        run_dir: Path,
        record: RunRecord,
        progress: TrainingDisplay,
        journal: Journal | None,
    ) -> None:
        self._job, self._engine, self._check, self._meter = job, engine, check, meter
        self._run_dir, self._record, self._progress, self._journal = run_dir, record, progress, journal
        self._loaded = job.config.plan  # how the loader cuts
        self._reduces = False  # gradients have met those of other ranks
        self._halves = job.config.automatic and reduces_at_the_end(engine)
        if self._halves:
            self._reduce = engine.allreduce_gradients
            engine.allreduce_gradients = self._reduce_if_all_can

    def train(self, done: int, micro_batches: list[Batch], accumulate: Callable[[list[Batch]], None]) -> list[Batch]:
        """Have `accumulate` train the micro-batches of the step that ends as step `done`, or smaller ones.

        Returns those that were trained.
        Raises UserError where memory does not suffice and nothing can be done about it.
        """
        while True:
            self._reduces = False
            try:
                parts = pieces(micro_batches, self._loaded, self._job.config.plan, self._job.rank.index)
                accumulate(parts)
                return parts
            except PeerRanOut:
                shortage = ""
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                shortage = str(error).partition("\n")[0] or "no memory"
                if not self._halves or self._reduces:
                    raise self._refusal(done, shortage) from None
            # Here, where no traceback holds what the step has held.
            if shortage:
                self._agree(failed=True)
            self._halve(done, shortage)

    def _reduce_if_all_can(self, *arguments: object, **options: object) -> None:
        """In place of DeepSpeed's reduction: at the end of a step's last backward."""
        if self._engine.is_gradient_accumulation_boundary():
            if self._agree(failed=False):
                raise PeerRanOut
            self._reduces = True
        self._reduce(*arguments, **options)

    def _agree(self, failed: bool) -> bool:
        """Whether this step has failed on any rank."""
        if self._job.rank.world_size == 1:
            return failed  # without waiting for the device
        return bool(sum_over_ranks(torch.tensor(int(failed), device=self._job.device), self._job.rank))

    def _halve(self, done: int, shortage: str) -> None:
        job, engine = self._job, self._engine
        self._check.forget_step()
        self._meter.forget_step()
        shortages = of_all_ranks(shortage, job.rank)
        reason = next(filter(None, shortages))
        plan = halved(job.config.plan)
        if plan is None:
            raise self._refusal(done, reason)
        recut(engine, job.config.plan, plan)
        gc.collect()
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
        before, job.config = job.config.plan.micro_batch, job.config.cut(plan)
        self._record = replace(self._record, deepspeed=job.config.values)
        on_rank_zero(job.rank, lambda: write_run_record(self._run_dir, self._record))
        ranks = [index for index, one in enumerate(shortages) if one]
        self._progress.say(
            f"step {done}: out of memory on rank {', '.join(map(str, ranks))}; the same global batch again in "
            f"micro-batches of {plan.micro_batch} (before: {before}), accumulation {plan.accumulation}"
        )
        if self._journal:
            self._journal.write(
                EVENT, done, ranks=ranks, micro_batch=plan.micro_batch, accumulation=plan.accumulation, reason=reason
            )

    def _refusal(self, done: int, shortage: str) -> UserError:
        config = self._job.config
        if self._halves and self._reduces:
            why = "in the update, which is as large for any micro-batch; take a higher ZeRO stage or a smaller network"
        elif config.plan.micro_batch == 1 or self._halves:
            why = "take a smaller data.crop, or set train.recompute_stages"
        elif config.automatic:
            why = (
                f"ZeRO stage {config.zero_stage} as configured cannot go on in smaller ones by itself; set "
                'train_micro_batch_size_per_gpu, or take stage 0 or 1 without "overlap_comm"'
            )
        else:
            why = 'lower train_micro_batch_size_per_gpu, or set it and gradient_accumulation_steps to "auto"'
        size = config.plan.micro_batch
        return UserError(
            f"out of memory in step {done}, with micro-batches of {size} images ({shortage}); {why}; then continue "
            "with --resume"
        )


def reduces_at_the_end(engine: Engine) -> bool:
    """Whether gradients meet those of other ranks once a step, after its last backward."""
    optimizer = engine.optimizer
    hooks = getattr(optimizer, "overlap_comm", False) or getattr(optimizer, "use_grad_accum_attribute", False)
    return engine.zero_optimization_stage() <= 1 and not hooks and not getattr(optimizer, "cpu_offload", False)


def halved(plan: BatchPlan) -> BatchPlan | None:
    """The same global batch in twice as many micro-batches; None if some would be empty."""
    accumulation = 2 * plan.accumulation
    chunks = accumulation * plan.world_size
    if chunks > plan.global_batch:
        return None
    return replace(plan, micro_batch=-(-plan.global_batch // chunks), accumulation=accumulation)


def pieces(micro_batches: list[Batch], loaded: BatchPlan, plan: BatchPlan, rank: int) -> list[Batch]:
    """A step's micro-batches, as `loaded` cuts them, in those of `plan`, whose cuts are the same and more."""
    if plan == loaded:
        return micro_batches
    cuts = plan.accumulation // loaded.accumulation
    sizes = [len(plan.positions(rank, part)) for part in range(plan.accumulation)]
    found = []
    for number, batch in enumerate(micro_batches):
        first = 0
        for size in sizes[number * cuts : (number + 1) * cuts]:
            found.append(part_of(batch, slice(first, first + size)))
            first += size
        assert first == len(batch.positions)
    return found


def part_of(batch: Batch, images: slice) -> Batch:
    """Some images of a micro-batch, without copying."""
    targets, positions = batch.targets[images], batch.positions[images]
    bad = tuple(sample for sample in batch.bad_samples if sample.position in positions)
    return Batch(batch.images[images], targets, int((targets != IGNORE_LABEL).sum()), positions, bad)
