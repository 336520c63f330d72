"""Dropout whose mask is a function of the sample, so that ranks, micro-batches and restarts do not change it.

Shapes: B images, C channels, h x w cells.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fcn_dist.keys import Purpose, key64


def relu_dropout(x_BChw: Tensor, probability: float, keys: Sequence[int], layer: int) -> Tensor:
    """ReLU, then zero elements with `probability` and scale the rest by 1 / (1 - probability); overwrites `x`.

    `keys` holds one 64-bit key an image, from (seed, position). Backward needs the result alone: an element of it is
    above zero just where gradient passes.
    """
    if probability == 0:
        return F.relu(x_BChw, inplace=True)
    assert len(keys) == len(x_BChw)
    result: Tensor = _ReLUDropout.apply(x_BChw, probability, keys, layer)  # type: ignore[no-untyped-call]
    return result


class _ReLUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float, keys: Sequence[int], layer: int) -> Tensor:
        ctx.mark_dirty(x)
        ctx.scale = 1 / (1 - probability)
        x.relu_()
        generator = torch.Generator(x.device)
        for image, key in zip(x, keys, strict=True):
            generator.manual_seed(key64(Purpose.DROPOUT, key, layer))
            noise = torch.rand(image.shape, generator=generator, device=x.device)
            image.masked_fill_(noise < probability, 0)
        x *= ctx.scale
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient * ctx.scale, result, 0), None, None, None


def drawn_keys(count: int) -> list[int]:
    """Keys from torch's global generator, for callers that have no samples to name."""
    return [int(key) for key in torch.randint(2**63 - 1, (count,))]
