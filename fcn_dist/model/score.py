"""A pooled map's scores: a 1x1 convolution times a fixed scale.

Shapes: B images, C outputs, h x w cells.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_dist.config import ModelConfig

# The at-once form's fixed scales of pooled maps, by stage (voc-fcn8s-atonce/net.py of the Caffe release).
AT_ONCE_SCALES = {4: 0.01, 3: 0.0001}


class Score(nn.Conv2d):
    """The scores of a skip: a 1x1 convolution of its map times a fixed scale, applied where there is less to hold."""

    def __init__(self, channels: int, num_outputs: int, scale: float) -> None:
        super().__init__(channels, num_outputs, 1)
        self.scale = scale

    def forward(self, x_BChw: Tensor) -> Tensor:
        """(B, C, h, w)."""
        if self.scale == 1:
            return super().forward(x_BChw)
        assert self.bias is not None
        return torch.add(self.bias[:, None, None], F.conv2d(x_BChw, self.weight), alpha=self.scale)


def at_once_scale(config: ModelConfig, stage: int) -> float:
    """Of the scores of a stage's pooled map."""
    return AT_ONCE_SCALES[stage] if config.at_once else 1.0
