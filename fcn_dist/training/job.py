"""What a run trains with."""

from dataclasses import dataclass

import torch

from fcn_dist.config import Recipe
from fcn_dist.data.stream import SampleStream
from fcn_dist.ranks import Rank
from fcn_dist.training.deepspeed_config import EngineConfig
from fcn_dist.training.schedule import ParameterGroup


@dataclass
class Job:
    """What does not change from step to step, but for the cut of the global batch where memory runs out."""

    recipe: Recipe
    config: EngineConfig  # see shortage.py
    groups: list[ParameterGroup]
    stream: SampleStream
    stride: int  # of the network's coarse scores
    offset: int  # pixels that they cover before the image's first
    rank: Rank
    device: torch.device
    steps: int  # of the whole run
