"""ReLU and max pooling as two Triton kernels, forward and backward: one look at every value, nothing held beside.

Shapes: B images, C channels, H x W cells, h x w pooled ones; codes as in `relupool`, Q = ceil(C / 4) bytes a cell.

A program works on some bytes of codes, four channels each. All tensors are channels_last, so that neighbouring programs
read and write neighbouring memory.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 512  # of codes, a program

# Sizes change from stage to stage, and one compiled kernel serves all of them.
SIZES = ("total", "C", "Q", "H", "W", "h", "w")


def pool(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The pooled values, and the codes of where they came from."""
    x = x_BCHW.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    h, w, q = math.ceil(height / 2), math.ceil(width / 2), math.ceil(channels / 4)
    pooled = x.new_empty((batch, h, w, channels))
    codes = x.new_empty((batch, h, w, q), dtype=torch.uint8)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _pool[(triton.cdiv(codes.numel(), BYTES),)](
            *(x, pooled, codes, codes.numel(), channels, q, height, width, h, w), N=BYTES
        )
    return pooled.permute(0, 3, 1, 2), codes.permute(0, 3, 1, 2)


def pool_backward(gradient_BChw: Tensor, pooled_BChw: Tensor, codes_BQhw: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient of (B, C, H, W) = `size` that each pooled value passes to the corner it came from."""
    gradient, pooled, codes = (
        tensor.contiguous(memory_format=torch.channels_last) for tensor in (gradient_BChw, pooled_BChw, codes_BQhw)
    )
    batch, channels, h, w = pooled.shape
    result = gradient.new_empty((batch, *size, channels))
    with torch.cuda.device_of(result):  # type: ignore[no-untyped-call]
        _pool_backward[(triton.cdiv(codes.numel(), BYTES),)](
            *(gradient, pooled, codes, result, codes.numel(), channels, codes.shape[1], *size, h, w), N=BYTES
        )
    return result.permute(0, 3, 1, 2)


@triton.jit(do_not_specialize=SIZES)
def _pool(x, pooled, codes, total, C, Q, H, W, h, w, N: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    cell, byte = place // Q, place % Q
    packed = tl.zeros([N], tl.int32)
    for quarter in tl.static_range(4):
        channel = byte + quarter * Q
        there = (place < total) & (channel < C)
        best = tl.full([N], float("-inf"), tl.float32)
        code = tl.zeros([N], tl.int32)
        for corner in tl.static_range(4):
            where, inside = _corner(cell, corner, channel, C, H, W, h, w)
            value = tl.load(x + where, mask=there & inside, other=float("-inf")).to(tl.float32)
            # As torch does: the first of equal values, and of NaN the last, which nothing is larger than.
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            code = tl.where(better, corner, code)
        best = tl.where(best < 0, 0.0, best)  # NaN stays
        tl.store(pooled + cell * C + channel, best.to(pooled.dtype.element_ty), mask=there)
        packed |= tl.where(there, code, 0) << (2 * quarter)
    tl.store(codes + place, packed.to(tl.uint8), mask=place < total)


@triton.jit(do_not_specialize=SIZES)
def _pool_backward(gradient, pooled, codes, result, total, C, Q, H, W, h, w, N: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    cell, byte = place // Q, place % Q
    packed = tl.load(codes + place, mask=place < total, other=0).to(tl.int32)
    for quarter in tl.static_range(4):
        channel = byte + quarter * Q
        there = (place < total) & (channel < C)
        code = (packed >> (2 * quarter)) & 3
        passed = tl.load(gradient + cell * C + channel, mask=there, other=0.0)
        value = tl.load(pooled + cell * C + channel, mask=there, other=0.0).to(tl.float32)
        passed = tl.where(value <= 0, 0.0, passed.to(tl.float32))  # as ReLU does: NaN lets it through
        for corner in tl.static_range(4):
            where, inside = _corner(cell, corner, channel, C, H, W, h, w)
            its = tl.where(code == corner, passed, 0.0)
            tl.store(result + where, its.to(result.dtype.element_ty), mask=there & inside)


@triton.jit
def _corner(cell, corner: tl.constexpr, channel, C, H, W, h, w):
    """Where a channel of a window's corner lies, and whether there is such a corner."""
    row = cell // w % h * 2 + corner // 2
    column = cell % w * 2 + corner % 2
    return ((cell // (h * w) * H + row) * W + column) * C + channel, (row < H) & (column < W)
