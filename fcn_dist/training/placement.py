"""A training state that was cut otherwise into a live engine, by our own arithmetic, without a gap.

DeepSpeed's own means were seen to fail between most stages, to leave frozen parameters and buffers behind, and to
load other weights than they were given.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.ops.adam import FusedAdam
from torch import Tensor

from fcn_dist.checkpoints.layout import Piece, check_cover, in_shares
from fcn_dist.checkpoints.trainingstate import AVERAGE_KEY, LossScale, SplitTensor, TrainingState
from fcn_dist.errors import UserError, named
from fcn_dist.training.engine import Engine
from fcn_dist.training.holders import Holder, numel_of, rewriting, wrapper_of


@torch.no_grad()
def place(state: TrainingState, engine: Engine, where: str) -> None:
    """Give `engine`, which has trained nothing yet, the training state that was read from `where`.

    All ranks call it. Raises UserError, on all ranks alike, if a parameter, a buffer or a part of the optimizer's
    state has no place in the engine, or none in the state.
    """
    refuse_offload(engine.config)
    wrapper = wrapper_of(engine, "continue with the same ranks, ZeRO stage and precision")
    tensors, scalar = _form_of_state(engine.basic_optimizer, state, where)
    holders = list(wrapper.holders(engine))
    _check_names(state, engine, where)
    _check_holders(holders, engine, wrapper.partitioned, where)
    engine.basic_optimizer.state.clear()
    with rewriting(engine, wrapper):
        for holder in holders:
            own = {key: scalar(value, holder.tensor) for key, value in state.scalars.items()}
            _fill(holder, state, own, tensors)
            if own:
                engine.basic_optimizer.state[holder.tensor] = own
        _place_frozen(state, engine)
    for name, buffer in _buffers(engine).items():
        buffer.copy_(state.buffers[name])
    if state.loss_scale:
        _place_loss_scale(state.loss_scale, engine.optimizer)
    for name, value in state.counters.items():
        setattr(engine, name, value)


def _fill(holder: Holder, state: TrainingState, own: dict[str, Any], tensors: Iterable[str]) -> None:
    """Masters, and the optimizer's tensors into `own`; what is padding becomes 0."""
    _copy(holder.tensor.data, holder.pieces, {name: trained.master for name, trained in state.trained.items()})
    for key in tensors:
        own[key] = torch.empty_like(holder.tensor.data)
        _copy(own[key], holder.pieces, {name: trained.tensors[key] for name, trained in state.trained.items()})


def _copy(target: Tensor, pieces: Iterable[Piece], source: dict[str, SplitTensor]) -> None:
    flat = target.view(-1)
    flat.zero_()
    for piece in pieces:
        source[piece.name].copy_to(flat[piece.offset : piece.offset + piece.numel], piece.start)


def _form_of_state(
    optimizer: Any, state: TrainingState, where: str
) -> tuple[list[str], Callable[[float, Tensor], Any]]:
    """The tensors that this optimizer keeps, and how it keeps a scalar beside a tensor of masters.

    Neither exists before the first step; the optimizer makes both then.
    """
    found = sorted({key for trained in state.trained.values() for key in trained.tensors})
    kind, options = type(optimizer), optimizer.defaults
    if kind in (torch.optim.Adam, torch.optim.AdamW, FusedAdam):
        needed = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if options.get("amsgrad") else [])
        counts = ["step"]
    elif kind is torch.optim.SGD:
        needed, counts = (["momentum_buffer"] if options["momentum"] else []), []
    else:
        raise UserError(
            f"the state of optimizer {kind.__name__} cannot be laid out anew; Adam, AdamW and SGD can; continue with "
            "the same ranks, ZeRO stage and precision"
        )
    kept = [*(key for key in found if key != AVERAGE_KEY), *sorted(state.scalars)]
    if kept and kept != [*needed, *counts]:
        raise UserError(
            f"{where} holds {', '.join(kept)} of its optimizer, and {kind.__name__} as configured keeps "
            f"{', '.join([*needed, *counts]) or 'nothing'}; continue with the optimizer that the run began with"
        )

    def scalar(value: float, beside: Tensor) -> Any:
        if kind is FusedAdam:
            return int(value)
        on_device = options.get("capturable") or options.get("fused")
        return torch.tensor(value, device=beside.device if on_device else "cpu")

    return found, scalar


def _check_names(state: TrainingState, engine: Engine, where: str) -> None:
    trained = {name for parameter, name in engine.param_names.items() if parameter.requires_grad}
    pairs = [
        ("trained parameters", set(state.trained), trained),
        ("frozen parameters", set(state.frozen), set(engine.param_names.values()) - trained),
        ("buffers", set(state.buffers), set(_buffers(engine))),
    ]
    for what, found, needed in pairs:
        if found != needed:
            raise UserError(
                f"{where} and this run's network do not have the same {what}: {named(sorted(found ^ needed))}; "
                "continue with the recipe that the run began with"
            )


def _check_holders(holders: list[Holder], engine: Engine, partitioned: bool, where: str) -> None:
    """Every element of every parameter has its place once, over all ranks or, unpartitioned, on each."""
    for holder in holders:
        if holder.tensor.dtype != torch.float32:
            raise UserError(
                f"this configuration keeps masters in {holder.tensor.dtype}, and {where} float32 ones; continue with "
                "the same ranks, ZeRO stage and precision, or keep float32 masters"
            )
    pieces = [[piece for holder in holders for piece in holder.pieces]]
    if partitioned:
        pieces = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(pieces, [piece for holder in holders for piece in holder.pieces])
    sizes = {name: numel_of(parameter) for parameter, name in engine.param_names.items() if parameter.requires_grad}
    check_cover(sizes, (piece for of_rank in pieces for piece in of_rank), where)


def _place_frozen(state: TrainingState, engine: Engine) -> None:
    for parameter, name in engine.param_names.items():
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):  # stage 3
            pieces = in_shares({name: numel_of(parameter)}, dist.get_world_size(), dist.get_rank())
            _copy(parameter.ds_tensor.data, pieces, {name: state.frozen[name]})
        else:
            state.frozen[name].copy_to(parameter.data.view(-1))


def _buffers(engine: Engine) -> dict[str, Tensor]:
    """Those that a state dict holds."""
    saved = engine.module.state_dict().keys()
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in saved}


def _place_loss_scale(found: LossScale, optimizer: Any) -> None:
    """Where this run's scale is dynamic, too; how it moves from there is as configured."""
    if getattr(optimizer, "dynamic_loss_scale", False):
        scaler = optimizer.loss_scaler
        if found.hysteresis is not None:
            scaler.cur_hysteresis = found.hysteresis
    elif getattr(getattr(optimizer, "loss_scale_config", None), "dynamic_loss_scale", False):
        scaler = optimizer.loss_scale_config
    else:
        return
    scaler.cur_scale, scaler.cur_iter = found.scale, found.iteration
    scaler.last_overflow_iter = found.last_overflow


def refuse_offload(values: dict[str, Any]) -> None:
    """Raise UserError if this DeepSpeed configuration keeps a part of the state elsewhere."""
    for key in ("offload_optimizer", "offload_param"):
        offload = values.get("zero_optimization", {}).get(key) or {}
        if offload.get("device", "none") != "none":
            raise UserError(
                f"zero_optimization.{key} is set, and a state that it moves cannot be laid out anew; continue with "
                "the same ranks, ZeRO stage and precision, or, from a checkpoint written without it, without it"
            )
