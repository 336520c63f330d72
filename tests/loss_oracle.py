"""Random scores and targets, and the loss that torch makes of them at full resolution in float64."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_dist.labels import IGNORE_LABEL


def oracle(coarse: Tensor, targets: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient of full-resolution scores, in float64."""
    scores = coarse.detach().double().requires_grad_()
    full_size = (scores.shape[2] * stride, scores.shape[3] * stride)
    full = F.interpolate(scores, full_size, mode="bilinear", align_corners=False)
    full = full[..., : targets.shape[1], : targets.shape[2]]
    loss = F.cross_entropy(full, targets.long(), ignore_index=IGNORE_LABEL, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, scores)
    return loss.detach(), gradient


def problem(
    batch: int, outputs: int, size: tuple[int, int], stride: int, ignored: float, seed: int = 0, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    cells = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    coarse = torch.randn(batch, outputs, *cells, generator=random) * spread
    targets = torch.randint(0, outputs, (batch, *size), generator=random, dtype=torch.uint8)
    targets[torch.rand(targets.shape, generator=random) < ignored] = IGNORE_LABEL
    return coarse, targets
