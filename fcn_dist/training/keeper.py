"""When a checkpoint is written, and what becomes of it: copies taken on all ranks, written, agreed on, committed."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from fcn_dist.checkpoints.commit import WrittenFile, commit, discard, prepare
from fcn_dist.checkpoints.retention import retain
from fcn_dist.checkpoints.store import CheckpointState
from fcn_dist.errors import EarlyEnd, UserError
from fcn_dist.training.average import WeightAverage
from fcn_dist.training.collective import of_all_ranks, on_rank_zero, sum_over_ranks
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.engine import Engine
from fcn_dist.training.job import Job
from fcn_dist.training.runfolder import TRAINING_SPLIT, Journal, RunRecord
from fcn_dist.training.state import take_state
from fcn_dist.training.writing import Writing


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written."""

    step: int
    folder: Path
    state: CheckpointState
    writing: Writing
    stalled: float  # seconds that training stood still for it


class Keeper:
    """Writes checkpoints. Every method is called by all ranks at the same step."""

    def __init__(
        self,
        run_dir: Path,
        job: Job,
        record: RunRecord,
        engine: Engine,
        average: WeightAverage,
        progress: TrainingDisplay,
        journal: Journal | None,
        last: int | None,
    ) -> None:
        """`last` is the step of the checkpoint that the run continues from, if it does."""
        self.last = last  # step of the newest checkpoint that is committed
        self._run_dir, self._job, self._record = run_dir, job, record
        self._engine, self._average = engine, average
        self._progress, self._journal = progress, journal
        self._pending: Pending | None = None
        self._failures = 0  # in a row

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Commit what is being written also where the block ends early, if all ranks end it together."""
        if isinstance(error, (EarlyEnd, UserError)):
            self.finish()
        if isinstance(error, EarlyEnd):
            raise EarlyEnd(f"{error}; {self.newest}", error.code) from None

    @property
    def newest(self) -> str:
        """What there is to continue from, in words."""
        return "there is no checkpoint yet" if self.last is None else f"step {self.last} is the newest checkpoint"

    def save(self, done: int, scores: dict[str, Any] | None) -> None:
        """Begin the checkpoint of step `done`, and end it, too, unless it is written in the background.

        Raises UserError, on all ranks alike, when more saves in a row have failed than may.
        """
        self.finish()
        began = time.perf_counter()
        rank = self._job.rank
        folder, failure = on_rank_zero(rank, lambda: _prepared(self._run_dir, done))
        if folder is None:
            self._failed(done, failure)
            return
        contents = take_state(self._engine, self._average, folder, is_first_rank=rank.index == 0)
        background = self._job.recipe.checkpoint.background
        writing = Writing(contents, background)
        self._pending = Pending(done, folder, self._state(done, scores), writing, time.perf_counter() - began)
        if not background:
            self.finish()

    def advance(self) -> None:
        """Commit what has been written meanwhile, if all ranks have."""
        if self._pending:
            over = torch.tensor(int(self._pending.writing.over), device=self._job.device)
            if int(sum_over_ranks(over, self._job.rank)) == self._job.rank.world_size:
                self.finish()

    def finish(self) -> None:
        """Wait for what is being written, and commit it."""
        if not self._pending:
            return
        pending, self._pending = self._pending, None
        pending.writing.wait()
        files, failure = self._gathered(pending)
        if not failure:
            failure = on_rank_zero(self._job.rank, lambda: self._commit(pending, files))
        if failure:
            on_rank_zero(self._job.rank, lambda: discard(pending.folder))
            self._failed(pending.step, failure)
        else:
            self._failures, self.last = 0, pending.step

    def close(self, done: int, scores: dict[str, Any] | None) -> None:
        """Have the state after step `done`, the last that is trained now, committed."""
        self.finish()
        if done and done != self.last:
            self.save(done, scores)
            self.finish()

    def _gathered(self, pending: Pending) -> tuple[dict[str, WrittenFile], str]:
        """The files of all ranks, by their paths in the checkpoint, and the first failure, empty if there is none."""
        rank, writing = self._job.rank, pending.writing
        failure = f"rank {rank.index}: {writing.failure}" if writing.failure else ""
        own = ({path.relative_to(pending.folder).as_posix(): file for path, file in writing.files.items()}, failure)
        gathered = of_all_ranks(own, rank)
        failures = [failure for _, failure in gathered if failure]
        return {name: file for files, _ in gathered for name, file in files.items()}, next(iter(failures), "")

    def _commit(self, pending: Pending, files: dict[str, WrittenFile]) -> str:
        """Make the files a checkpoint; returns why that failed, empty if it did not."""
        try:
            target = commit(pending.folder, pending.state, dict(sorted(files.items())))
            retain(self._run_dir, target, self._job.recipe.checkpoint)
            seconds = {"stalled": round(pending.stalled, 3), "written_in": round(pending.writing.seconds, 3)}
            if self._journal:
                path = str(target.relative_to(self._run_dir))
                self._journal.write("checkpoint", pending.step, path=path, **seconds)
        except OSError as error:
            return str(error)
        self._progress.say(f"step {pending.step}: wrote {target}")
        return ""

    def _failed(self, step: int, failure: str) -> None:
        self._failures += 1
        allowed = self._job.recipe.checkpoint.max_failures
        trouble = f"the checkpoint of step {step} could not be written: {failure}; {self.newest}"
        cure = "make room or mend the disk, and continue with --resume"
        if step == self._job.steps:
            raise UserError(f"{trouble}; the last checkpoint of a run is needed; {cure}")
        if self._failures > allowed:
            raise UserError(f"{trouble}; checkpoint.max_failures allows {allowed} failures in a row; {cure}")
        self._progress.say(f"warning: {trouble}; training goes on ({self._failures} of {allowed} failures allowed)")

    def _state(self, done: int, scores: dict[str, Any] | None) -> CheckpointState:
        config = self._job.config
        return CheckpointState(
            step=done,
            position=done * config.plan.global_batch,
            world_size=config.plan.world_size,
            zero_stage=config.zero_stage,
            precision=config.precision,
            model=self._record.model,
            recipe=self._record.recipe,
            deepspeed=config.values,
            index_sha256=self._record.index_sha256[TRAINING_SPLIT],
            scores=scores,
        )


def _prepared(run_dir: Path, step: int) -> tuple[Path | None, str]:
    try:
        return prepare(run_dir, step), ""
    except OSError as error:
        return None, str(error)
