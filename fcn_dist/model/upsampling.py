"""Bilinear upsampling of coarse scores, tile by tile: full-resolution scores in, never all of them at once.

Shapes: B images, C outputs, h x w coarse cells, H x W pixels, R rows of a tile. A cell covers stride x stride
pixels; h = ceil(H / stride). The interpolation is that of the reference's frozen 2*stride deconvolution, with the
outermost cells repeated beyond the border where the deconvolution would fade to zero.
"""

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Scores held at once, in elements: on a CPU a tile should stay in cache, on a GPU it should fill the device.
TILE_ELEMENTS_CPU = 1 << 20
TILE_ELEMENTS_GPU = 1 << 22


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def uses_kernels(coarse_BChw: Tensor) -> bool:
    """Whether these scores are upsampled by Triton's kernels, rather than by torch in tiles."""
    return coarse_BChw.is_cuda and coarse_BChw.dtype in KERNEL_DTYPES and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class Tile(NamedTuple):
    """Some images, and a strip of whole cell rows of each."""

    images: slice
    cells: slice  # cell rows read: those of the strip and one beyond each inner edge
    rows: slice  # pixel rows written
    skip: int  # upsampled rows above `rows` that belong to the cell row read beyond the edge


def tiles(coarse_BChw: Tensor, size: tuple[int, int], stride: int) -> Iterator[Tile]:
    """Cut (B, H, W) into tiles of a bounded number of scores."""
    batch, outputs, h, w = coarse_BChw.shape
    budget = TILE_ELEMENTS_GPU if coarse_BChw.is_cuda else TILE_ELEMENTS_CPU
    row_elements = outputs * stride * stride * w
    strip = min(h, max(1, budget // row_elements))
    group = max(1, budget // (row_elements * strip))  # 1 unless whole images fit
    for image in range(0, batch, group):
        for top in range(0, h, strip):
            bottom = min(top + strip, h)
            above, below = max(top - 1, 0), min(bottom + 1, h)
            rows = slice(top * stride, min(bottom * stride, size[0]))
            skip = (top - above) * stride
            yield Tile(slice(image, min(image + group, batch)), slice(above, below), rows, skip)


def upsample_tile(coarse_BChw: Tensor, tile: Tile, size: tuple[int, int], stride: int) -> Tensor:
    """The full-resolution scores of `tile`, (b, C, R, W) in float32 (float64 if the scores are)."""
    cells = coarse_BChw[tile.images, :, tile.cells]
    dtype = torch.promote_types(cells.dtype, torch.float32)
    full = F.interpolate(cells.to(dtype), scale_factor=stride, mode="bilinear", align_corners=False)
    return full[:, :, tile.skip : tile.skip + tile.rows.stop - tile.rows.start, : size[1]]


def add_tile_gradient(
    gradient_bChw: Tensor, gradient_bCRW: Tensor, tile: Tile, size: tuple[int, int], stride: int
) -> None:
    """The transpose of `upsample_tile`: add a tile's gradient to that of its images' coarse scores, in place."""
    target = gradient_bChw[:, :, tile.cells]
    full_height, full_width = target.shape[2] * stride, target.shape[3] * stride
    below = full_height - tile.skip - gradient_bCRW.shape[2]
    padded = F.pad(gradient_bCRW, (0, full_width - size[1], tile.skip, below))
    target += torch.ops.aten.upsample_bilinear2d_backward(
        padded, [full_height, full_width], list(target.shape), False, float(stride), float(stride)
    )


def upsample(coarse_BChw: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """All scores at full size, (B, C, H, W): the largest tensor there is; prefer the functions that tile."""
    full = F.interpolate(coarse_BChw, scale_factor=stride, mode="bilinear", align_corners=False)
    return full[:, :, : size[0], : size[1]]


def argmax_upsampled(coarse_BChw: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """The output with the highest score at each pixel, (B, H, W) uint8, ties to the lower output."""
    if uses_kernels(coarse_BChw):
        from fcn_dist.model.kernels import argmax

        return argmax(coarse_BChw, size, stride)
    labels = torch.empty((len(coarse_BChw), *size), dtype=torch.uint8, device=coarse_BChw.device)
    for tile in tiles(coarse_BChw, size, stride):
        scores = upsample_tile(coarse_BChw, tile, size, stride)
        labels[tile.images, tile.rows] = scores.argmax(dim=1).to(torch.uint8)
    return labels
