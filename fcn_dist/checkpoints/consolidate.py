"""A folder of DeepSpeed's checkpoint files in, one float32 state dict out: ZeRO stages 0 to 3, any number of ranks.

The folder may be one that DeepSpeed's ds_to_universal made.

Frozen parameters have no masters, so that under bf16 and fp16 their weights come out rounded. Nothing is joined before
it is asked for: whoever goes through the tensors one by one holds one at a time, and through their runs, none.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from fcn_dist.checkpoints.records import checking_storages
from fcn_dist.checkpoints.savedfiles import SavedFiles, of_deepspeeds_form, open_files
from fcn_dist.checkpoints.trainingstate import AVERAGE_KEY, SplitTensor, Trained, training_state
from fcn_dist.checkpoints.universal import is_universal, read_universal
from fcn_dist.checkpoints.zero import holdings
from fcn_dist.errors import UserError, named
from fcn_dist.model.auxiliary import PREFIX, head_shapes
from fcn_dist.model.fcn import FCN

Weights = Literal["trained", "averaged"]
WEIGHTS = get_args(Weights)
AT_ONCE = 1 << 22  # elements, few enough to stay in a processor's cache


class Joined(Mapping[str, Tensor]):
    """A state dict whose tensors are put together anew each time, floating ones in float32."""

    def __init__(self, tensors: Mapping[str, SplitTensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name].joined()
        return tensor.float() if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Consolidated:
    """All weights of a checkpoint, and where they came from."""

    split: Mapping[str, SplitTensor]  # parameters and buffers as they are kept
    weights: Weights
    stage: int
    world_size: int
    deepspeed_version: str
    rounded: tuple[str, ...]  # parameters that the checkpoint keeps in 16 bits only
    left_out: tuple[str, ...]  # parameters of auxiliary heads, which are in training alone

    @property
    def state(self) -> Joined:
        """All of it as a state dict."""
        return Joined(self.split)


Use = Callable[[Consolidated], None]


def consolidate(folder: Path, model: FCN, weights: Weights | None = None, use: Use | None = None) -> Consolidated:
    """The state dict of `model` (whose own weights are not looked at) from DeepSpeed's files in `folder`.

    The weights are the averaged ones where there are any, unless `weights` says which. Auxiliary heads are left out.
    Raises UserError unless every parameter and buffer is there, whole, in its shape, and nothing else is, of heads
    likewise if there are any; ValueError if the bytes of one are not those that were written.

    While the bytes are compared, `use` is called with what was found; what comes of it is void if an error is raised.
    """
    if is_universal(folder):
        files, found = read_universal(folder)
    else:
        files = open_files(folder)
        with of_deepspeeds_form(folder):
            found = training_state(files)
    chosen = weights or ("averaged" if _has_averages(found.trained) else "trained")
    masters = {name: trained.master for name, trained in found.trained.items()}
    kept = _averages(found.trained, folder) if chosen == "averaged" else masters
    with of_deepspeeds_form(folder):
        read = list(_read_of(files, chosen))
        buffers = {
            name: SplitTensor(tuple(buffer.shape), (buffer.reshape(-1),)) for name, buffer in found.buffers.items()
        }
        consolidated = _complete({**found.frozen, **kept, **buffers}, model, chosen, files)
    with checking_storages(read, folder):
        if use is not None:
            use(consolidated)
        with of_deepspeeds_form(folder):
            if files.stage < 3:
                _check_agreement(masters, files)
    return consolidated


def _read_of(files: SavedFiles, weights: Weights) -> Iterator[Tensor]:
    """The tensors that are looked at, as they were saved; of a universal checkpoint those of the model files."""
    for module in files.modules:
        yield from (tensor for tensor in module["module"].values() if isinstance(tensor, Tensor))
        yield from (module.get("frozen_param_fragments") or {}).values()
    for holding in holdings(files):
        yield holding.masters
        if weights == "averaged":
            yield holding.state[AVERAGE_KEY]


def _complete(state: dict[str, SplitTensor], model: FCN, weights: Weights, files: SavedFiles) -> Consolidated:
    """Exactly the model's tensors, after those of heads were left out."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    heads = head_shapes(model) if any(name.startswith(PREFIX) for name in state) else {}
    _check_complete(state, {**shapes, **heads}, files.folder)
    for name in heads:
        del state[name]
    parameters = [name for name, _ in model.named_parameters()]
    return Consolidated(
        state,
        weights,
        files.stage,
        files.world_size,
        files.deepspeed_version,
        tuple(name for name in parameters if state[name].dtype in (torch.bfloat16, torch.float16)),
        tuple(heads),
    )


def _has_averages(trained: Mapping[str, Trained]) -> bool:
    return any(AVERAGE_KEY in one.tensors for one in trained.values())


def _averages(trained: Mapping[str, Trained], folder: Path) -> dict[str, SplitTensor]:
    if not _has_averages(trained):
        raise UserError(
            f"{folder} holds no averaged weights; a run with train.ema is needed for those, and ds_to_universal leaves "
            "them out; take the trained ones, or a step after train.ema was set"
        )
    return {name: one.tensors[AVERAGE_KEY] for name, one in trained.items()}


def _check_agreement(masters: Mapping[str, SplitTensor], files: SavedFiles) -> None:
    """Up to stage 2 the module is there as well: its weights are the masters rounded, to the bit."""
    weights = files.modules[0]["module"]
    differing = [
        name
        for name, master in masters.items()
        if name in weights and master.shape == tuple(weights[name].shape) and not _is_rounded(weights[name], master)
    ]
    if differing:
        raise UserError(
            f"{files.folder}: the weights in the model file are not the optimizer's masters rounded, for "
            f"{named(differing)}; files of two saves were mixed; restore the checkpoint, or use another step"
        )


def _is_rounded(weight: Tensor, master: SplitTensor) -> bool:
    begin, flat = 0, weight.reshape(-1)
    for run in master.runs(AT_ONCE):
        same, rounded = run.to(weight.dtype), flat[begin : begin + run.numel()]
        # No number is equal to itself, and where training has diverged it is another error.
        if not torch.equal(same, rounded) and not torch.allclose(same, rounded, rtol=0, atol=0, equal_nan=True):
            return False
        begin += run.numel()
    return True


def _check_complete(state: Mapping[str, SplitTensor], needed: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    problems = [f"{name} is missing" for name in needed if name not in state]
    problems += [f"{name} is not part of the model" for name in state if name not in needed]
    problems += [
        f"{name} is {state[name].shape}, not {shape}"
        for name, shape in needed.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        raise UserError(f"{folder} does not fit the model its manifest describes: {named(problems)}")
