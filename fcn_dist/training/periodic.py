"""What a run does every so many steps: score the engine's weights, and write checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcn_dist.checkpoints import store as checkpoints
from fcn_dist.checkpoints.store import CheckpointState
from fcn_dist.data.shardset import ShardSet
from fcn_dist.model.fcn import FCN
from fcn_dist.progress import TrainingProgress
from fcn_dist.scoring.evaluate import evaluate
from fcn_dist.scoring.metrics import Scores
from fcn_dist.training.collective import barrier, on_rank_zero
from fcn_dist.training.engine import Engine, write_state
from fcn_dist.training.loop import Job
from fcn_dist.training.phases import PhaseClock
from fcn_dist.training.runfolder import TRAINING_SPLIT, Journal, RunRecord


@dataclass
class Scorer:
    """Evaluates the engine's weights and remembers the last scores, `summary` being what checkpoints say of them."""

    model: FCN
    engine: Engine
    shard_set: ShardSet | None
    job: Job
    clock: PhaseClock
    progress: TrainingProgress
    journal: Journal | None
    summary: dict[str, Any] | None
    last: Scores | None = None

    def __call__(self, done: int) -> None:
        if self.shard_set is None:
            return
        workers = self.job.recipe.data.workers
        self.last = evaluate(
            self.model,
            self.shard_set,
            forward=self.engine,
            rank=self.job.rank,
            workers=workers,
            advance=lambda samples: self.clock.advance(),
        )
        official = self.last.official
        self.progress.say(
            f"step {done}: {self.shard_set.split} pixel accuracy {100 * official.pixel_accuracy:.2f} %, mean IoU "
            f"{100 * official.mean_iou:.2f} %"
        )
        self.summary = {"step": done, **self.last.summary()}
        if self.journal:
            self.journal.write("evaluate", done, **self.last.summary())


@dataclass
class Keeper:
    """Writes checkpoints."""

    run_dir: Path
    job: Job
    record: RunRecord
    engine: Engine
    progress: TrainingProgress
    journal: Journal | None

    def save(self, done: int, scores: dict[str, Any] | None) -> None:
        """Write and commit the checkpoint of step `done`. All ranks call it."""
        rank = self.job.rank
        folder = on_rank_zero(rank, lambda: checkpoints.prepare(self.run_dir, done))
        write_state(self.engine, folder, is_first_rank=rank.index == 0)
        barrier(rank)
        on_rank_zero(rank, lambda: self._commit(done, scores))

    def _commit(self, done: int, scores: dict[str, Any] | None) -> None:
        config = self.job.config
        state = CheckpointState(
            step=done,
            position=done * config.plan.global_batch,
            world_size=config.plan.world_size,
            zero_stage=config.zero_stage,
            precision=config.precision,
            model=self.record.model,
            recipe=self.record.recipe,
            deepspeed=self.record.deepspeed,
            index_sha256=self.record.index_sha256[TRAINING_SPLIT],
            scores=scores,
        )
        target = checkpoints.commit(self.run_dir, state)
        checkpoints.retain(self.run_dir, self.job.recipe.checkpoint.keep)
        self.progress.say(f"step {done}: wrote {target}")
        if self.journal:
            self.journal.write("checkpoint", done, path=str(target.relative_to(self.run_dir)))
