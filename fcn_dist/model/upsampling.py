"""Bilinear upsampling of coarse scores, tile by tile: full-resolution scores in, never all of them at once.

Shapes: B images, C outputs, h x w coarse cells, H x W pixels, R x S pixels of a tile of b images. A cell covers
stride x stride pixels, stride is even, and h = ceil(H / stride). The interpolation is that of the reference's frozen
2*stride deconvolution, with the outermost cells repeated beyond the border where the deconvolution would fade to zero.
"""

from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_dist.model.devices import uses_kernels

# Scores held at once, in elements, when torch upsamples; nothing else of that size is held. On a CPU they should stay
# in cache; a GPU wants more work at a time, but comes this way in float64 or without Triton alone.
TILE_ELEMENTS_CPU = 1 << 19
TILE_ELEMENTS_GPU = 1 << 22


class Tile(NamedTuple):
    """Some images, and some squares of each: the stride x stride pixels between the centres of four cells.

    Squares straddle cells, and the outermost lie partly outside the image. A tile needs no score twice this way.
    """

    images: slice
    rows: slice  # of squares
    columns: slice


def tiles(coarse_BChw: Tensor, size: tuple[int, int], stride: int) -> Iterator[Tile]:
    """Cut (B, H, W) into tiles of a bounded number of scores; those of the same images follow each other."""
    batch, outputs, *_ = coarse_BChw.shape
    budget = TILE_ELEMENTS_GPU if coarse_BChw.is_cuda else TILE_ELEMENTS_CPU
    squares = max(1, budget // (outputs * stride * stride))
    height, width = (ceil((pixels + stride // 2) / stride) for pixels in size)  # in squares
    for images in _parts(batch, max(1, squares // (height * width))):
        for rows in _parts(height, max(1, squares // width)):
            for columns in _parts(width, squares):
                yield Tile(images, rows, columns)


def _parts(total: int, most: int) -> Iterator[slice]:
    """As few parts of at most `most` as there can be, of about the same size."""
    size = ceil(total / ceil(total / most))
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def pixels_of(squares: slice, length: int, stride: int) -> tuple[slice, slice]:
    """Which of `length` pixels along an axis lie in `squares`, and where in the tile they lie."""
    start, stop = squares.start * stride - stride // 2, squares.stop * stride - stride // 2
    inside = slice(max(start, 0), min(stop, length))
    return inside, slice(inside.start - start, inside.stop - start)


def upsample_tile(coarse_BChw: Tensor, tile: Tile, stride: int) -> Tensor:
    """The scores of a tile's pixels, (b, C, R, S) in float32 (float64 if the scores are).

    Those of pixels outside the image are repeated from its border; `pixels_of` says which are inside.
    """
    dtype = torch.promote_types(coarse_BChw.dtype, torch.float32)
    above, below = _neighbours(tile.rows, coarse_BChw, dim=2)
    left, right = _neighbours(tile.columns, coarse_BChw, dim=3)
    near, far = _weights(stride, dtype, coarse_BChw.device)
    coarse = coarse_BChw[tile.images]
    rows = coarse[:, :, torch.cat([above, below[-1:]])].to(dtype)  # (b, C, n + 1, w)
    wide = (rows[..., left, None] * near).addcmul_(rows[..., right, None], far).flatten(3)
    full = (wide[:, :, :-1, None] * near[:, None]).addcmul_(wide[:, :, 1:, None], far[:, None])
    return full.flatten(2, 3)


def add_tile_gradient(gradient_bChw: Tensor, gradient_bCRS: Tensor, tile: Tile, stride: int) -> None:
    """The transpose of `upsample_tile`: add a tile's gradient to that of its images' coarse scores, in place."""
    above, below = _neighbours(tile.rows, gradient_bChw, dim=2)
    left, right = _neighbours(tile.columns, gradient_bChw, dim=3)
    batch, outputs, height, width = gradient_bCRS.shape
    weights = torch.stack(_weights(stride, gradient_bCRS.dtype, gradient_bCRS.device))
    strips = gradient_bCRS.reshape(-1, stride, width)
    rows = torch.bmm(weights.expand(len(strips), 2, stride), strips)  # one matmul would copy the tile
    cells = rows.view(batch, outputs, height // stride, 2, width // stride, stride) @ weights.T
    for i, row in enumerate((above, below)):
        wide = gradient_bChw.new_zeros(*cells.shape[:3], gradient_bChw.shape[3])
        for j, column in enumerate((left, right)):
            wide.index_add_(3, column, cells[:, :, :, i, :, j])
        gradient_bChw.index_add_(2, row, wide)


def _neighbours(squares: slice, coarse_BChw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The cells before and after each square, along one axis; beyond the border, the outermost cell again."""
    index = torch.arange(squares.start - 1, squares.stop, device=coarse_BChw.device)
    index.clamp_(0, coarse_BChw.shape[dim] - 1)
    return index[:-1], index[1:]


def _weights(stride: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the cell before and the cell after, for the pixels of a square along one axis."""
    far = (torch.arange(stride, dtype=dtype, device=device) + 0.5) / stride
    return 1 - far, far


def upsample(coarse_BChw: Tensor, size: tuple[int, int], stride: int, offset: int = 0) -> Tensor:
    """All scores at full size, (B, C, H, W): the largest tensor there is; prefer the functions that tile.

    The image begins `offset` pixels after the first that the cells cover.
    """
    full = F.interpolate(coarse_BChw, scale_factor=stride, mode="bilinear", align_corners=False)
    if torch.compiler.is_exporting():
        # A slice is whole or a part, and an exported graph would take sizes alone that are as in its example.
        rows, columns = (torch.arange(offset, offset + pixels, device=full.device) for pixels in size)
        return full.index_select(2, rows).index_select(3, columns)
    return full[:, :, offset : offset + size[0], offset : offset + size[1]]


def covered(coarse_BChw: Tensor, stride: int) -> tuple[int, int]:
    """Pixels that the cells cover, in height and width."""
    return coarse_BChw.shape[2] * stride, coarse_BChw.shape[3] * stride


def argmax_upsampled(coarse_BChw: Tensor, size: tuple[int, int], stride: int, offset: int = 0) -> Tensor:
    """The output with the highest score at each pixel, (B, H, W) uint8, ties to the lower; NaN counts as infinity.

    The image begins `offset` pixels after the first that the cells cover.
    """
    if offset:
        labels = argmax_upsampled(coarse_BChw, covered(coarse_BChw, stride), stride)
        return labels[:, offset : offset + size[0], offset : offset + size[1]]
    if uses_kernels(coarse_BChw):
        from fcn_dist.model.kernels import argmax

        return argmax(coarse_BChw, size, stride)
    labels = torch.empty((len(coarse_BChw), *size), dtype=torch.uint8, device=coarse_BChw.device)
    for tile in tiles(coarse_BChw, size, stride):
        rows, its_rows = pixels_of(tile.rows, size[0], stride)
        columns, its_columns = pixels_of(tile.columns, size[1], stride)
        winners = _argmax(upsample_tile(coarse_BChw, tile, stride))
        labels[tile.images, rows, columns] = winners[:, its_rows, its_columns]
    return labels


def _argmax(scores_bCRS: Tensor) -> Tensor:
    """The highest score's output in uint8, the lower one of a tie; overwrites NaN, which counts as infinity.

    By passes that torch runs with vector instructions; its argmax over this dimension takes longer than all of them.
    """
    outputs, infinity = scores_bCRS.shape[1], float("inf")
    scores_bCRS.nan_to_num_(nan=infinity, posinf=infinity, neginf=-infinity)
    highest = (scores_bCRS == scores_bCRS.amax(dim=1, keepdim=True)).view(torch.uint8)
    # Lower outputs count more. There are at most 255, so this fits.
    order = torch.arange(outputs, 0, -1, dtype=torch.uint8, device=highest.device)[:, None, None]
    return outputs - highest.mul_(order).amax(dim=1)
