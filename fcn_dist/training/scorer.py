"""What a run does every so many steps: score the engine's weights, or their average."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcn_dist.data.shardset import ShardSet
from fcn_dist.model.fcn import FCN
from fcn_dist.scoring.evaluate import evaluate
from fcn_dist.scoring.metrics import Scores
from fcn_dist.training.average import WeightAverage
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.engine import Engine
from fcn_dist.training.gallery import Chosen, choose, predicted, write_predictions
from fcn_dist.training.job import Job
from fcn_dist.training.phases import PhaseClock
from fcn_dist.training.runfolder import Journal


@dataclass
class Scorer:
    """Evaluates the weights, averaged where they are, and remembers the last scores; checkpoints tell `summary`."""

    model: FCN
    engine: Engine
    average: WeightAverage
    shard_set: ShardSet | None
    job: Job
    clock: PhaseClock
    progress: TrainingDisplay
    journal: Journal | None
    summary: dict[str, Any] | None
    run_dir: Path
    last: Scores | None = None

    def score(self, done: int) -> None:
        """Score the whole split with the weights of step `done`. All ranks call it."""
        if self.shard_set is None:
            return
        recipe = self.job.recipe
        with self.average.in_use():
            self.last = evaluate(
                self.model,
                self.shard_set,
                forward=self.engine,
                rank=self.job.rank,
                workers=recipe.data.workers,
                advance=lambda samples: self.clock.advance(),
            )
            chosen = choose(self.last.scenes, recipe.evaluate.scenes)
            pictures = predicted(
                self.model, self.engine, self.shard_set, chosen, self.job.rank, advance=self.clock.advance
            )
        weights = "trained" if self.average.decay is None else "averaged"
        official = self.last.official
        self.progress.say(
            f"step {done}: {self.shard_set.split} pixel accuracy {100 * official.pixel_accuracy:.2f} %, mean IoU "
            f"{100 * official.mean_iou:.2f} % with the {weights} weights"
        )
        told = {"weights": weights, **self.last.summary()}
        self.summary = {"step": done, **told}
        if self.journal:
            self._keep(done, weights, chosen, pictures)
            self.journal.write("evaluate", done, **told)  # whose listeners find the pictures

    def _keep(self, done: int, weights: str, chosen: list[Chosen], pictures: dict[str, bytes]) -> None:
        """For people to look at. Training does not need it, so that it goes on without where the disk is full."""
        assert self.last and self.shard_set
        try:
            write_predictions(self.run_dir, done, weights, self.last, self.shard_set, chosen, pictures)
        except OSError as error:
            self.progress.say(f"what step {done} predicts is not written to {self.run_dir}: {error.strerror}")
