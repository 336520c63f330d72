"""The reckoned arithmetic of a step, against torch's own count of what it computes."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fcn_dist.config import ModelConfig
from fcn_dist.model.auxiliary import add_auxiliary_heads
from fcn_dist.model.fcn import FCN
from fcn_dist.model.flops import training_flops


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (ModelConfig(), (256, 256)),
        (ModelConfig(), (97, 131)),
        (ModelConfig(backbone="vgg19", variant="fcn16s", width=0.5), (64, 96)),
        (ModelConfig(backbone="vgg16_bn", variant="fcn32s"), (70, 33)),
        (ModelConfig(frozen_stages=1), (64, 64)),
        (ModelConfig(frozen_stages=3, head_width=384), (64, 64)),
        (ModelConfig(frozen_stages=4), (64, 64)),
        (ModelConfig(frozen_stages=5), (64, 64)),
    ],
)
def test_a_step_is_what_torch_counts(config: ModelConfig, size: tuple[int, int]) -> None:
    with torch.device("meta"):  # shapes alone
        model = FCN(151, replace(config, dropout=0.0)).train()  # masks are drawn on a device
        images = torch.zeros(2, *size, 3)
    with FlopCounterMode(display=False) as counter:
        model(images, coarse=True).sum().backward()
    assert 2 * training_flops(model, size) == counter.get_total_flops()


@pytest.mark.parametrize(
    "config", [ModelConfig(width=0.25), ModelConfig(width=0.25, variant="fcn32s", frozen_stages=3)]
)
def test_auxiliary_heads_count_too(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = FCN(151, replace(config, dropout=0.0)).train()
        add_auxiliary_heads(model)
        images = torch.zeros(2, 64, 80, 3)
    with FlopCounterMode(display=False) as counter:
        sum(scores.sum() for scores in model(images, coarse=True, auxiliary=True)).backward()
    assert 2 * training_flops(model, (64, 80)) == counter.get_total_flops()
