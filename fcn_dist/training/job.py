"""What a run trains with."""

from dataclasses import dataclass

import torch

from fcn_dist.config import Recipe
from fcn_dist.data.stream import SampleStream
from fcn_dist.ranks import Rank
from fcn_dist.training.deepspeed_config import EngineConfig
from fcn_dist.training.schedule import ParameterGroup


@dataclass(frozen=True)
class Job:
    """What does not change from step to step."""

    recipe: Recipe
    config: EngineConfig
    groups: list[ParameterGroup]
    stream: SampleStream
    stride: int  # of the network's coarse scores
    rank: Rank
    device: torch.device
    steps: int  # of the whole run
