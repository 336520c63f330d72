"""ReLU and max pooling as one operation that holds two bits a pooled value for backward.

ReLU, then pooling, would hold the activations before pooling and an int64 index a pooled value: 18 bytes for each in
16 bits, where 2.25 do. Values and gradients are exactly those of torch's pair, ties, NaN and odd sizes included.

Shapes: B images, C channels, H x W cells, pooled ones ceil(H / 2) x ceil(W / 2).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # of a window, as torch's pooling goes through it; the place is the code
CODES_A_BYTE = 4
GROUP_ELEMENTS = 1 << 22  # of the input worked on at once, at least one image: what is needed only for a while


class ReLUPool(nn.Module):
    """`relu_pool` in the place of the pooling layer of a trunk; the ReLU before it is an Identity."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, ceil(H / 2), ceil(W / 2))."""
        return relu_pool(x_BCHW)


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
    """The pooled values, and which corner of its window each came from, four codes a byte: (B, ceil(C / 4), h, w)."""
    batch, channels, height, width = x_BCHW.shape
    size = (math.ceil(height / 2), math.ceil(width / 2))
    memory = torch.channels_last
    pooled = torch.empty((batch, channels, *size), dtype=x_BCHW.dtype, device=x_BCHW.device, memory_format=memory)
    packed_shape = (batch, math.ceil(channels / CODES_A_BYTE), *size)
    packed = torch.zeros(packed_shape, dtype=torch.uint8, device=x_BCHW.device).to(memory_format=memory)
    for images in groups(x_BCHW):
        values, codes = _largest(x_BCHW[images])
        torch.clamp_min(values, 0, out=pooled[images])
        for place, part in enumerate(torch.split(codes, packed.shape[1], dim=1)):
            packed[images, : part.shape[1]] |= part << 2 * place
    return pooled, packed


def pool_backward(gradient_BChw: Tensor, pooled_BChw: Tensor, packed_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient of (B, C, H, W) = `size` that each pooled value passes to the corner it came from."""
    batch, channels = pooled_BChw.shape[:2]
    result = torch.empty(
        (batch, channels, *size),
        dtype=gradient_BChw.dtype,
        device=gradient_BChw.device,
        memory_format=torch.channels_last,
    )
    for images in groups(result):
        # As torch's ReLU: NaN is not below zero.
        passed = gradient_BChw[images].masked_fill(pooled_BChw[images] <= 0, 0)
        parts = [packed_BChw[images] >> 2 * place & 3 for place in range(CODES_A_BYTE)]
        codes = torch.cat(parts, dim=1)[:, :channels]
        for code, (down, right) in enumerate(CORNERS):
            corner = result[images, :, down::2, right::2]
            inside = (slice(None), slice(None), slice(corner.shape[2]), slice(corner.shape[3]))
            corner.copy_(passed[inside].masked_fill(codes[inside] != code, 0))
    return result


def groups(x_BCHW: Tensor) -> Iterator[slice]:
    """Images that are worked on at once."""
    count = max(1, GROUP_ELEMENTS // max(1, x_BCHW[0].numel())) if len(x_BCHW) else 1
    for first in range(0, len(x_BCHW), count):
        yield slice(first, min(first + count, len(x_BCHW)))


def _largest(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each window, and the code of its corner: the first of equal ones, the last NaN."""
    height, width = x_BCHW.shape[2:]
    if height % 2 or width % 2:
        x_BCHW = F.pad(x_BCHW, (0, width % 2, 0, height % 2), value=-math.inf)
    corners = [x_BCHW[:, :, down::2, right::2] for down, right in CORNERS]
    top, top_code = _later_wins(corners[0], corners[1])
    bottom, bottom_code = _later_wins(corners[2], corners[3])
    largest, in_bottom = _later_wins(top, bottom)
    codes = torch.where(in_bottom, bottom_code.to(torch.uint8) + 2, top_code.to(torch.uint8))
    return largest, codes


def _later_wins(first: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    return torch.maximum(first, later), (later > first) | later.isnan()
