"""A folder of DeepSpeed's checkpoint files in, one training state by parameter name out, however it was cut.

Nothing is read before it is asked for: tensors are parts of mapped files, and whoever needs a run of a parameter's
elements copies just those.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcn_dist.checkpoints.layout import Piece, check_cover
from fcn_dist.checkpoints.savedfiles import SavedFiles, of_deepspeeds_form, open_files
from fcn_dist.checkpoints.zero import Holding, holdings, trained_shapes
from fcn_dist.errors import UserError

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
AVERAGE_KEY = "ema"  # of the weights' moving average, which is ours, among the optimizer's tensors


@dataclass(frozen=True)
class SplitTensor:
    """A tensor whose elements lie in several flat parts, one after the other."""

    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.parts[0].dtype

    def copy_to(self, target: Tensor, start: int = 0) -> None:
        """Fill the flat `target` with the elements from `start` on, in its own dtype and on its device."""
        end, begin = start + target.numel(), 0
        assert end <= prod(self.shape)
        for part in self.parts:
            first, last = max(start, begin), min(end, begin + part.numel())
            if first < last:
                target[first - start : last - start].copy_(part[first - begin : last - begin])
            begin += part.numel()

    def runs(self, elements: int) -> Iterator[Tensor]:
        """All of them, in order, flat and as they lie, at most `elements` at a time."""
        for part in self.parts:
            yield from torch.split(part, elements)

    def joined(self) -> Tensor:
        """The whole, in its shape: a view of its part if it has but one."""
        return (self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)).view(self.shape)


@dataclass(frozen=True)
class Trained:
    """A parameter that the optimizer updates."""

    master: SplitTensor
    tensors: Mapping[str, SplitTensor]  # the optimizer's, such as exp_avg; none before its first step


@dataclass(frozen=True)
class LossScale:
    """Where a dynamic loss scale stands."""

    scale: float
    iteration: int
    last_overflow: int  # iteration
    hysteresis: int | None  # overflows until the scale is lowered; stage 0 counts none


@dataclass(frozen=True)
class TrainingState:
    """Everything that DeepSpeed's files say of a run."""

    trained: Mapping[str, Trained]
    frozen: Mapping[str, SplitTensor]
    buffers: Mapping[str, Tensor]
    scalars: Mapping[str, float]  # the optimizer's, such as step
    loss_scale: LossScale | None  # of fp16 with a dynamic scale
    counters: Mapping[str, int]


def read_training_state(folder: Path) -> TrainingState:
    """The state that DeepSpeed saved in `folder`.

    Raises UserError unless every element of every parameter is there once, and the optimizer counts the same steps
    for all.
    """
    files = open_files(folder)
    with of_deepspeeds_form(folder):
        return training_state(files)


def training_state(files: SavedFiles) -> TrainingState:
    """`read_training_state` of files that are open."""
    shapes = trained_shapes(files)
    held = list(holdings(files))
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    check_cover(sizes, (piece for holding in held for piece in holding.pieces), str(files.folder))
    masters, tensors = _Parts(shapes), {key: _Parts(shapes) for key in _tensor_keys(held)}
    for holding in held:
        for piece in holding.pieces:
            masters.add(piece, holding.masters, holding.rank)
            for key, parts in tensors.items():
                parts.add(piece, holding.state[key], holding.rank)
    return TrainingState(
        {name: Trained(masters.of(name), {key: parts.of(name) for key, parts in tensors.items()}) for name in shapes},
        frozen_weights(files, shapes),
        {name: files.modules[0]["module"][name] for name in files.modules[0]["buffer_names"]},
        _scalars(files.folder, held),
        _loss_scale(files),
        {name: int(files.modules[0][name]) for name in COUNTERS},
    )


@dataclass
class _Parts:
    """Collects the parts of tensors of these shapes."""

    shapes: Mapping[str, tuple[int, ...]]
    found: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def add(self, piece: Piece, tensor: Tensor, rank: int) -> None:
        flat = tensor.reshape(-1)
        end = piece.offset + piece.numel
        if end > flat.numel():
            raise UserError(
                f"the part of {piece.name} on rank {rank} is cut short: elements {piece.offset} to {end} are needed, "
                f"and the rank saved {flat.numel()}; restore the checkpoint from a copy, or use another step"
            )
        self.found.setdefault(piece.name, []).append((piece.start, flat[piece.offset : end]))

    def of(self, name: str) -> SplitTensor:
        parts = sorted(self.found[name], key=lambda part: part[0])
        return SplitTensor(self.shapes[name], tuple(tensor for _, tensor in parts))


def _tensor_keys(held: Sequence[Holding]) -> list[str]:
    """The optimizer's entries that have an element for each of a parameter's."""
    return sorted({key for holding in held for key, value in holding.state.items() if not _is_scalar(value)})


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)


def _scalars(folder: Path, held: Sequence[Holding]) -> dict[str, float]:
    """The optimizer's counts, which every rank keeps for each tensor, and all have alike."""
    found: dict[str, set[float]] = {}
    for holding in held:
        for key, value in holding.state.items():
            if _is_scalar(value):
                found.setdefault(key, set()).add(float(value))
    for key, values in found.items():
        if len(values) > 1:
            values.discard(0.0)  # of several parameters in a group, DeepSpeed's FusedAdam counts at the last alone
        if len(values) > 1:
            raise UserError(
                f"{folder}: the optimizer's {key} is not the same for all parameters ({sorted(values)}), so they "
                "cannot be laid out anew; continue with the same ranks, ZeRO stage and precision"
            )
    return {key: values.pop() for key, values in found.items()}


def frozen_weights(files: SavedFiles, trained: Iterable[str]) -> dict[str, SplitTensor]:
    """Parameters without masters: in the module up to stage 2, and cut like the others in stage 3."""
    first = files.modules[0]
    if files.stage < 3:
        others = first["module"].keys() - set(trained) - set(first["buffer_names"])
        weights = {name: first["module"][name] for name in first["module"] if name in others}
        return {name: SplitTensor(tuple(w.shape), (w.reshape(-1),)) for name, w in weights.items()}
    frozen = {}
    for name, shape in first["frozen_param_shapes"].items():
        parts, left = [], prod(shape)
        for module in files.modules:
            parts.append(module["frozen_param_fragments"][name].reshape(-1)[:left])
            left -= parts[-1].numel()
        if left:
            raise UserError(
                f"{files.folder}: {name} lacks {left} of its {prod(shape)} elements; restore the checkpoint from a copy"
            )
        frozen[name] = SplitTensor(tuple(shape), tuple(parts))
    return frozen


def _loss_scale(files: SavedFiles) -> LossScale | None:
    if files.stage == 0:
        found = files.modules[0]["optimizer"]
        if not found.get("dynamic_loss_scale"):
            return None
        return LossScale(found["cur_scale"], found["cur_iter"], found["last_overflow_iter"], None)
    if not files.optimizers[0].get("dynamic_loss_scale"):
        return None
    scaler = files.optimizers[0]["loss_scaler"]
    return LossScale(scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis)
