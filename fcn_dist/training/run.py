"""A whole training run: shards, a recipe and a DeepSpeed configuration in, a run folder out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fcn_dist.checkpoints import store as checkpoints
from fcn_dist.checkpoints.store import Checkpoint
from fcn_dist.config import Recipe
from fcn_dist.data.loader import build_loader
from fcn_dist.data.remote.cache import node_cache
from fcn_dist.data.remote.urls import is_url
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.data.upcoming import check_cache_limit
from fcn_dist.errors import UserError
from fcn_dist.keys import Purpose, key64
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import FCN
from fcn_dist.model.preprocess import Preprocessing
from fcn_dist.model.pretrained import load_weights, read_weights
from fcn_dist.progress import TrainingProgress
from fcn_dist.ranks import BatchPlan, Rank
from fcn_dist.scoring.metrics import Scores
from fcn_dist.training.bad_samples import BadSamples
from fcn_dist.training.collective import device, on_rank_zero, start_ranks
from fcn_dist.training.deepspeed_config import BATCH_KEYS, EngineConfig, resolve
from fcn_dist.training.engine import build_engine
from fcn_dist.training.intake import Intake
from fcn_dist.training.loop import Job, train_steps
from fcn_dist.training.periodic import Keeper, Scorer
from fcn_dist.training.restore import change_of_cut, read_state
from fcn_dist.training.runfolder import (
    TRAINING_SPLIT,
    Journal,
    RunRecord,
    command_line,
    create_run_folder,
    environment,
    read_run_record,
    write_run_record,
)
from fcn_dist.training.schedule import check_warmup, parameter_groups, total_steps

# How samples are fetched decides nothing of which they are.
NOT_DECISIVE = {"workers", "max_bad_samples", "cache_dir", "cache_limit", "read_ahead"}


@dataclass(frozen=True)
class RunConfig:
    """What `train` needs to know."""

    shards: str  # folder or URL with one shard set a split
    output: Path  # the run folder
    recipe: Recipe
    deepspeed: dict[str, Any]  # as read, "auto" not yet resolved
    resume: bool = False


def train(config: RunConfig) -> Scores | None:
    """Train to the recipe's last step, on the ranks a launcher started or on one device.

    Returns the last evaluation's scores, the same on every rank; None if there was none.
    Raises UserError for what is wrong with shards, recipe, configuration or run folder, before anything is written.
    """
    recipe = config.recipe
    shard_set, validation = open_splits(config)
    rank = Rank.from_environment()
    begun = cut_of(read_run_record(config.output)) if config.resume else None
    engine_config = resolve(config.deepspeed, recipe, rank.world_size, begun)
    steps = total_steps(recipe.schedule, len(shard_set), engine_config.plan.global_batch)
    check_warmup(recipe.schedule, steps)
    check_cache_limit(shard_set, engine_config.plan, recipe.data, rank)
    model, description, filled = build_model(recipe, shard_set)

    start_ranks()
    groups = parameter_groups(model, recipe.schedule)
    engine = build_engine(model, engine_config, groups)
    record = run_record(config, engine_config, description, shard_set, validation, steps)
    found = on_rank_zero(rank, lambda: enter_run_folder(config, record))
    first_step = 0
    if found:
        read_state(engine, engine_config, found, rank)
        first_step = found.state.step
        assert found.state.position == first_step * engine_config.plan.global_batch

    stream = SampleStream(shard_set, recipe.train.seed, window=recipe.data.window, lanes=recipe.data.lanes)
    job = Job(recipe, engine_config, groups, stream, model.stride, rank, device(rank), steps)
    pin = job.device.type == "cuda"
    todo = range(first_step, steps)
    batches = build_loader(shard_set, stream, engine_config.plan, recipe.data, rank.index, todo, pin)
    journal = Journal(config.output, first_step) if rank.index == 0 else None
    with TrainingProgress(steps, first_step, shown=rank.index == 0) as progress:
        progress.say(headline(record, description, filled, first_step))
        if found and (change := change_of_cut(found.state, engine_config)):
            progress.say(change)
        keeper = Keeper(config.output, job, record, engine, progress, journal)
        scorer = Scorer(model, engine, validation, job, progress, journal, found.state.scores if found else None)
        if journal:
            journal.write("start", first_step, world_size=rank.world_size, command=record.command)
        bad_samples = BadSamples(recipe.data.max_bad_samples, rank, progress, journal)
        intake = Intake(batches, engine_config.plan.accumulation, rank, job.device, bad_samples)
        train_steps(
            job, engine, intake, first_step, progress, journal, scorer, lambda done: keeper.save(done, scorer.summary)
        )
        if summary := bad_samples.summary():
            progress.say(summary)
    return scorer.last


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


def enter_run_folder(config: RunConfig, record: RunRecord) -> Checkpoint | None:
    """Create the run folder, or find the checkpoint to continue from. Rank 0 calls this."""
    if not config.resume:
        create_run_folder(config.output)
        write_run_record(config.output, record)
        return None
    before = read_run_record(config.output)
    found, damages = checkpoints.open_checkpoint(config.output)
    for damage in damages:
        print(f"passed over {damage.dir}: {damage.reason}", flush=True)
    refuse_another_run(before, record, config.output)
    if found.state.step >= record.steps:
        raise UserError(
            f"{config.output} is trained to step {found.state.step} already, and the run has {record.steps}; more "
            "steps are needed to continue; raise --steps"
        )
    return found


def cut_of(record: RunRecord) -> BatchPlan:
    """How the global batch of a run is cut, lanes apart."""
    micro_batch, accumulation = (record.deepspeed[key] for key in BATCH_KEYS[1:])
    return BatchPlan(record.global_batch, micro_batch, accumulation, record.world_size)


def refuse_another_run(before: RunRecord, now: RunRecord, run_dir: Path) -> None:
    """Raise UserError if what decides the samples or the network differs from what the run began with."""

    def decisive(record: RunRecord) -> dict[str, Any]:
        recipe = record.recipe
        return {
            **{f"data.{key}": value for key, value in recipe["data"].items() if key not in NOT_DECISIVE},
            **{f"model.{key}": value for key, value in recipe["model"].items() if key != "weights"},
            "train.seed": recipe["train"]["seed"],
            "the global batch": record.global_batch,
            "the training index's SHA-256": record.index_sha256[TRAINING_SPLIT],
        }

    # Through JSON, where run.json has been: a tuple is then a list on both sides.
    theirs, ours = decisive(before), decisive(RunRecord(**_json_form(vars(now))))
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise UserError(
                f"{key} is {value}, and {run_dir} began with {theirs.get(key)}; to continue a run it must stay the "
                "same; change it back, or start a new run with another --output"
            )


def _json_form(values: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(values)))


def headline(record: RunRecord, description: ModelDescription, filled: list[str], first_step: int) -> str:
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
    if first_step:
        lines.append(f"continuing after step {first_step}")
    return "\n".join(lines)
