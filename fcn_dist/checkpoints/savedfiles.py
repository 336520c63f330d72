"""A folder as DeepSpeed's save_checkpoint leaves it in, the contents of its files out, mapped and not yet read.

stage 0     one model file, the optimizer in it
stage 1, 2  one model file, and an optimizer file of each rank
stage 3     a model file and an optimizer file of each rank
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcn_dist.checkpoints.restricted import load_restricted
from fcn_dist.errors import UserError, named

MODEL_FILE = "mp_rank_00_model_states.pt"
RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")


@dataclass(frozen=True)
class SavedFiles:
    """What DeepSpeed saved, its tensors mapped from the files."""

    folder: Path
    stage: int
    world_size: int
    modules: Sequence[Mapping[str, Any]]  # model files; one, or one a rank in stage 3
    optimizers: Sequence[Mapping[str, Any]]  # one a rank; none in stage 0

    @property
    def deepspeed_version(self) -> str:
        """That saved them."""
        return str(self.modules[0]["ds_version"])


def open_files(folder: Path) -> SavedFiles:
    """Map all files. Raises UserError if some are missing or cannot be read."""
    model_files, optimizer_files = find_files(folder)
    modules = [load_restricted(path) for path in model_files]
    contents = [load_restricted(path) for path in optimizer_files]
    with of_deepspeeds_form(folder):
        optimizers = [content["optimizer_state_dict"] for content in contents]
        # The optimizer that DeepSpeed pairs with bf16 and float32 accumulation leaves its stage out: it has but one.
        stage = int(optimizers[0].get("zero_stage", 1)) if optimizers else 0
        world_size = _world_size(folder, stage, len(modules), optimizers) or int(modules[0]["dp_world_size"])
    return SavedFiles(folder, stage, world_size, modules, optimizers)


@contextmanager
def of_deepspeeds_form(folder: Path) -> Iterator[None]:
    """Turn what a file of another form leads to into a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{folder} is not what DeepSpeed 0.19 writes ({error!r}); use another step, or one saved with that version"
        ) from error


def find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Model files and optimizer files, each in the order of their ranks."""
    found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for path in folder.glob("*.pt"):
        if match := RANK_FILE.fullmatch(path.name):
            found[match[2]][int(match[1])] = path
    for paths in found.values():
        absent = sorted(set(range(max(paths, default=-1) + 1)) - set(paths))
        if absent:
            raise UserError(f"{folder} lacks the files of rank {named([str(rank) for rank in absent])}; restore them")
    single = folder / MODEL_FILE
    if single.is_file() and not found["model"]:
        found["model"][0] = single
    if not found["model"]:
        raise UserError(f"{folder} has no {MODEL_FILE}; a folder written by DeepSpeed's save_checkpoint is needed")
    return [found["model"][rank] for rank in sorted(found["model"])], [
        found["optim"][rank] for rank in sorted(found["optim"])
    ]


def _world_size(folder: Path, stage: int, model_files: int, optimizers: Sequence[Mapping[str, Any]]) -> int:
    """As many as the optimizer says there were, if there are as many files; 0 in stage 0, which does not say it."""
    world_size = 0
    if optimizers:
        count = optimizers[0]["partition_count"]
        world_size = max(count) if isinstance(count, list) else int(count)
        if len(optimizers) != world_size:
            raise UserError(
                f"{folder} has the optimizer files of {len(optimizers)} ranks, and was saved by {world_size}; restore "
                "what is missing, or use another step"
            )
    needed = world_size if stage == 3 else 1
    if model_files != needed:
        raise UserError(
            f"{folder} has {model_files} model files; {needed} are needed; restore what is missing, or use another step"
        )
    return world_size
