"""ReLU and max pooling as one operation that holds two bits a pooled value for backward.

ReLU, then pooling, would hold the activations before pooling and an int64 index a pooled value: 18 bytes for each in
16 bits, where 2.25 do. Values and gradients are exactly those of torch's pair, ties, NaN and odd sizes included. On
CUDA each direction is one Triton kernel; elsewhere, and in float64, torch works through groups of images.

Shapes: B images, C channels, H x W cells, pooled ones ceil(H / 2) x ceil(W / 2).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fcn_dist.model.devices import uses_kernels

CODES_A_BYTE = 4
GROUP_ELEMENTS = 1 << 20  # of the input worked on at once, at least one image: what is needed only for a while


class ReLUPool(nn.Module):
    """`relu_pool` in the place of the pooling layer of a trunk; the ReLU before it is an Identity."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, ceil(H / 2), ceil(W / 2))."""
        return relu_pool(x_BCHW)


class ReLUAveragePool(nn.Module):
    """ReLU and average pooling in the same place; windows at the border average the cells there are."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, ceil(H / 2), ceil(W / 2))."""
        return F.avg_pool2d(F.relu(x_BCHW), 2, ceil_mode=True)


POOLS = (ReLUPool, ReLUAveragePool)


def relu_pool(x_BCHW: Tensor) -> Tensor:
    """`max_pool2d(relu(x), 2, ceil_mode=True)`."""
    if not (torch.is_grad_enabled() and x_BCHW.requires_grad):
        return F.relu(F.max_pool2d(x_BCHW, 2, ceil_mode=True))
    pooled: Tensor = _ReLUPool.apply(x_BCHW)  # type: ignore[no-untyped-call]
    return pooled


class _ReLUPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pooled, codes = pool_with_codes(x)
        ctx.save_for_backward(pooled, codes)
        ctx.size = (x.shape[2], x.shape[3])
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        pooled, codes = ctx.saved_tensors
        return pool_backward(gradient, pooled, codes, ctx.size)


def pool_with_codes(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The pooled values, and which corner of its window each came from, four codes a byte: (B, ceil(C / 4), h, w).

    The codes of the first quarter of the channels have the lowest two bits.
    """
    if uses_kernels(x_BCHW):
        from fcn_dist.model.poolkernels import pool

        return pool(x_BCHW)
    batch, channels, height, width = x_BCHW.shape
    shape = (batch, channels, math.ceil(height / 2), math.ceil(width / 2))
    pooled = _empty(shape, x_BCHW.dtype, x_BCHW.device)
    packed = _empty((batch, math.ceil(channels / CODES_A_BYTE), *shape[2:]), torch.uint8, x_BCHW.device).zero_()
    first_corners = _first_corners(shape, width, x_BCHW.device)
    for images in groups(x_BCHW):
        values, indices = F.max_pool2d(x_BCHW[images], 2, ceil_mode=True, return_indices=True)
        torch.clamp_min(values, 0, out=pooled[images])
        offsets = indices.int() - first_corners  # 0, 1, width or width + 1
        below = (offsets >= width).view(torch.uint8)
        codes = offsets.to(torch.uint8) & 1 ^ (below & width % 2) | below << 1
        for place, part in enumerate(torch.split(codes, packed.shape[1], dim=1)):
            packed[images, : part.shape[1]] |= part << 2 * place
    return pooled, packed


def pool_backward(gradient_BChw: Tensor, pooled_BChw: Tensor, packed_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient of (B, C, H, W) = `size` that each pooled value passes to the corner it came from."""
    if uses_kernels(gradient_BChw):
        from fcn_dist.model import poolkernels

        return poolkernels.pool_backward(gradient_BChw, pooled_BChw, packed_BChw, size)
    channels, width = pooled_BChw.shape[1], size[1]
    result = _empty((*pooled_BChw.shape[:2], *size), gradient_BChw.dtype, gradient_BChw.device)
    first_corners = _first_corners(pooled_BChw.shape, width, pooled_BChw.device)
    for images in groups(result):
        passed = torch.ops.aten.threshold_backward(gradient_BChw[images], pooled_BChw[images], 0)  # as ReLU does
        parts = [packed_BChw[images] >> 2 * place & 3 for place in range(CODES_A_BYTE)]
        codes = torch.cat(parts, dim=1)[:, :channels].int()
        indices = (codes + (codes >> 1) * (width - 2) + first_corners).long()
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
            passed, result[images], [2, 2], [2, 2], [0, 0], [1, 1], True, indices, grad_input=result[images]
        )
    return result


def groups(x_BCHW: Tensor) -> Iterator[slice]:
    """Images that are worked on at once."""
    count = max(1, GROUP_ELEMENTS // max(1, x_BCHW[0].numel())) if len(x_BCHW) else 1
    for first in range(0, len(x_BCHW), count):
        yield slice(first, min(first + count, len(x_BCHW)))


def _first_corners(shape: Sequence[int], width: int, device: torch.device) -> Tensor:
    """The index of each window's first corner in its plane, (h, w)."""
    rows, columns = (torch.arange(0, 2 * size, 2, dtype=torch.int32, device=device) for size in shape[2:])
    return rows[:, None] * width + columns


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
