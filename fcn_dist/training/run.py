"""A whole training run: shards, a recipe and a DeepSpeed configuration in, a run folder out."""

from contextlib import closing, nullcontext
from pathlib import Path

from fcn_dist.data.loader import build_loader
from fcn_dist.data.loaderprocesses import ended_with_the_block
from fcn_dist.errors import EXIT_REQUEUE, EarlyEnd
from fcn_dist.scoring.metrics import Scores
from fcn_dist.training.bad_samples import BadSamples
from fcn_dist.training.beats import RANKS_DIR
from fcn_dist.training.boards import TensorBoard
from fcn_dist.training.collective import noticing_lost_peers, of_all_ranks
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.finite import StepCheck
from fcn_dist.training.intake import Intake
from fcn_dist.training.job import Job
from fcn_dist.training.keeper import Keeper
from fcn_dist.training.layers import LayerReport
from fcn_dist.training.librarylogs import kept_in
from fcn_dist.training.loop import Trainer
from fcn_dist.training.meter import Meter
from fcn_dist.training.pace import DeviceEvents, PaceReport
from fcn_dist.training.phases import Phase, PhaseClock
from fcn_dist.training.ready import Ready, RunConfig, make_ready
from fcn_dist.training.runfolder import Journal
from fcn_dist.training.scorer import Scorer
from fcn_dist.training.shortage import Shortage
from fcn_dist.training.stop import StopRequest, heeding_signals
from fcn_dist.training.waits import waits_measured
from fcn_dist.training.watchdog import start_watchdog


def train(config: RunConfig) -> Scores | None:
    """Train to the recipe's last step, on the ranks a launcher started or on one device.

    Returns the last evaluation's scores, the same on every rank; None if there was none.
    Raises UserError for what is wrong with shards, recipe, configuration or run folder, before anything is written;
    EarlyEnd, on all ranks, once the state is saved, if any of them was asked to stop (see stop.py); LostPeer if another
    rank has died.
    """
    with heeding_signals() as stop, ended_with_the_block(), noticing_lost_peers():
        return _train(config, stop)


def _train(config: RunConfig, stop: StopRequest) -> Scores | None:
    ready = make_ready(config)
    job, engine, average = ready.job, ready.engine, ready.average
    rank, first_step = job.rank, ready.entry.first_step
    if ready.entry.finished:
        if rank.index == 0:
            print(f"{config.output} is trained to its last step, {job.steps}, already", flush=True)
        return None
    data, plan, on_gpu = job.recipe.data, job.config.plan, job.device.type == "cuda"
    todo = range(first_step, job.steps)
    batches = build_loader(ready.shard_set, job.stream, plan, data, rank.index, todo, pin_memory=on_gpu)
    display = TrainingDisplay(job.steps, first_step, rank.world_size, ready.headline, shown=rank.index == 0)
    board = open_board(config.output, ready) if job.recipe.log.tensorboard and rank.index == 0 else None
    listeners = [display.hear, *([board.hear] if board else [])]
    journal = Journal(config.output, first_step, listeners) if rank.index == 0 else None
    events = DeviceEvents() if on_gpu else None
    clock = PhaseClock(first_step, events.mark) if events else PhaseClock(first_step)
    watchdog = start_watchdog(config.output / RANKS_DIR, rank, clock, job.recipe.train.watchdog)
    logs = kept_in(config.output / RANKS_DIR / f"rank-{rank.index:05d}.log")
    closing_board = closing(board) if board else nullcontext()
    with watchdog, waits_measured(clock), logs, closing_board, display as progress:
        keeper = Keeper(config.output, job, ready.record, engine, average, progress, journal, ready.entry.last)
        scores = ready.entry.scores
        scorer = Scorer(
            ready.model, engine, average, ready.validation, job, clock, progress, journal, scores, config.output
        )
        if journal:
            command = ready.record.command
            journal.write("start", first_step, world_size=rank.world_size, steps=job.steps, command=command)
        bad_samples = BadSamples(data.max_bad_samples, rank, progress, journal)
        intake = Intake(batches, plan.accumulation, rank, job.device, bad_samples, stop)
        check = StepCheck(job, engine, ready.shard_set, config.output, progress, journal)
        meter = Meter(job.device, clock)
        trainer = Trainer(
            job=job,
            engine=engine,
            intake=intake,
            check=check,
            shortage=Shortage(job, engine, check, meter, config.output, ready.record, progress, journal),
            average=average,
            meter=meter,
            layers=LayerReport(engine, job.recipe.log.layers, journal),
            pace=PaceReport(rank, clock, events, first_step, progress, journal),
            clock=clock,
            progress=progress,
            journal=journal,
            scorer=scorer,
            keeper=keeper,
        )
        with keeper:
            done = trainer.train_steps(first_step)
        stop.saving = True
        clock.enter(Phase.SAVING)
        keeper.close(done, scorer.summary)
        if summary := bad_samples.summary():
            progress.say(summary)
    if ready.lock:
        ready.lock.release()
    if done < job.steps:
        raise stopped(job, keeper, stop, done)
    return scorer.last


def open_board(run_dir: Path, ready: Ready) -> TensorBoard:
    """Of the learning rates, each group's has a curve of its own."""
    multipliers = {group.name: group.multiplier for group in ready.job.groups}
    return TensorBoard(run_dir, ready.record, ready.entry.first_step, multipliers)


def stopped(job: Job, keeper: Keeper, stop: StopRequest, done: int) -> EarlyEnd:
    """How a run ends that was asked to stop. All ranks call it."""
    reasons = of_all_ranks(stop.reason, job.rank)
    asked = ", ".join(f"rank {index}: {reason}" for index, reason in enumerate(reasons) if reason)
    return EarlyEnd(
        f"stopped after step {done} of {job.steps} ({asked}); {keeper.newest}; continue with --resume or --auto-resume "
        f"(exit code {EXIT_REQUEUE})",
        EXIT_REQUEUE,
    )
