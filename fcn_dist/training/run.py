"""A whole training run: shards, a recipe and a DeepSpeed configuration in, a run folder out."""

from contextlib import ExitStack
from pathlib import Path

from fcn_dist.data.loader import build_loader
from fcn_dist.data.loaderprocesses import ended_with_the_block
from fcn_dist.errors import EXIT_REQUEUE, EarlyEnd, counted
from fcn_dist.lasting import lasting_output
from fcn_dist.scoring.metrics import Scores
from fcn_dist.training.bad_samples import BadSamples
from fcn_dist.training.beats import RANKS_DIR
from fcn_dist.training.boards import Board, Writer
from fcn_dist.training.collective import noticing_lost_peers, of_all_ranks
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.eventfiles import EventFiles
from fcn_dist.training.finite import StepCheck
from fcn_dist.training.intake import Intake
from fcn_dist.training.job import Job
from fcn_dist.training.keeper import Keeper
from fcn_dist.training.layers import LayerReport
from fcn_dist.training.librarylogs import kept_in
from fcn_dist.training.loop import Trainer
from fcn_dist.training.meter import Meter
from fcn_dist.training.offlinerun import OfflineRun
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
    with lasting_output(), heeding_signals() as stop, ended_with_the_block(), noticing_lost_peers():
        return _train(config, stop)


def _train(config: RunConfig, stop: StopRequest) -> Scores | None:
    ready = make_ready(config)
    job, rank, first_step = ready.job, ready.job.rank, ready.entry.first_step
    if ready.entry.finished:
        if rank.index == 0:
            print(f"{config.output} is trained to its last step, {job.steps}, already", flush=True)
        return None
    display = TrainingDisplay(job.steps, first_step, rank.world_size, ready.headline, shown=rank.index == 0)
    boards = open_boards(config.output, ready, display) if rank.index == 0 else []
    listeners = [display.hear, *(board.hear for board in boards)]
    journal = Journal(config.output, first_step, listeners) if rank.index == 0 else None
    events = DeviceEvents() if job.device.type == "cuda" else None
    clock = PhaseClock(first_step, events.mark) if events else PhaseClock(first_step)
    watchdog = start_watchdog(config.output / RANKS_DIR, rank, clock, job.recipe.train.watchdog)
    logs = kept_in(config.output / RANKS_DIR / f"rank-{rank.index:05d}.log")
    closing_boards = ExitStack()
    for board in boards:
        closing_boards.callback(board.close)
    with watchdog, waits_measured(clock), logs, closing_boards, display:
        if journal:
            if journal.left_out:
                display.say(f"left out of {journal.path}: {counted(journal.left_out, 'line')} that cannot be read")
            command, folder = ready.record.command, ready.record.folder
            size, steps = rank.world_size, job.steps
            journal.write("start", first_step, world_size=size, steps=steps, command=command, folder=folder)
        trainer = build_trainer(config.output, ready, stop, display, journal, clock, events)
        with trainer.keeper:
            done = trainer.train_steps(first_step)
        stop.saving = True
        reasons = stop_reasons(job, stop)
        if done < job.steps:
            display.say(f"asked to stop ({reasons}): saving step {done}")
        clock.enter(Phase.SAVING)
        trainer.keeper.close(done, trainer.scorer.summary)
        if summary := trainer.intake.bad_samples.summary():
            display.say(summary)
    if ready.lock:
        ready.lock.release()
    if done < job.steps:
        raise EarlyEnd(
            f"stopped after step {done} of {job.steps} ({reasons}); {trainer.keeper.newest}; continue with --resume or "
            f"--auto-resume (exit code {EXIT_REQUEUE})",
            EXIT_REQUEUE,
        )
    return trainer.scorer.last


def build_trainer(
    run_dir: Path,
    ready: Ready,
    stop: StopRequest,
    display: TrainingDisplay,
    journal: Journal | None,
    clock: PhaseClock,
    events: DeviceEvents | None,
) -> Trainer:
    """Who does what in a step. All ranks call it."""
    job, engine, average, entry = ready.job, ready.engine, ready.average, ready.entry
    rank, data, plan = job.rank, job.recipe.data, job.config.plan
    todo, on_gpu = range(entry.first_step, job.steps), job.device.type == "cuda"
    batches = build_loader(ready.shard_set, job.stream, plan, data, rank.index, todo, pin_memory=on_gpu)
    bad_samples = BadSamples(data.max_bad_samples, rank, display, journal)
    check = StepCheck(job, engine, ready.shard_set, run_dir, display, journal)
    meter = Meter(job.device, clock)
    return Trainer(
        job=job,
        engine=engine,
        intake=Intake(batches, plan.accumulation, rank, job.device, bad_samples, stop),
        check=check,
        shortage=Shortage(job, engine, check, meter, run_dir, ready.record, display, journal),
        average=average,
        meter=meter,
        layers=LayerReport(engine, job.recipe.log.layers, journal),
        pace=PaceReport(rank, clock, events, entry.first_step, display, journal),
        clock=clock,
        progress=display,
        journal=journal,
        scorer=Scorer(
            ready.model, engine, average, ready.validation, job, clock, display, journal, entry.scores, run_dir
        ),
        keeper=Keeper(run_dir, job, ready.record, engine, average, display, journal, entry.last),
    )


def open_boards(run_dir: Path, ready: Ready, display: TrainingDisplay) -> list[Board]:
    """Those that the recipe asks for. Of the learning rates, each group's has a curve of its own."""
    log, record, first_step = ready.job.recipe.log, ready.record, ready.entry.first_step
    writers: list[tuple[Writer, int]] = []
    if log.tensorboard:
        writers.append((EventFiles(run_dir, record, first_step), first_step))
    if log.wandb:
        writers.append((OfflineRun(run_dir, record, display.say), 0))
    multipliers = {group.name: group.multiplier for group in ready.job.groups}
    return [Board(run_dir, record, first, multipliers, writer) for writer, first in writers]


def stop_reasons(job: Job, stop: StopRequest) -> str:
    """Why which ranks were asked to stop, empty if none was. All ranks call it."""
    reasons = of_all_ranks(stop.reason, job.rank)
    return ", ".join(f"rank {index}: {reason}" for index, reason in enumerate(reasons) if reason)
