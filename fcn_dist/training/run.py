"""A whole training run: shards, a recipe and a DeepSpeed configuration in, a run folder out."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fcn_dist.config import Recipe
from fcn_dist.data.loader import build_loader
from fcn_dist.data.loaderprocesses import ended_with_the_block
from fcn_dist.data.remote.cache import node_cache
from fcn_dist.data.remote.urls import is_url
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.data.upcoming import check_cache_limit
from fcn_dist.errors import EXIT_REQUEUE, EarlyEnd, UserError
from fcn_dist.keys import Purpose, key64
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import FCN
from fcn_dist.model.preprocess import Preprocessing
from fcn_dist.model.pretrained import load_weights, read_weights
from fcn_dist.progress import TrainingProgress
from fcn_dist.ranks import BatchPlan, Rank
from fcn_dist.scoring.agreement import raise_together
from fcn_dist.scoring.metrics import Scores
from fcn_dist.training.bad_samples import BadSamples
from fcn_dist.training.beats import RANKS_DIR
from fcn_dist.training.collective import device, noticing_lost_peers, of_all_ranks, on_rank_zero, start_ranks
from fcn_dist.training.deepspeed_config import BATCH_KEYS, EngineConfig, resolve
from fcn_dist.training.engine import build_engine
from fcn_dist.training.entry import Entry, Start, clear, enter
from fcn_dist.training.finite import StepCheck
from fcn_dist.training.intake import Intake
from fcn_dist.training.job import Job
from fcn_dist.training.keeper import Keeper
from fcn_dist.training.loop import train_steps
from fcn_dist.training.pace import DeviceEvents, PaceReport
from fcn_dist.training.phases import Phase, PhaseClock
from fcn_dist.training.restore import change_of_cut, read_state
from fcn_dist.training.runfolder import (
    RUN_NAME,
    TRAINING_SPLIT,
    Journal,
    RunRecord,
    command_line,
    environment,
    read_run_record,
    refuse_foreign_folder,
)
from fcn_dist.training.runlock import RunLock, sees
from fcn_dist.training.schedule import check_warmup, parameter_groups, total_steps
from fcn_dist.training.scorer import Scorer
from fcn_dist.training.stop import StopRequest, heeding_signals
from fcn_dist.training.waits import waits_measured
from fcn_dist.training.watchdog import start_watchdog


@dataclass(frozen=True)
class RunConfig:
    """What `train` needs to know."""

    shards: str  # folder or URL with one shard set a split
    output: Path  # the run folder
    recipe: Recipe
    deepspeed: dict[str, Any]  # as read, "auto" not yet resolved
    start: Start = Start.NEW


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
    recipe = config.recipe
    shard_set, validation = open_splits(config)
    rank = Rank.from_environment()
    continued = config.start is not Start.NEW and (config.output / RUN_NAME).exists()
    begun = cut_of(read_run_record(config.output)) if continued else None
    engine_config = resolve(config.deepspeed, recipe, rank.world_size, begun)
    steps = total_steps(recipe.schedule, len(shard_set), engine_config.plan.global_batch)
    check_warmup(recipe.schedule, steps)
    check_cache_limit(shard_set, engine_config.plan, recipe.data, rank)
    model, description, filled = build_model(recipe, shard_set)

    start_ranks()
    groups = parameter_groups(model, recipe.schedule)
    engine = build_engine(model, engine_config, groups)
    record = run_record(config, engine_config, description, shard_set, validation, steps)
    lock = hold_run_folder(config.output, record.command, rank)
    entry = on_rank_zero(rank, lambda: enter(config.output, config.start, record))
    if entry.finished:
        if rank.index == 0:
            print(f"{config.output} is trained to its last step, {steps}, already", flush=True)
        return None
    found = entry.checkpoint
    first_step = found.state.step if found else 0
    if found:
        read_state(engine, engine_config, found, rank)
        assert found.state.position == first_step * engine_config.plan.global_batch
        on_rank_zero(rank, lambda: clear(config.output, entry))

    stream = SampleStream(shard_set, recipe.train.seed, window=recipe.data.window, lanes=recipe.data.lanes)
    job = Job(recipe, engine_config, groups, stream, model.stride, rank, device(rank), steps)
    pin = job.device.type == "cuda"
    todo = range(first_step, steps)
    batches = build_loader(shard_set, stream, engine_config.plan, recipe.data, rank.index, todo, pin)
    journal = Journal(config.output, first_step) if rank.index == 0 else None
    events = DeviceEvents() if job.device.type == "cuda" else None
    clock = PhaseClock(first_step, events.mark) if events else PhaseClock(first_step)
    watchdog = start_watchdog(config.output / RANKS_DIR, rank, clock, recipe.train.watchdog)
    with watchdog, waits_measured(clock), TrainingProgress(steps, first_step, shown=rank.index == 0) as progress:
        progress.say(headline(record, description, filled, entry))
        if found and (change := change_of_cut(found.state, engine_config)):
            progress.say(change)
        keeper = Keeper(config.output, job, record, engine, progress, journal, first_step if found else None)
        scorer = Scorer(model, engine, validation, job, clock, progress, journal, found.state.scores if found else None)
        if journal:
            journal.write("start", first_step, world_size=rank.world_size, command=record.command)
        bad_samples = BadSamples(recipe.data.max_bad_samples, rank, progress, journal)
        intake = Intake(batches, engine_config.plan.accumulation, rank, job.device, bad_samples, stop)
        budget = recipe.train.max_skipped_steps
        check = StepCheck(engine, engine_config, budget, shard_set, stream, rank, config.output, progress, journal)
        pace = PaceReport(rank, clock, job.device, events, first_step, progress, journal)
        try:
            done = train_steps(job, engine, intake, check, clock, pace, first_step, progress, journal, scorer, keeper)
        except EarlyEnd as end:  # which all ranks raise together
            keeper.finish()
            raise EarlyEnd(f"{end}; {keeper.newest}", end.code) from None
        except UserError:  # likewise
            keeper.finish()
            raise
        stop.saving = True
        clock.enter(Phase.SAVING)
        keeper.close(done, scorer.summary)
        if summary := bad_samples.summary():
            progress.say(summary)
    if lock:
        lock.release()
    if done < steps:
        raise stopped(job, keeper, stop, done)
    return scorer.last


def hold_run_folder(run_dir: Path, command: str, rank: Rank) -> RunLock | None:
    """Lock the run folder, on rank 0, which has the lock. All ranks call it.

    Raises UserError, on all ranks alike, if another job has the folder, or if a rank does not see the same one: each
    rank writes its share of a checkpoint into it.
    """
    lock: list[RunLock] = []

    def take() -> str:
        refuse_foreign_folder(run_dir)
        lock.append(RunLock(run_dir, command))
        return lock[0].token

    token = on_rank_zero(rank, take)
    failure = None
    if rank.index and not sees(run_dir, token):
        failure = UserError(
            f"rank {rank.index} on {platform.node()} does not find in {run_dir.absolute()} what rank 0 has written "
            "there; one folder that all nodes share is needed for the run; give an --output on a shared disk"
        )
    raise_together(failure, rank)
    return lock[0] if lock else None


def stopped(job: Job, keeper: Keeper, stop: StopRequest, done: int) -> EarlyEnd:
    """How a run ends that was asked to stop. All ranks call it."""
    reasons = of_all_ranks(stop.reason, job.rank)
    asked = ", ".join(f"rank {index}: {reason}" for index, reason in enumerate(reasons) if reason)
    return EarlyEnd(
        f"stopped after step {done} of {job.steps} ({asked}); {keeper.newest}; continue with --resume or --auto-resume "
        f"(exit code {EXIT_REQUEUE})",
        EXIT_REQUEUE,
    )


def open_splits(config: RunConfig) -> tuple[ShardSet, ShardSet | None]:
    """The training split, and the one to evaluate on unless the recipe never does."""
    data, evaluation = config.recipe.data, config.recipe.evaluate
    cache = node_cache(data.cache_dir, data.cache_limit) if is_url(config.shards) else None
    shard_set = ShardSet.open(config.shards, TRAINING_SPLIT, cache)
    if not evaluation.every and not evaluation.at_end:
        return shard_set, None
    validation = ShardSet.open(config.shards, evaluation.split, cache)
    if validation.classes != shard_set.classes:
        raise UserError(f"{validation.location} has other classes than {shard_set.location}; pack both splits together")
    return shard_set, validation


def build_model(recipe: Recipe, shard_set: ShardSet) -> tuple[FCN, ModelDescription, list[str]]:
    """The network with its first weights, what it is, and which of its modules came from a file."""
    weights: dict[str, torch.Tensor] = {}
    preprocessing = Preprocessing("RGB", shard_set.channel_mean, shard_set.channel_std)
    if recipe.model.weights:
        weights, preprocessing = read_weights(Path(recipe.model.weights), recipe.model.weights_convention)
    description = ModelDescription(
        recipe.model, preprocessing, shard_set.classes, shard_set.colours, recipe.data.score_other
    )
    torch.manual_seed(key64(recipe.train.seed, Purpose.WEIGHTS))
    model = description.build()
    filled = load_weights(model, weights, str(recipe.model.weights)) if weights else []
    return model, description, filled


def run_record(
    config: RunConfig,
    engine_config: EngineConfig,
    description: ModelDescription,
    shard_set: ShardSet,
    validation: ShardSet | None,
    steps: int,
) -> RunRecord:
    """Everything that decides what this run computes."""
    splits = [shard_set] + ([validation] if validation else [])
    return RunRecord(
        recipe=config.recipe.as_dict(),
        deepspeed=engine_config.values,
        model=description.as_dict(),
        shards=config.shards if is_url(config.shards) else str(Path(config.shards).resolve()),
        index_sha256={split.split: split.index_sha256 for split in splits},
        world_size=engine_config.plan.world_size,
        steps=steps,
        global_batch=engine_config.plan.global_batch,
        command=command_line(),
        **environment(),
    )


def cut_of(record: RunRecord) -> BatchPlan:
    """How the global batch of a run is cut, lanes apart."""
    micro_batch, accumulation = (record.deepspeed[key] for key in BATCH_KEYS[1:])
    return BatchPlan(record.global_batch, micro_batch, accumulation, record.world_size)


def headline(record: RunRecord, description: ModelDescription, filled: list[str], entry: Entry) -> str:
    """What is about to be trained, in a few lines."""
    model = description.config
    weights = f"{len(filled)} layers from {Path(str(model.weights)).name}" if filled else "random weights"
    cut = cut_of(record)
    sizes = (
        f"{cut.micro_batch}" if cut.nominal_batch == cut.global_batch else f"{cut.micro_batch - 1} or {cut.micro_batch}"
    )
    lines = [
        f"{model.variant} on {model.backbone} (width {model.width:g}), {len(description.classes)} classes, {weights}",
        f"{cut.world_size} ranks x micro-batch {sizes} x accumulation {cut.accumulation} = global batch "
        f"{cut.global_batch}; {record.steps} steps",
    ]
    lines += [f"passed over {damage.dir}: {damage.reason}" for damage in entry.damages]
    if entry.checkpoint:
        lines.append(f"continuing after step {entry.checkpoint.state.step}")
    return "\n".join(lines)
