"""What a run does every so many steps: score the engine's weights."""

from dataclasses import dataclass
from typing import Any

from fcn_dist.data.shardset import ShardSet
from fcn_dist.model.fcn import FCN
from fcn_dist.progress import TrainingProgress
from fcn_dist.scoring.evaluate import evaluate
from fcn_dist.scoring.metrics import Scores
from fcn_dist.training.engine import Engine
from fcn_dist.training.job import Job
from fcn_dist.training.runfolder import Journal


@dataclass
class Scorer:
    """Evaluates the engine's weights and remembers the last scores, `summary` being what checkpoints say of them."""

    model: FCN
    engine: Engine
    shard_set: ShardSet | None
    job: Job
    progress: TrainingProgress
    journal: Journal | None
    summary: dict[str, Any] | None
    last: Scores | None = None

    def score(self, done: int) -> None:
        """Score the whole split with the weights of step `done`. All ranks call it."""
        if self.shard_set is None:
            return
        workers = self.job.recipe.data.workers
        self.last = evaluate(self.model, self.shard_set, forward=self.engine, rank=self.job.rank, workers=workers)
        official = self.last.official
        self.progress.say(
            f"step {done}: {self.shard_set.split} pixel accuracy {100 * official.pixel_accuracy:.2f} %, mean IoU "
            f"{100 * official.mean_iou:.2f} %"
        )
        self.summary = {"step": done, **self.last.summary()}
        if self.journal:
            self.journal.write("evaluate", done, **self.last.summary())
