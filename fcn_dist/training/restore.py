"""A checkpoint into a live engine: by DeepSpeed's own load where nothing is cut otherwise, else by `placement`."""

from typing import Any

from fcn_dist.checkpoints.store import DEEPSPEED_TAG, Checkpoint, CheckpointState
from fcn_dist.checkpoints.trainingstate import TrainingState, read_training_state
from fcn_dist.errors import UserError
from fcn_dist.ranks import Rank
from fcn_dist.scoring.agreement import raise_together
from fcn_dist.training.deepspeed_config import EngineConfig
from fcn_dist.training.engine import Engine
from fcn_dist.training.placement import place, refuse_offload

# Keys of zero_optimization that decide what lies where in DeepSpeed's files.
ZERO_KEYS = (
    *("stage", "sub_group_size", "round_robin_gradients", "parameter_alignment", "elastic_checkpoint"),
    *("offload_optimizer", "offload_param", "zero_hpz_partition_size"),
)


def read_state(engine: Engine, config: EngineConfig, checkpoint: Checkpoint, rank: Rank) -> None:
    """Restore weights, masters, optimizer, loss scale, counters, buffers and frozen parameters. All ranks call it.

    Raises UserError, on all ranks alike, if what another cut needs cannot be read or placed.
    """
    saved = checkpoint.state
    now = layout_of(config.values, config.plan.world_size)
    if layout_of(saved.deepspeed, saved.world_size) == now:
        path, _ = engine.load_checkpoint(str(checkpoint.dir), tag=DEEPSPEED_TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed did not load {checkpoint.dir}, whose files are whole")
        return
    refuse_offload(saved.deepspeed)
    place(_read_together(checkpoint, rank), engine, str(checkpoint.dir))


def _read_together(checkpoint: Checkpoint, rank: Rank) -> TrainingState:
    failure: UserError | None = None
    try:
        state = read_training_state(checkpoint.dir / DEEPSPEED_TAG)
    except UserError as error:
        failure = error
    raise_together(failure, rank)
    return state


def layout_of(values: dict[str, Any], world_size: int) -> dict[str, Any]:
    """What decides how DeepSpeed lays a training state out, of a resolved configuration."""
    zero, optimizer = values.get("zero_optimization", {}), values["optimizer"]
    return {
        "world_size": world_size,
        "optimizer": (optimizer["type"], optimizer["params"].get("torch_adam")),
        **{key: values.get(key) for key in ("bf16", "fp16", "data_types", "torch_autocast")},
        **{key: zero.get(key) for key in ZERO_KEYS},
    }


def change_of_cut(saved: CheckpointState, config: EngineConfig) -> list[str]:
    """A line on how the checkpoint was cut and how the run is cut now, unless that is the same."""
    plan = config.plan
    before = _cut(saved.world_size, saved.zero_stage, saved.precision, saved.deepspeed)
    now = _cut(plan.world_size, config.zero_stage, config.precision, config.values)
    return [] if before == now else [f"the checkpoint was cut for {before}; the run is cut for {now}"]


def change_of_average(saved: CheckpointState, decay: float | None) -> list[str]:
    """A line on the moving average of the weights, unless it goes on as it was."""
    before, step = saved.recipe["train"]["ema"], saved.step
    if decay == before:
        return []
    if decay is None:
        return [f"train.ema is off, and was {before}: the averaged weights of step {step} are not carried on"]
    if before is None:
        return [f"train.ema is {decay}, and was off: the average begins with the weights of step {step}"]
    return [f"train.ema is {decay} from here on, and was {before} up to step {step}"]


def _cut(world_size: int, stage: int, precision: str, values: dict[str, Any]) -> str:
    micro_batch = values["train_micro_batch_size_per_gpu"]
    accumulation = values["gradient_accumulation_steps"]
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    return f"{ranks} x accumulation {accumulation} x up to {micro_batch} images, ZeRO stage {stage}, {precision}"
