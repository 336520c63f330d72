"""The loop: batch, forward, backward, step; then log, evaluate and save when they are due."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fcn_dist.keys import key64
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.progress import TrainingProgress
from fcn_dist.training.augment import to_device
from fcn_dist.training.collective import sum_over_ranks
from fcn_dist.training.engine import Engine, loss_scale, set_learning_rate
from fcn_dist.training.intake import Intake
from fcn_dist.training.job import Job
from fcn_dist.training.keeper import Keeper
from fcn_dist.training.runfolder import Journal
from fcn_dist.training.schedule import learning_rate
from fcn_dist.training.scorer import Scorer


def train_steps(
    job: Job,
    engine: Engine,
    intake: Intake,
    first_step: int,
    progress: TrainingProgress,
    journal: Journal | None,
    scorer: Scorer,
    keeper: Keeper,
) -> int:
    """Train steps `first_step` to `job.steps`, or fewer if a rank is asked to stop; returns the steps done."""
    recipe, plan, seed = job.recipe, job.config.plan, job.recipe.train.seed
    meter = Meter(job.device)
    done = first_step
    engine.train()
    for step in range(first_step, job.steps):
        with meter.waiting():
            micro_batches = intake.take()
        agreed = intake.agree(step + 1, micro_batches)
        if agreed.stop:
            break
        done = step + 1
        rate = learning_rate(recipe.schedule, job.config.learning_rate, step, job.steps)
        set_learning_rate(engine, job.groups, rate)
        # DeepSpeed averages over ranks and accumulation; the loss is a sum over labelled pixels of all of them.
        scale = plan.world_size * plan.accumulation / agreed.labelled
        for batch in micro_batches:
            images, targets = to_device(batch, recipe.data, seed, job.device)
            dropout_keys = [key64(seed, position) for position in batch.positions]
            coarse = engine(images, coarse=True, dropout_keys=dropout_keys)
            loss = summed_cross_entropy(coarse, targets, job.stride)
            engine.backward(loss * scale)
            engine.step()
            meter.add_loss(loss.detach() / agreed.labelled)
        meter.add_step()
        progress.step(done)

        if due(done, recipe.log.every, job.steps):
            figures = meter.read(job, engine, done, rate)
            progress.figures(done, figures)
            if journal:
                journal.write("train", done, **figures)
        if due(done, recipe.evaluate.every, job.steps) and (done < job.steps or recipe.evaluate.at_end):
            with meter.pausing():
                scorer.score(done)
        with meter.pausing():
            keeper.advance()
            if done < job.steps and due(done, recipe.checkpoint.every, job.steps):
                keeper.save(done, scorer.summary)
    return done


def due(done: int, every: int, steps: int) -> bool:
    """Whether something at a cadence of `every` steps (0: at the end alone) falls after step `done`."""
    return done == steps or (every > 0 and done % every == 0)


@dataclass
class Meter:
    """Figures of the steps since they were last read."""

    device: torch.device
    _losses: list[torch.Tensor] = field(default_factory=list)
    _steps: int = 0
    _waited: float = 0.0
    _began: float = field(default_factory=time.perf_counter)

    def waiting(self) -> "Stopwatch":
        """Time spent waiting for data."""
        return Stopwatch(self._add_wait)

    def pausing(self) -> "Stopwatch":
        """Time that is not training: evaluation and saving."""
        return Stopwatch(self._add_pause)

    def add_loss(self, share: torch.Tensor) -> None:
        """One micro-batch's share of a global batch's loss; stays on the device until it is read."""
        self._losses.append(share)

    def add_step(self) -> None:
        """A step is done."""
        self._steps += 1

    def read(self, job: Job, engine: Engine, done: int, rate: float) -> dict[str, Any]:
        """The figures over all ranks, and a fresh start. All ranks call it."""
        loss = sum_over_ranks(torch.stack(self._losses).sum(), job.rank)
        mean_loss = float(loss) / self._steps  # waits for the device, so that the time below is the steps' own
        elapsed = time.perf_counter() - self._began
        waited = sum_over_ranks(torch.tensor([self._waited], device=self.device), job.rank)
        norm = engine.get_global_grad_norm()
        figures = {
            "epoch": done * job.config.plan.global_batch / job.stream.num_samples,
            "loss": mean_loss,
            "learning_rate": rate,
            "gradient_norm": None if norm is None else float(norm),
            "loss_scale": loss_scale(engine),
            "skipped_steps": int(engine.skipped_steps),
            "images_per_second": self._steps * job.config.plan.global_batch / elapsed,
            "data_wait": float(waited) / job.rank.world_size / elapsed,
            "peak_memory": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
        }
        self._losses, self._steps, self._waited, self._began = [], 0, 0.0, time.perf_counter()
        return figures

    def _add_wait(self, seconds: float) -> None:
        self._waited += seconds

    def _add_pause(self, seconds: float) -> None:
        self._began += seconds


class Stopwatch:
    """Tells `report` the seconds its block took."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._report(time.perf_counter() - self._began)
