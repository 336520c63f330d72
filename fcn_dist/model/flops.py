"""How much arithmetic a training step is: a network and the size of its images in, floating-point operations out."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from fcn_dist.model import reference
from fcn_dist.model.batchnorm import BatchNorm2d
from fcn_dist.model.fcn import FCN
from fcn_dist.model.relupool import POOLS


class Use(NamedTuple):
    """A convolution where it stands in the network."""

    layer: nn.Conv2d
    cells: int  # of its output
    passes_gradient: bool  # whether something before it is trained, so that its input needs a gradient


def training_flops(model: FCN, size: tuple[int, int]) -> int:
    """Of forward and backward for one image of `size`, (height, width), a multiplication and an addition being two.

    Convolutions alone count, once each: three times forward, but for a gradient that nobody needs, that of the pixels
    or those of frozen layers. Interpolation, loss, optimizer, and whatever is computed a second time to save memory are
    left out, so a share of a device's peak that is reckoned with this is never flattered by them.
    """
    total = 0
    for layer, cells, passes_gradient in convolutions(model, size):
        kernel = layer.kernel_size[0] * layer.kernel_size[1]
        forward = 2 * layer.in_channels * layer.out_channels * kernel * cells
        total += forward * (1 + int(layer.weight.requires_grad) + int(passes_gradient))
    return total


def convolutions(model: FCN, size: tuple[int, int]) -> Iterator[Use]:
    """Every convolution of the network for an image of `size`, in the order they are computed."""
    wider = 2 * (reference.PADDING - 1) if model.is_reference else 0  # than the image, by the first convolution
    height, width, trained = size[0] + wider, size[1] + wider, False
    pools = []
    for layer in model.features:
        if isinstance(layer, POOLS):
            height, width = (height + 1) // 2, (width + 1) // 2  # rounds up
            pools.append((height * width, trained))
        elif isinstance(layer, nn.Conv2d):
            yield Use(layer, height * width, trained)
            trained = trained or layer.weight.requires_grad
        elif isinstance(layer, BatchNorm2d):
            trained = trained or layer.weight.requires_grad
    if model.is_reference:
        height, width = height - 6, width - 6  # fc6 has a kernel of 7 and no padding
    for layer in (model.fc6, model.fc7, model.score_fr):
        yield Use(layer, height * width, trained)
        trained = trained or layer.weight.requires_grad
    of_pools: list[tuple[nn.Module | None, tuple[int, bool]]] = [
        (model.score_pool4, pools[3]),
        (model.score_pool3, pools[2]),
    ]
    if model.auxiliary is not None:
        of_pools += [(model.auxiliary["pool4"], pools[3]), (model.auxiliary["pool3"], pools[2])]
    for score, (cells, passes_gradient) in of_pools:
        if isinstance(score, nn.Conv2d):
            yield Use(score, cells, passes_gradient)
