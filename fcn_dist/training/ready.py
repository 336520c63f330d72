"""What a run needs before its next step: all checked, engine built, run folder entered, state restored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fcn_dist.addresses import is_url
from fcn_dist.config import Recipe
from fcn_dist.data.remote.cache import node_cache
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.data.upcoming import check_cache_limit
from fcn_dist.errors import UserError, counted
from fcn_dist.keys import Purpose, key64
from fcn_dist.model.auxiliary import add_auxiliary_heads
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import FCN
from fcn_dist.model.preprocess import Preprocessing
from fcn_dist.model.pretrained import load_weights, read_weights
from fcn_dist.ranks import BatchPlan, Rank
from fcn_dist.training.average import WeightAverage
from fcn_dist.training.collective import device, on_rank_zero, start_ranks
from fcn_dist.training.compiling import compile_network
from fcn_dist.training.deepspeed_config import BATCH_KEYS, EngineConfig, resolve
from fcn_dist.training.engine import Engine, build_engine
from fcn_dist.training.entry import Entry, Start, clear, enter, hold_run_folder, refuse_begun
from fcn_dist.training.eventfiles import summary_writer
from fcn_dist.training.fit import fit
from fcn_dist.training.job import Job
from fcn_dist.training.offlinerun import wandb_module
from fcn_dist.training.restore import change_of_average, change_of_cut, read_state
from fcn_dist.training.runfolder import (
    RUN_NAME,
    TRAINING_SPLIT,
    RunRecord,
    command_line,
    environment,
    read_run_record,
)
from fcn_dist.training.runlock import RunLock
from fcn_dist.training.schedule import check_warmup, parameter_groups, total_steps


@dataclass(frozen=True)
class RunConfig:
    """What `train` needs to know."""

    shards: str  # folder or URL with one shard set a split
    output: Path  # the run folder
    recipe: Recipe
    deepspeed: dict[str, Any]  # as read, "auto" not yet resolved
    start: Start = Start.NEW


@dataclass(frozen=True)
class Ready:
    """What a run needs before its next step."""

    job: Job
    engine: Engine
    average: WeightAverage
    model: FCN
    shard_set: ShardSet
    validation: ShardSet | None
    record: RunRecord
    entry: Entry
    lock: RunLock | None  # on rank 0
    headline: str


def make_ready(config: RunConfig) -> Ready:
    """Check all that can be wrong, build the engine, enter the run folder, and restore the state if there is one."""
    if config.start is Start.NEW:
        refuse_begun(config.output)  # before anything of the run that is wanted instead
    recipe, rank = config.recipe, Rank.from_environment()
    shard_set, validation = open_splits(config)
    continued = config.start is not Start.NEW and (config.output / RUN_NAME).exists()
    begun = cut_of(read_run_record(config.output)) if continued else None
    engine_config = resolve(config.deepspeed, recipe, rank.world_size, begun)
    steps = total_steps(recipe.schedule, len(shard_set), engine_config.plan.global_batch)
    check_warmup(recipe.schedule, steps)
    check_cache_limit(shard_set, engine_config.plan, recipe.data, rank)
    if recipe.log.tensorboard:
        summary_writer()
    if recipe.log.wandb:
        wandb_module()
    model, description, filled = build_model(recipe, shard_set)

    start_ranks()
    engine_config, fitted = fit(engine_config, recipe, model, rank)
    if recipe.train.compile:
        compile_network(model, engine_config.zero_stage, device(rank))
    groups = parameter_groups(model, recipe.schedule)
    engine = build_engine(model, engine_config, groups)
    average = WeightAverage(engine, recipe.train.ema)
    record = run_record(config, engine_config, description, shard_set, validation, steps)
    lock = hold_run_folder(config.output, record.command, rank)
    entry = on_rank_zero(rank, lambda: enter(config.output, config.start, record))
    lines = headline(record, description, filled, entry) + fitted
    if entry.checkpoint and not entry.finished:
        read_state(engine, engine_config, entry.checkpoint, rank)
        assert entry.checkpoint.state.position == entry.first_step * engine_config.plan.global_batch
        on_rank_zero(rank, lambda: clear(config.output, entry))
        lines += change_of_cut(entry.checkpoint.state, engine_config)
        lines += change_of_average(entry.checkpoint.state, recipe.train.ema)
    average.begin()
    stream = SampleStream(shard_set, recipe.train.seed, window=recipe.data.window, lanes=recipe.data.lanes)
    job = Job(recipe, engine_config, groups, stream, model.stride, model.offset, rank, device(rank), steps)
    return Ready(job, engine, average, model, shard_set, validation, record, entry, lock, "\n".join(lines))


def open_splits(config: RunConfig) -> tuple[ShardSet, ShardSet | None]:
    """The training split, and the one to evaluate on unless the recipe never does."""
    data, evaluation = config.recipe.data, config.recipe.evaluate
    cache = node_cache(data.cache_dir, data.cache_limit) if is_url(config.shards) else None
    shard_set = ShardSet.open(config.shards, TRAINING_SPLIT, cache)
    if not evaluation.every and not evaluation.at_end:
        return shard_set, None
    try:
        validation = ShardSet.open(config.shards, evaluation.split, cache)
    except UserError as error:
        raise UserError(
            f"{error}; or train without an evaluation: --set evaluate.at_end=false --set evaluate.every=0"
        ) from error
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
    model.recompute_stages, model.recompute_images = recipe.train.recompute_stages, recipe.train.recompute_images
    filled = load_weights(model, weights, str(recipe.model.weights)) if weights else []
    if recipe.train.auxiliary:
        add_auxiliary_heads(model)
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
        folder=str(Path.cwd()),
        **environment(),
    )


def cut_of(record: RunRecord) -> BatchPlan:
    """How the global batch of a run is cut, lanes apart."""
    micro_batch, accumulation = (record.deepspeed[key] for key in BATCH_KEYS[1:])
    return BatchPlan(record.global_batch, micro_batch, accumulation, record.world_size)


def headline(record: RunRecord, description: ModelDescription, filled: list[str], entry: Entry) -> list[str]:
    """What is about to be trained, in a few lines."""
    model = description.config
    weights = f"{len(filled)} layers from {Path(str(model.weights)).name}" if filled else "random weights"
    if model.frozen_stages and not filled:
        weights += f", {model.frozen_stages} stages frozen as they were drawn (set model.weights, or no frozen_stages)"
    cut = cut_of(record)
    sizes = (
        f"{cut.micro_batch}" if cut.nominal_batch == cut.global_batch else f"{cut.micro_batch - 1} or {cut.micro_batch}"
    )
    lines = [
        f"{model.variant} on {model.backbone} (width {model.width:g}), {len(description.classes)} classes, {weights}",
        f"{counted(cut.world_size, 'rank')} x micro-batch {sizes} x accumulation {cut.accumulation} = global batch "
        f"{cut.global_batch}; {record.steps} steps",
    ]
    lines += [f"passed over {damage.dir}: {damage.reason}" for damage in entry.damages]
    if entry.checkpoint:
        lines.append(f"continuing after step {entry.first_step}")
    return lines
