"""A folder as DeepSpeed's ds_to_universal leaves it in, what it says of the weights out.

zero/NAME/fp32.pt        a parameter's float32 master: in its shape under "param", or by itself and flat (stage 3)
zero/NAME/exp_avg.pt ... the optimizer's, not read here; averaged weights are not among them
zero/optimizer_state.pt  the rest of one rank's optimizer file
*_model_states.pt        as they were: buffers and frozen parameters are taken from here, as they were saved
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from fcn_dist.checkpoints.records import check_storages
from fcn_dist.checkpoints.restricted import load_content, load_restricted
from fcn_dist.checkpoints.savedfiles import SavedFiles, find_files, of_deepspeeds_form
from fcn_dist.checkpoints.trainingstate import COUNTERS, SplitTensor, Trained, TrainingState, frozen_weights
from fcn_dist.errors import UserError, named

MASTERS = "zero"
OPTIMIZER_FILE = "optimizer_state.pt"
MASTER_FILE = "fp32.pt"


def is_universal(folder: Path) -> bool:
    """Whether it is such a folder, by its looks."""
    return (folder / MASTERS).is_dir()


def read_universal(folder: Path) -> tuple[SavedFiles, TrainingState]:
    """What is in `folder`; the optimizer's tensors and the loss scale are not looked at.

    Raises UserError if files are missing, cannot be read, or name anything but tensors and plain values; ValueError if
    the bytes of a master are not those that were written.
    """
    model_files, _ = find_files(folder)
    modules = [load_restricted(path) for path in model_files]
    optimizer = load_restricted(folder / MASTERS / OPTIMIZER_FILE)
    with of_deepspeeds_form(folder):
        stage, count = int(optimizer.get("zero_stage", 1)), optimizer["partition_count"]
        files = SavedFiles(folder, stage, max(count) if isinstance(count, list) else int(count), modules, [])
        if len(modules) != (needed := files.world_size if stage == 3 else 1):
            raise UserError(f"{folder} has {len(modules)} model files; {needed} are needed; restore what is missing")
        shapes = {name: tuple(shape) for group in modules[0]["param_shapes"] for name, shape in group.items()}
        absent = [name for name in shapes if not (folder / MASTERS / name / MASTER_FILE).is_file()]
        if absent:
            raise UserError(
                f"{folder} has no {MASTERS}/.../{MASTER_FILE} of {named(absent)}; run ds_to_universal again, whole"
            )
        masters = {name: _master(folder, name, shape) for name, shape in shapes.items()}
    check_storages(masters.values(), folder)
    with of_deepspeeds_form(folder):
        trained = {
            name: Trained(SplitTensor(shapes[name], (master.reshape(-1),)), {}) for name, master in masters.items()
        }
        first = modules[0]
        buffers = {name: first["module"][name] for name in first["buffer_names"]}
        counters = {name: int(first[name]) for name in COUNTERS}
        return files, TrainingState(trained, frozen_weights(files, shapes), buffers, {}, None, counters)


def _master(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    path = folder / MASTERS / name / MASTER_FILE
    content: Any = load_content(path)
    tensor = content.get("param") if isinstance(content, Mapping) else content
    if (
        not isinstance(tensor, Tensor)
        or tensor.numel() != prod(shape)
        or tuple(tensor.shape) not in (shape, (prod(shape),))
    ):
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"{path} is {found}, and {name} is {shape} in the model; run ds_to_universal again")
    return tensor
