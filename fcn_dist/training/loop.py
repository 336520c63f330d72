"""The loop: batch, forward, backward, step; then log, evaluate and save when they are due."""

from functools import partial

from fcn_dist.data.loader import Batch
from fcn_dist.keys import key64
from fcn_dist.progress import TrainingProgress
from fcn_dist.training.augment import to_device
from fcn_dist.training.average import WeightAverage
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


def train_steps(
    job: Job,
    engine: Engine,
    average: WeightAverage,
    intake: Intake,
    check: StepCheck,
    meter: Meter,
    shortage: Shortage,
    clock: PhaseClock,
    pace: PaceReport,
    layers: LayerReport,
    first_step: int,
    progress: TrainingProgress,
    journal: Journal | None,
    scorer: Scorer,
    keeper: Keeper,
) -> int:
    """Train steps `first_step` to `job.steps`, or fewer if a rank is asked to stop; returns the steps done."""
    recipe = job.recipe
    done = first_step
    engine.train()
    for step in range(first_step, job.steps):
        clock.enter(Phase.DATA, step + 1)
        micro_batches = intake.take()
        clock.enter(Phase.AGREEING)
        agreed = intake.agree(step + 1, micro_batches)
        if agreed.stop:
            break
        done = step + 1
        rate = learning_rate(recipe.schedule, job.config.learning_rate, step, job.steps)
        set_learning_rate(engine, job.groups, rate)
        work = partial(accumulate, job, engine, check, meter, clock, layers, done, agreed.labelled)
        micro_batches = shortage.train(done, micro_batches, work)
        average_statistics(engine.module, job.rank)
        meter.add_step(check.finite(done, micro_batches))
        average.update()
        clock.enter(Phase.LOGGING)
        progress.step(done)
        layers.write(done)

        if due(done, recipe.log.every, job.steps):
            figures = meter.read(job, engine, done, rate)
            progress.figures(done, figures)
            if journal:
                journal.write("train", done, **figures)
            pace.compare(done)
        if due(done, recipe.evaluate.every, job.steps) and (done < job.steps or recipe.evaluate.at_end):
            clock.enter(Phase.EVALUATING)
            scorer.score(done)
        clock.enter(Phase.SAVING)
        keeper.advance()
        if done < job.steps and due(done, recipe.checkpoint.every, job.steps):
            keeper.save(done, scorer.summary)
    return done


def accumulate(
    job: Job,
    engine: Engine,
    check: StepCheck,
    meter: Meter,
    clock: PhaseClock,
    layers: LayerReport,
    done: int,
    labelled: int,
    micro_batches: list[Batch],
) -> None:
    """Train this rank's micro-batches of step `done`, whose global batch has so many labelled pixels."""
    # DeepSpeed averages over ranks and accumulation; the loss is a sum over labelled pixels of all of them.
    divisor = labelled if job.recipe.train.loss == "mean" else job.config.plan.global_batch
    scale = job.rank.world_size * len(micro_batches) / divisor
    for number, batch in enumerate(micro_batches, 1):
        clock.enter(Phase.FORWARD)
        images, targets = to_device(batch, job.recipe.data, job.recipe.train.seed, job.device)
        dropout_keys = [key64(job.recipe.train.seed, position) for position in batch.positions]
        losses = summed_losses(engine, job, images, targets, dropout_keys)
        clock.enter(Phase.BACKWARD)
        backward(engine, check.watch(losses.total(job.recipe.train.auxiliary)) * scale)
        if number == len(micro_batches):
            layers.look(done)
        engine.step()
        meter.add_losses(losses.shares(labelled))


def due(done: int, every: int, steps: int) -> bool:
    """Whether something at a cadence of `every` steps (0: at the end alone) falls after step `done`."""
    return done == steps or (every > 0 and done % every == 0)
