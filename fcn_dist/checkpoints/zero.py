"""A folder of DeepSpeed's checkpoint files in, one float32 state dict out: ZeRO stages 0 to 3, any number of ranks.

Where the float32 masters lie (DeepSpeed 0.19.8), and how they are cut:

stage 0     in float32, the module's weights; under bf16 and fp16 `optimizer` of the one model file: by group, a list
            of tensors (`fp32_groups`) or, with a fused optimizer, one flat vector (`fp32_groups_flat`); no names
stage 1, 2  `single_partition_of_fp32_groups` of each rank's optimizer file: by group, this rank's run of one flat
            vector; `param_slice_mappings` says where in it each parameter's part starts, and how long it is
stage 3     `fp32_flat_groups` of each rank's optimizer file: by sub-group, this rank's share of each parameter in
            the order of `param_shapes`, ceil(elements / ranks) long, so the last shares end in padding

Frozen parameters have no masters: their weights are in the module up to stage 2, and cut like the others in stage 3.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fcn_dist.checkpoints.masters import attribute_masters
from fcn_dist.checkpoints.restricted import load_restricted
from fcn_dist.errors import UserError, named

MODEL_FILE = "mp_rank_00_model_states.pt"
RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")


@dataclass(frozen=True)
class Consolidated:
    """All weights of a checkpoint, and where they came from."""

    state: dict[str, Tensor]  # parameters and floating buffers in float32
    stage: int
    world_size: int
    deepspeed_version: str
    rounded: tuple[str, ...]  # parameters that the checkpoint keeps in 16 bits only


def consolidate(folder: Path, model: nn.Module) -> Consolidated:
    """The state dict of `model` (whose own weights are not looked at) from DeepSpeed's files in `folder`.

    Raises UserError unless every parameter and buffer is there, whole, in its shape, and nothing else is.
    """
    model_files, optimizer_files = _find(folder)
    modules = [load_restricted(path) for path in model_files]
    optimizers = [load_restricted(path) for path in optimizer_files]
    try:
        return _consolidate(folder, model, modules, [content["optimizer_state_dict"] for content in optimizers])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{folder} is not what DeepSpeed 0.19 writes ({error!r}); convert another step, or one saved with that "
            "version"
        ) from error


def _consolidate(
    folder: Path, model: nn.Module, modules: Sequence[Mapping[str, Any]], optimizers: Sequence[Mapping[str, Any]]
) -> Consolidated:
    # The optimizer that DeepSpeed pairs with bf16 and float32 accumulation leaves its stage out: it has but one.
    stage = int(optimizers[0].get("zero_stage", 1)) if optimizers else 0
    _check_counts(folder, stage, len(modules), optimizers)
    weights: dict[str, Tensor] = dict(modules[0]["module"])
    if stage == 3:
        masters = _join_shares(modules, optimizers)
        weights = {name: weights[name] for name in modules[0]["buffer_names"]}
    else:
        masters = _join_runs(optimizers, model) if stage else _unpartitioned(modules[0], model)
        _check_agreement(masters, weights, folder)
    state = weights | masters
    _check_complete(state, model, folder)
    parameters = [name for name, _ in model.named_parameters()]
    return Consolidated(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()},
        stage,
        len(optimizers) or int(modules[0]["dp_world_size"]),
        str(modules[0]["ds_version"]),
        tuple(name for name in parameters if state[name].dtype in (torch.bfloat16, torch.float16)),
    )


def _find(folder: Path) -> tuple[list[Path], list[Path]]:
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


def _check_counts(folder: Path, stage: int, model_files: int, optimizers: Sequence[Mapping[str, Any]]) -> None:
    """As many files as the optimizer says there were ranks."""
    world_size = 1
    if optimizers:
        count = optimizers[0]["partition_count"]
        world_size = max(count) if isinstance(count, list) else int(count)
        if len(optimizers) != world_size:
            raise UserError(
                f"{folder} has the optimizer files of {len(optimizers)} ranks, and was saved by {world_size}; restore "
                "what is missing, or convert another step"
            )
    needed = world_size if stage == 3 else 1
    if model_files != needed:
        raise UserError(
            f"{folder} has {model_files} model files; {needed} are needed; restore what is missing, or convert another "
            "step"
        )


def _join_runs(optimizers: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[str, Tensor]:
    """Stages 1 and 2: each parameter from its parts in consecutive ranks."""
    parts: dict[str, list[Tensor]] = {}
    for rank, optimizer in enumerate(optimizers):
        runs = optimizer["single_partition_of_fp32_groups"]
        mappings = optimizer["param_slice_mappings"]
        if len(runs) != len(mappings):
            raise UserError(f"rank {rank} saved {len(runs)} groups of masters, but described {len(mappings)}")
        for run, mapping in zip(runs, mappings, strict=True):
            for name, part in mapping.items():
                if part.start < 0 or part.start + part.numel > run.numel():
                    raise UserError(
                        f"the part of {name} on rank {rank} is cut short: elements {part.start} to "
                        f"{part.start + part.numel} are needed, and the rank saved {run.numel()}"
                    )
                parts.setdefault(name, []).append(run[part.start : part.start + part.numel])
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: _joined(name, found, shapes.get(name), padded=False) for name, found in parts.items()}


def _join_shares(modules: Sequence[Mapping[str, Any]], optimizers: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stage 3: each parameter from the equal shares of all ranks; frozen ones too."""
    world_size = len(optimizers)
    state: dict[str, Tensor] = {}
    for index, shapes in enumerate(modules[0]["param_shapes"]):
        groups = [optimizer["fp32_flat_groups"][index] for optimizer in optimizers]
        offset = 0
        for name, shape in shapes.items():
            share = -(-prod(shape) // world_size)
            state[name] = _joined(name, [group[offset : offset + share] for group in groups], shape, padded=True)
            offset += share
        if any(group.numel() != offset for group in groups):
            sizes = ", ".join(str(group.numel()) for group in groups)
            raise UserError(f"sub-group {index} has {sizes} elements by rank; its parameters need {offset} each")
    for name, shape in (modules[0]["frozen_param_shapes"] or {}).items():
        found = [module["frozen_param_fragments"][name].flatten() for module in modules]
        state[name] = _joined(name, found, shape, padded=True)
    return state


def _joined(name: str, parts: Sequence[Tensor], shape: Sequence[int] | None, padded: bool) -> Tensor:
    """The parts one after the other, in `shape` (as they are if None); only if `padded` may there be more."""
    flat = torch.cat(list(parts))
    if shape is None:
        return flat
    needed = prod(shape)
    if flat.numel() < needed or (flat.numel() > needed and not padded):
        raise UserError(f"{name} has {flat.numel()} elements over all ranks; {needed} are needed for {tuple(shape)}")
    return flat[:needed].view(tuple(shape))


def _unpartitioned(module: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Stage 0: the masters of a 16-bit optimizer, if there are such."""
    optimizer = module.get("optimizer") or {}
    groups = optimizer.get("fp32_groups_flat") or optimizer.get("fp32_groups") or []
    flats = [group if isinstance(group, Tensor) else torch.cat([t.flatten() for t in group]) for group in groups]
    names = [name for name, _ in model.named_parameters() if name in module["module"]]
    return attribute_masters(flats, {name: module["module"][name] for name in names})


def _check_agreement(masters: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Up to stage 2 the module is there as well: its weights are the masters rounded, to the bit."""
    differing = [
        name
        for name, master in masters.items()
        if name in weights
        and master.shape == weights[name].shape
        and not torch.allclose(master.to(weights[name].dtype), weights[name], rtol=0, atol=0, equal_nan=True)
    ]
    if differing:
        raise UserError(
            f"{folder}: the weights in the model file are not the optimizer's masters rounded, for "
            f"{named(differing)}; files of two saves were mixed; restore the checkpoint, or convert another step"
        )


def _check_complete(state: Mapping[str, Tensor], model: nn.Module, folder: Path) -> None:
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{name} is missing" for name in needed if name not in state]
    problems += [f"{name} is not part of the model" for name in state if name not in needed]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {shape}"
        for name, shape in needed.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise UserError(f"{folder} does not fit the model its manifest describes: {named(problems)}")
