"""torch.compile in training: a network in, one whose stages are compiled out, or why that cannot be."""

import torch

from fcn_dist.errors import UserError
from fcn_dist.model.fcn import FCN


def compile_network(model: FCN, zero_stage: int, device: torch.device) -> None:
    """Have the stages of `model` compiled, once it is seen that torch.compile works on `device`.

    Raises UserError under ZeRO-3, whose hooks gather the weights of each layer when it is called, and where compiling
    fails, as without a C++ compiler on a CPU.
    """
    if zero_stage == 3:
        raise UserError(
            "train.compile is true and zero_optimization.stage is 3, under which weights are only there while their "
            "own layer computes; take stage 0, 1 or 2, or set train.compile to false"
        )
    try:
        torch.compile(torch.relu_)(torch.zeros(64, device=device))
    except Exception as error:  # whatever a compiler's absence or age leads to
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"train.compile is true, and torch.compile fails on {device.type}: {reason}; "
            "install what it names, or set train.compile to false"
        ) from error
    model.compile_stages()
