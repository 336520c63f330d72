"""Cross-entropy at full resolution from coarse scores, without holding full-resolution scores.

Shapes as in `upsampling`; targets are output channels in uint8, IGNORE_LABEL where nothing is learned. On CUDA the loss
and its gradient are one Triton kernel; elsewhere, and in float64, torch works through tiles.
"""

from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.model.devices import uses_kernels
from fcn_dist.model.upsampling import Tile, add_tile_gradient, covered, pixels_of, tiles, upsample_tile


def summed_cross_entropy(coarse_BChw: Tensor, targets_BHW: Tensor, stride: int, offset: int = 0) -> Tensor:
    """Cross-entropy of the upsampled scores, summed over labelled pixels: a float32 scalar.

    The image begins `offset` pixels after the first that the cells cover. Divide by the labelled pixels of the whole
    global batch; then ranks and accumulation do not change the update. Forward and gradient are one pass, so backward
    costs one multiplication.
    """
    targets_BHW = placed(targets_BHW, coarse_BChw, stride, offset)
    loss: Tensor = SummedCrossEntropy.apply(coarse_BChw, targets_BHW, stride)  # type: ignore[no-untyped-call]
    return loss


def placed(targets_BHW: Tensor, coarse_BChw: Tensor, stride: int, offset: int) -> Tensor:
    """Targets of all pixels that the cells cover, ignored outside the image, which begins after `offset` of them."""
    if not offset:
        return targets_BHW
    batch, height, width = targets_BHW.shape
    canvas = targets_BHW.new_full((batch, *covered(coarse_BChw, stride)), IGNORE_LABEL)
    canvas[:, offset : offset + height, offset : offset + width] = targets_BHW
    return canvas


class SummedCrossEntropy(torch.autograd.Function):
    """What `summed_cross_entropy` computes, for autograd."""

    @staticmethod
    def forward(ctx: Any, coarse: Tensor, targets: Tensor, stride: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        if uses_kernels(coarse):
            from fcn_dist.model.kernels import loss_and_gradient

            # Its launches add to the gradient one after the other; in float32, each of them rounds next to nothing.
            loss, gradient = loss_and_gradient(coarse, targets, stride, torch.float32 if needs_gradient else None)
        else:
            loss, gradient = tiled_loss_and_gradient(coarse, targets, stride, needs_gradient)
        ctx.save_for_backward(gradient)
        ctx.coarse_dtype = coarse.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = torch.empty_like(gradient, dtype=ctx.coarse_dtype)
        for saved_Chw, scaled_Chw in zip(gradient, scaled, strict=True):  # an image at a time: small temporaries
            # Scaled in float32 first: an fp16 loss scale applied after rounding would not save small gradients, and
            # a factor rounded to bfloat16 would be wrong in the same way for all of them.
            torch.mul(saved_Chw.to(grad_loss.dtype), grad_loss, out=scaled_Chw)
        return scaled, None, None


def saved_dtype(scores: torch.dtype) -> torch.dtype:
    """What the tiled gradient waits for backward in.

    bfloat16 has the range of float32: rounding early loses no more than rounding late. Small float16 gradients are
    saved by the loss scale, which comes with backward, so they wait in float32.
    """
    return scores if scores == torch.bfloat16 else torch.promote_types(scores, torch.float32)


def tiled_loss_and_gradient(
    coarse: Tensor, targets: Tensor, stride: int, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient for the scores if it is needed, through tiles of some images or of a part of one."""
    size = (targets.shape[1], targets.shape[2])
    dtype = torch.promote_types(coarse.dtype, torch.float32)
    gradient = torch.empty_like(coarse, dtype=saved_dtype(coarse.dtype)) if needs_gradient else None
    loss = torch.zeros((), dtype=dtype, device=coarse.device)
    for images, parts in groupby(tiles(coarse, size, stride), attrgetter("images")):
        # Tiles of an image share cells, so their sum is rounded once all of them are in.
        sums = torch.zeros_like(coarse[images], dtype=dtype) if needs_gradient else None
        for tile in parts:
            scores = upsample_tile(coarse, tile, stride)
            loss += _loss_and_residual(scores, _targets_of(tile, targets, stride))
            if sums is not None:
                add_tile_gradient(sums, scores, tile, stride)
            del scores  # before the next tile's are there
        if gradient is not None and sums is not None:
            gradient[images] = sums
    return loss, gradient


def _targets_of(tile: Tile, targets_BHW: Tensor, stride: int) -> Tensor:
    """The targets of a tile's pixels, (b, R, S) int64; those outside the image are ignored."""
    rows, its_rows = pixels_of(tile.rows, targets_BHW.shape[1], stride)
    columns, its_columns = pixels_of(tile.columns, targets_BHW.shape[2], stride)
    inside = targets_BHW[tile.images, rows, columns]
    height, width = ((part.stop - part.start) * stride for part in (tile.rows, tile.columns))
    targets = inside.new_full((len(inside), height, width), IGNORE_LABEL, dtype=torch.int64)
    targets[:, its_rows, its_columns] = inside
    return targets


def _loss_and_residual(scores_bCRS: Tensor, targets_bRS: Tensor) -> Tensor:
    """The summed loss; turns scores into softmax minus one-hot, zero at ignored pixels, in the same memory."""
    targets = targets_bRS.unsqueeze(1)
    labelled = targets != IGNORE_LABEL
    targets = torch.where(labelled, targets, 0)
    scores_bCRS -= scores_bCRS.amax(dim=1, keepdim=True)
    at_target = scores_bCRS.gather(1, targets)
    odds = scores_bCRS.exp_()
    total = odds.sum(dim=1, keepdim=True)
    loss = torch.where(labelled, total.log() - at_target, 0.0).sum()
    odds *= labelled / total
    odds.scatter_add_(1, targets, -labelled.to(odds.dtype))
    return loss
