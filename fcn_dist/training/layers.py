"""What each layer's gradient and weights look like at a cadence: how far into the network training has reached.

Gradients are those of the whole global batch before clipping, under any ZeRO stage: DeepSpeed puts together the parts
that ranks hold, one parameter after the other. That takes room for the largest of them in float32 (0.4 GB for fc6).
"""

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


@dataclass
class LayerReport:
    """Looks at the layers in every `every`-th step (0: never), and writes what was seen."""

    engine: Engine
    every: int
    journal: Journal | None  # on rank 0
    _seen: dict[str, dict[str, Any]] = field(default_factory=dict)

    def look(self, step: int) -> None:
        """After the last backward of a step and before its update. All ranks call it."""
        self._seen = {}
        if not self.every or step % self.every:
            return
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
    is not finite has the norm None.
    """
    magnitudes = values.detach().float().abs().flatten() / scale
    norm = float(magnitudes.norm())
    not_zero = magnitudes[magnitudes > 0]
    logarithms = not_zero.log2().floor().clamp_(LOWEST, HIGHEST - 1)
    counts = torch.histc(logarithms, HIGHEST - LOWEST, LOWEST, HIGHEST)
    return {
        "norm": norm if norm < float("inf") else None,
        "zeros": 1 - len(not_zero) / max(1, len(magnitudes)),
        "histogram": [round(share, 6) for share in (counts / max(1, len(not_zero))).tolist()],
    }
