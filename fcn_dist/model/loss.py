"""Cross-entropy at full resolution from coarse scores, without holding full-resolution scores.

Shapes as in `upsampling`; targets are output channels in uint8, IGNORE_LABEL where nothing is learned.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.model.upsampling import add_tile_gradient, tiles, upsample_tile


def summed_cross_entropy(coarse_BChw: Tensor, targets_BHW: Tensor, stride: int) -> Tensor:
    """Cross-entropy of the upsampled scores, summed over labelled pixels: a float32 scalar.

    Divide by the labelled pixels of the whole global batch; then ranks and accumulation do not change the update.
    Forward and gradient are one pass, so backward costs one multiplication.
    """
    loss: Tensor = _SummedCrossEntropy.apply(coarse_BChw, targets_BHW, stride)  # type: ignore[no-untyped-call]
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coarse: Tensor, targets: Tensor, stride: int) -> Tensor:
        size = (targets.shape[1], targets.shape[2])
        dtype = torch.promote_types(coarse.dtype, torch.float32)
        gradient = torch.zeros_like(coarse, dtype=dtype) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=dtype, device=coarse.device)
        for tile in tiles(coarse, size, stride):
            target = targets[tile.images, tile.rows].long()
            log_probability = F.log_softmax(upsample_tile(coarse, tile, size, stride), dim=1)
            loss += F.nll_loss(log_probability, target, ignore_index=IGNORE_LABEL, reduction="sum")
            if gradient is not None:
                residual = _residual(log_probability, target)
                add_tile_gradient(gradient, residual, tile, size, stride)
        ctx.save_for_backward(gradient)
        ctx.coarse_dtype = coarse.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # Scaled in float32 first: an fp16 loss scale applied after rounding would not save small gradients.
        return (gradient * grad_loss).to(ctx.coarse_dtype), None, None


def _residual(log_probability: Tensor, target: Tensor) -> Tensor:
    """Softmax minus one-hot, zero at ignored pixels; overwrites its first argument."""
    labelled = (target != IGNORE_LABEL).unsqueeze(1)
    residual = log_probability.exp_()
    one = -labelled.to(residual.dtype)
    residual.scatter_add_(1, torch.where(labelled, target.unsqueeze(1), 0), one)
    return residual.mul_(labelled)
