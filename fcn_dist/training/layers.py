"""What each layer's gradient and weights look like at a cadence: how far into the network training has reached.

Gradients are those of the whole global batch before clipping, under any ZeRO stage: DeepSpeed puts together the parts
that ranks hold, one parameter after the other. That takes room for the largest of them in float32 (0.4 GB for fc6).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from fcn_dist.training.engine import Engine, loss_scale
from fcn_dist.training.runfolder import Journal

EVENT = "layers"
# Of magnitudes, in powers of 2: the first bin begins at 2 ** LOWEST, each is twice as wide as the one before.
LOWEST, HIGHEST = -40, 8
EXPONENTS = 256  # of a float32
VALUES_AT_ONCE = 1 << 24


@dataclass
class LayerReport:
    """Looks at the layers in every `every`-th step (0: never), and writes what was seen."""

    engine: Engine
    every: int
    journal: Journal | None  # on rank 0
    _seen: dict[str, dict[str, Any]] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """Whether `look` is to be called in the step."""
        return self.every > 0 and step % self.every == 0

    def look(self) -> None:
        """After the last backward of a step and before its update. All ranks call it; rank 0 describes."""
        self._seen = {}
        scale = loss_scale(self.engine) or 1.0
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                gradient, weight = safe_get_full_grad(parameter), _master(parameter)
                if self.journal and gradient is not None:
                    self._seen[name] = {"gradient": describe(gradient, scale), "weight": describe(weight)}

    def write(self, step: int) -> None:
        """What was seen in the step, if anything; a step that was done again is seen once."""
        if self.journal and self._seen:
            self.journal.write(EVENT, step, layers=self._seen)
        self._seen = {}


def _master(parameter: nn.Parameter) -> Tensor:
    """In float32, where the engine keeps one; otherwise the weight itself."""
    master: Tensor | None = safe_get_full_fp32_param(parameter)
    return parameter.detach() if master is None else master


def describe(values: Tensor, scale: float = 1.0) -> dict[str, Any]:
    """Norm, share of zeros and histogram of magnitudes of `values` divided by `scale`.

    A histogram has the shares of those that are not zero by powers of 2; the outermost bins have what lies beyond. What
    is not finite has the norm None. Holds no second copy of `values`, and waits for the device once.
    """
    sums = torch.zeros(2 + EXPONENTS, dtype=torch.float64, device=values.device)
    for some in torch.split(values.detach().reshape(-1), VALUES_AT_ONCE):
        magnitudes = some.float().abs().div_(scale)
        sums[0] += magnitudes.square().sum(dtype=torch.float64)
        sums[1] += (magnitudes == 0).sum()
        # The bits of a float32 after its sign are its exponent, by 127 too large; it is 0 for 0 and what is next to it.
        sums[2:] += torch.bincount(magnitudes.view(torch.int32) >> 23, minlength=EXPONENTS)
    squares, zeros, *by_exponent = sums.tolist()
    by_exponent[0] -= zeros
    low, high = LOWEST + 127, HIGHEST + 126  # the outermost bins
    histogram = [sum(by_exponent[: low + 1]), *by_exponent[low + 1 : high], sum(by_exponent[high:])]
    not_zero = values.numel() - zeros
    return {
        "norm": math.sqrt(squares) if squares < math.inf else None,
        "zeros": zeros / max(1, values.numel()),
        "histogram": [round(count / max(1, not_zero), 6) for count in histogram],
    }
