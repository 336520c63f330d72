"""Entering a run folder: to begin a run, or to continue one from its newest whole checkpoint; never by accident."""

import json
import platform
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from fcn_dist.checkpoints.commit import discard_all, set_aside
from fcn_dist.checkpoints.store import LATEST_NAME, Checkpoint, Damage, checkpoints_dir, committed, open_checkpoint
from fcn_dist.errors import UserError
from fcn_dist.ranks import Rank
from fcn_dist.scoring.agreement import raise_together
from fcn_dist.training.collective import on_rank_zero
from fcn_dist.training.runfolder import (
    RUN_NAME,
    TRAINING_SPLIT,
    RunRecord,
    read_journal,
    read_run_record,
    refuse_foreign_folder,
    write_run_record,
)
from fcn_dist.training.runlock import RunLock, sees

# How samples are fetched decides nothing of which they are.
NOT_DECISIVE = {"workers", "max_bad_samples", "cache_dir", "cache_limit", "read_ahead"}


class Start(Enum):
    """What is to be found in the run folder."""

    NEW = "no run"
    RESUME = "a run with a checkpoint"
    AUTO = "either"


@dataclass(frozen=True)
class Entry:
    """What was found in a run folder."""

    checkpoint: Checkpoint | None = None  # to continue from
    damages: list[Damage] = field(default_factory=list)  # of newer checkpoints
    finished: bool = False  # nothing is left to train

    @property
    def last(self) -> int | None:
        """Step of the checkpoint to continue from, if there is one."""
        return self.checkpoint.state.step if self.checkpoint else None

    @property
    def first_step(self) -> int:
        """The next to train, counted from 0."""
        return self.last or 0

    @property
    def scores(self) -> dict[str, Any] | None:
        """The last evaluation before that."""
        return self.checkpoint.state.scores if self.checkpoint else None


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


def enter(run_dir: Path, start: Start, record: RunRecord) -> Entry:
    """Begin a run in its folder, or find what to continue from. Rank 0 calls this, and holds the run's lock.

    Raises UserError if what is there is not what `start` says, if no checkpoint is whole, or if the run began with
    other data, seed, network or global batch.
    """
    refuse_foreign_folder(run_dir)
    if start is Start.NEW:
        refuse_begun(run_dir)
    if start is Start.NEW or (start is Start.AUTO and is_fresh(run_dir)):
        discard_all(run_dir)
        write_run_record(run_dir, record)
        return Entry()
    before = read_run_record(run_dir)
    found, damages = open_checkpoint(run_dir)
    refuse_another_run(before, record, run_dir)
    finished = found.state.step >= record.steps
    if finished and start is Start.RESUME:
        raise UserError(
            f"{run_dir} is trained to step {found.state.step} already, and the run has {record.steps}; more steps are "
            "needed to continue; raise --steps"
        )
    return Entry(found, damages, finished)


def refuse_begun(run_dir: Path) -> None:
    """Raise UserError if a run has begun in the folder."""
    if (run_dir / RUN_NAME).exists():
        raise UserError(
            f"{run_dir} holds a run already; a new folder is needed; give another --output, or --resume to continue it"
        )


def clear(run_dir: Path, entry: Entry) -> None:
    """Move damaged checkpoints out of the way, and remove what crashes have left, before the run goes on."""
    for damage in entry.damages:
        set_aside(damage.dir)
    discard_all(run_dir)


def is_fresh(run_dir: Path) -> bool:
    """Whether no checkpoint was ever committed in a run folder, so that to begin anew loses nothing.

    Raises UserError if checkpoints there were, and none is left.
    """
    if committed(run_dir):
        return False
    told = any(found["event"] == "checkpoint" for _, found in read_journal(run_dir))
    traces = [path.name for path in checkpoints_dir(run_dir).glob("damaged-step-*")]
    if told or traces or (checkpoints_dir(run_dir) / LATEST_NAME).exists():
        raise UserError(
            f"{run_dir} has no checkpoint any more, and it had; one is needed to continue; restore one from a copy, or "
            "give a new --output to begin anew"
        )
    return True


def refuse_another_run(before: RunRecord, now: RunRecord, run_dir: Path) -> None:
    """Raise UserError if what decides the samples or the network differs from what the run began with."""

    def decisive(record: RunRecord) -> dict[str, Any]:
        recipe = record.recipe
        return {
            **{f"data.{key}": value for key, value in recipe["data"].items() if key not in NOT_DECISIVE},
            **{
                f"model.{key}": value
                for key, value in recipe["model"].items()
                if key not in ("weights", "weights_licence")
            },
            "train.seed": recipe["train"]["seed"],
            "train.auxiliary > 0": recipe["train"]["auxiliary"] > 0,
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
