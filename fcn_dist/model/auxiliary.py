"""Auxiliary heads: pool3 and pool4 scored and trained by themselves, so that their gradients reach the trunk directly.

Deep supervision (Lee et al. 2015, Deeply-Supervised Nets), by the pixel loss of FCNs. The heads are in training alone:
evaluation does not compute them, and model files do not have them.

Shapes: B images, H x W pixels, C outputs, h x w = ceil(H / stride) x ceil(W / stride) cells of a pooled map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fcn_dist.config import ModelConfig
from fcn_dist.model import reference
from fcn_dist.model.fcn import FCN, STAGE_CHANNELS, scaled
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.model.score import Score, at_once_scale

HEAD_STRIDES = {3: 8, 4: 16}  # of the maps that are scored, by stage, in the order of their scores
PREFIX = "auxiliary."  # of the names of their parameters


def add_auxiliary_heads(model: FCN) -> None:
    """Give `model` a 1x1 score layer on pool3 and one on pool4, which begin at zero; its own weights stay."""
    model.auxiliary = build_heads(model.config, model.num_outputs)


def build_heads(config: ModelConfig, outputs: int) -> nn.ModuleDict:
    """The layers by stage, as a network of this configuration needs them, scaled as its skips are."""
    heads = nn.ModuleDict()
    for stage in HEAD_STRIDES:
        channels = scaled(STAGE_CHANNELS[stage - 1], config.width)
        heads[f"pool{stage}"] = head = Score(channels, outputs, at_once_scale(config, stage))
        nn.init.zeros_(head.weight)
        assert head.bias is not None
        nn.init.zeros_(head.bias)
    return heads


def head_shapes(model: FCN) -> dict[str, tuple[int, ...]]:
    """Of the parameters of a model's heads, whether it has them or not, by name."""
    with torch.device("meta"):
        heads = build_heads(model.config, model.num_outputs)
    return {PREFIX + name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}


def head_offset(config: ModelConfig) -> int:
    """Pixels that pooled maps cover before the image's first."""
    return reference.PADDING - 1 if config.geometry == "reference" else 0  # a convolution of 3 pads by 1 anyway


def auxiliary_cross_entropy(scores: Sequence[Tensor], targets_BHW: Tensor, offset: int) -> Tensor:
    """Of each head's scores (B, C, h, w), upsampled by its own stride, and summed over heads and labelled pixels."""
    losses = [
        summed_cross_entropy(coarse, targets_BHW, stride, offset)
        for coarse, stride in zip(scores, HEAD_STRIDES.values(), strict=True)
    ]
    return torch.stack(losses).sum()
