"""Dropout whose mask is a function of the sample, so that ranks, micro-batches and restarts do not change it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_dist.keys import Purpose, key64


def keyed_dropout(x_BChw: Tensor, probability: float, keys: Sequence[int] | None, layer: int) -> Tensor:
    """Zero elements with `probability` and scale the rest by 1 / (1 - probability).

    `keys` holds one 64-bit key an image, from (seed, position); None draws from torch's own generator.
    """
    if probability == 0:
        return x_BChw
    if keys is None:
        return F.dropout(x_BChw, probability, training=True)
    assert len(keys) == len(x_BChw)
    kept = torch.empty(x_BChw.shape, dtype=torch.bool, device=x_BChw.device)
    generator = torch.Generator(x_BChw.device)
    for image, key in enumerate(keys):
        generator.manual_seed(key64(Purpose.DROPOUT, key, layer))
        noise = torch.rand(x_BChw.shape[1:], generator=generator, device=x_BChw.device)
        torch.ge(noise, probability, out=kept[image])
    return x_BChw * kept * (1 / (1 - probability))
