"""Batch normalisation in float32, whatever the precision of activations and weights (Ioffe & Szegedy 2015).

Shapes: B images, C channels, h x w cells.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_dist.errors import UserError

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's layer, its state dict included, for 16-bit weights beside float32 statistics.

    DeepSpeed casts parameters to the precision of training and leaves buffers in float32, a mix that torch's layer
    refuses on a CPU. Here scale and bias are read in float32, activations as they come, and the running statistics
    stay in float32 even if the module is cast.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    moving: bool = True  # whether a forward in training moves the running statistics

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Normalise by the micro-batch in training, by the running statistics in evaluation; the dtype stays.

        In training a micro-batch whose statistics are not finite leaves the running ones as they are: an update that
        is skipped for it must not poison every later evaluation. Raises UserError if a channel has a single value.
        """
        dtype = torch.promote_types(x_BChw.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        mean_C, variance_C = self.running_mean.to(dtype, copy=True), self.running_var.to(dtype, copy=True)
        if not self.training:
            return F.batch_norm(x_BChw, mean_C, variance_C, weight, bias, False, 0.0, self.eps)
        if x_BChw.numel() == x_BChw.shape[1]:
            raise UserError(
                f"batch normalisation has one value a channel in a micro-batch of {tuple(x_BChw.shape)}; two are "
                "needed; choose a larger data.crop or micro-batch, or a model.backbone without batch normalisation"
            )
        assert self.momentum is not None
        normalised = F.batch_norm(x_BChw, mean_C, variance_C, weight, bias, True, self.momentum, self.eps)
        if not self.moving:
            return normalised
        with torch.no_grad():
            finite = mean_C.isfinite().all() & variance_C.isfinite().all()
            self.running_mean.copy_(torch.where(finite, mean_C, self.running_mean))
            self.running_var.copy_(torch.where(finite, variance_C, self.running_var))
            self.num_batches_tracked += 1
        return normalised

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, after in list(self.named_buffers(recurse=False)):
            if after.dtype in SIXTEEN_BITS:
                self._buffers[name] = before[name].to(after.device)
        return self
