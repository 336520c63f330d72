"""A network small enough for tests, its sizes odd on purpose."""

import torch

from fcn_dist.config import ModelConfig
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import FCN
from fcn_dist.model.preprocess import TORCHVISION

# 11 and 5 elements divide by neither 2 nor 3 ranks.
DESCRIPTION = ModelDescription(
    ModelConfig(width=0.01, head_width=11, dropout=0.0),
    TORCHVISION,
    ("sky", "sea", "sand", "rock", "crab"),
    ((10, 20, 30), (0, 0, 200), (200, 180, 90), (90, 90, 90), (220, 40, 10)),
    score_other=False,
)


def tiny_network(description: ModelDescription = DESCRIPTION, seed: int = 0) -> FCN:
    """Random weights, score layers included, so that every weight shows in the scores and labels differ."""
    torch.manual_seed(seed + 1)
    model = description.build()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if name.startswith("score") else 0.3)
    return model.eval()
