"""A run folder in, the weights of its newest checkpoint that has them whole out, and which were passed over and why."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fcn_dist.checkpoints.consolidate import Consolidated, Weights, consolidate
from fcn_dist.checkpoints.restricted import Unreadable
from fcn_dist.checkpoints.store import DEEPSPEED_TAG, Checkpoint, Damage, check_listed, newest, while_removed
from fcn_dist.errors import UserError
from fcn_dist.model.description import ModelDescription


@dataclass(frozen=True)
class Opened:
    """A run's checkpoint, and its weights."""

    checkpoint: Checkpoint
    description: ModelDescription
    found: Consolidated
    passed_over: tuple[Damage, ...]  # newer checkpoints, whose weights are damaged


Use = Callable[[Checkpoint, ModelDescription, Consolidated], None]


def open_run(run_dir: Path, step: int | None = None, weights: Weights | None = None, use: Use | None = None) -> Opened:
    """The weights of a run's newest checkpoint that has them whole, or of `step`; `weights` as of `consolidate`.

    Adam's moments are not looked at. Raises UserError if there is none.
    While the weights are compared with what was written, `use` may do something with them. If they are damaged, it is
    called again, with those of the checkpoint before; if the run removes them meanwhile, with those of a newer one.
    """

    def read(folder: Path) -> tuple[Checkpoint, ModelDescription, Consolidated]:
        checkpoint = check_listed(folder)
        description = described(checkpoint)
        with torch.device("meta"):
            model = description.build()

        def use_found(found: Consolidated) -> None:
            try:
                if use is not None:
                    use(checkpoint, description, found)
            except Exception as error:
                raise _UseFailed from error

        try:
            return checkpoint, description, consolidate(folder / DEEPSPEED_TAG, model, weights, use_found)
        except Unreadable as error:
            raise ValueError(str(error)) from error

    try:
        opened, passed_over = while_removed(lambda: newest(run_dir, step, read), run_dir)
    except _UseFailed as failure:
        assert failure.__cause__ is not None
        raise failure.__cause__ from None
    return Opened(*opened, tuple(passed_over))


class _UseFailed(Exception):
    """Its cause is none of the checkpoint's."""


def described(checkpoint: Checkpoint) -> ModelDescription:
    """The network of a checkpoint. Raises UserError if its manifest has none that is known."""
    try:
        return ModelDescription.from_dict(checkpoint.state.model)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{checkpoint.dir} describes no network ({error!r}); a checkpoint of this version of fcn_dist is needed"
        ) from error
