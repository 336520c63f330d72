"""The loop: batch, forward, backward, step; then log, evaluate and save when they are due."""

from dataclasses import dataclass
from functools import partial

from fcn_dist.data.loader import Batch
from fcn_dist.keys import key64
from fcn_dist.training.augment import to_device
from fcn_dist.training.average import WeightAverage
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.engine import Engine, backward, set_learning_rate
from fcn_dist.training.finite import StepCheck
from fcn_dist.training.intake import Intake
from fcn_dist.training.job import Job
from fcn_dist.training.keeper import Keeper
from fcn_dist.training.layers import LayerReport
from fcn_dist.training.meter import Meter
from fcn_dist.training.objective import summed_losses
from fcn_dist.training.pace import PaceReport
from fcn_dist.training.phases import Phase, PhaseClock
from fcn_dist.training.runfolder import Journal
from fcn_dist.training.schedule import learning_rate
from fcn_dist.training.scorer import Scorer
from fcn_dist.training.shortage import Shortage
from fcn_dist.training.statistics import average_statistics


@dataclass(frozen=True)
class Trainer:
    """A job, its engine, and who does what in a step of it."""

    job: Job
    engine: Engine
    intake: Intake
    check: StepCheck
    shortage: Shortage
    average: WeightAverage
    meter: Meter
    layers: LayerReport
    pace: PaceReport
    clock: PhaseClock
    progress: TrainingDisplay
    journal: Journal | None  # on rank 0
    scorer: Scorer
    keeper: Keeper

    def train_steps(self, first_step: int) -> int:
        """Train steps `first_step` to `job.steps`, or fewer if a rank is asked to stop; returns the steps done."""
        job, recipe, engine, clock = self.job, self.job.recipe, self.engine, self.clock
        done = first_step
        engine.train()
        for step in range(first_step, job.steps):
            clock.enter(Phase.DATA, step + 1)
            micro_batches = self.intake.take()
            clock.enter(Phase.AGREEING)
            agreed = self.intake.agree(step + 1, micro_batches)
            if agreed.stop:
                if done > first_step and not due(done, recipe.log.every, job.steps):
                    self.log(done)
                break
            done = step + 1
            set_learning_rate(engine, job.groups, self.learning_rate(step))
            micro_batches = self.shortage.train(done, micro_batches, partial(self.accumulate, done, agreed.labelled))
            average_statistics(engine.module, job.rank)
            self.meter.add_step(self.check.finite(done, micro_batches))
            self.average.update()
            clock.enter(Phase.LOGGING)
            self.progress.step(done)
            self.layers.write(done)

            if due(done, recipe.log.every, job.steps):
                self.log(done)
            if due(done, recipe.evaluate.every, job.steps) and (done < job.steps or recipe.evaluate.at_end):
                clock.enter(Phase.EVALUATING)
                self.scorer.score(done)
            clock.enter(Phase.SAVING)
            self.keeper.advance()
            if done < job.steps and due(done, recipe.checkpoint.every, job.steps):
                self.keeper.save(done, self.scorer.summary)
        return done

    def accumulate(self, done: int, labelled: int, micro_batches: list[Batch]) -> None:
        """Train this rank's micro-batches of step `done`, whose global batch has so many labelled pixels."""
        job, engine, train = self.job, self.engine, self.job.recipe.train
        # DeepSpeed averages over ranks and accumulation; the loss is a sum over labelled pixels of all of them.
        divisor = labelled if train.loss == "mean" else job.config.plan.global_batch
        scale = job.rank.world_size * len(micro_batches) / divisor
        for number, batch in enumerate(micro_batches, 1):
            self.clock.enter(Phase.FORWARD)
            images, targets = to_device(batch, job.recipe.data, train.seed, job.device)
            dropout_keys = [key64(train.seed, position) for position in batch.positions]
            losses = summed_losses(engine, job, images, targets, dropout_keys)
            self.clock.enter(Phase.BACKWARD)
            backward(engine, self.check.watch(losses.total(train.auxiliary)) * scale)
            if number == len(micro_batches) and self.layers.due(done):
                self.clock.enter(Phase.LOGGING)
                self.layers.look()
                self.clock.enter(Phase.BACKWARD)
            engine.step()
            self.meter.add_losses(losses.shares(labelled))

    def log(self, done: int) -> None:
        """Figures of the steps up to `done` since this was called before. All ranks call it."""
        figures = self.meter.read(self.job, self.engine, done, self.learning_rate(done - 1))
        if self.journal:
            self.journal.write("train", done, **figures)
            self.progress.figures(done)
        self.pace.compare(done)

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        return learning_rate(self.job.recipe.schedule, self.job.config.learning_rate, step, self.job.steps)


def due(done: int, every: int, steps: int) -> bool:
    """Whether something at a cadence of `every` steps (0: at the end alone) falls after step `done`."""
    return done == steps or (every > 0 and done % every == 0)
