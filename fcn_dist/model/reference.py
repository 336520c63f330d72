"""The geometry of the Caffe release of FCN (fcn.berkeleyvision.org, voc-fcn*/net.py), which pytorch-fcn keeps.

Pixels are padded by 100, fc6 is not padded, and maps that come out too large are cropped at fixed places. Transposed
convolutions have frozen bilinear weights, so beyond the outermost cells scores fade to zero: as if a ring of cells
that score nothing lay around the map. With that ring the last of them is what `upsampling` does, in a window.

Shapes: C outputs, h x w coarse cells.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING = 100  # pixels
SKIP_CROPS = {4: 5, 3: 9}  # cells of the skips' maps before the first that is used, by stage
SCORE_CROPS = {32: 19, 16: 27, 8: 31}  # pixels of the upsampled map before the image's first, by stride
RING = 1  # cells that score nothing


def pixels_before(stride: int) -> int:
    """How far inside the map, the ring included, the image's first pixel lies.

    A transposed convolution with a kernel of 2 * stride begins half a cell before the first cell.
    """
    return RING * stride + SCORE_CROPS[stride] - stride // 2


def fuse(scores: Tensor, skips: Mapping[int, Tensor]) -> Tensor:
    """Add the skips' scores, by their stages, coarsest first; the result has the ring."""
    for stage, crop in SKIP_CROPS.items():
        if stage in skips:
            scores = deconvolved(scores)
            height, width = scores.shape[2:]
            scores = scores + skips[stage][:, :, crop : crop + height, crop : crop + width]
    return F.pad(scores, (RING,) * 4)


def deconvolved(scores_BChw: Tensor) -> Tensor:
    """Twice the size and two more, (B, C, 2h + 2, 2w + 2): bilinear, each output by itself."""
    outputs = scores_BChw.shape[1]
    weight = bilinear(2).to(scores_BChw).expand(outputs, 1, -1, -1)
    return F.conv_transpose2d(scores_BChw, weight, stride=2, groups=outputs)


def bilinear(stride: int) -> Tensor:
    """The kernel of a transposed convolution that interpolates, (2 * stride, 2 * stride)."""
    tent = 1 - (torch.arange(2 * stride) - stride + 0.5).abs() / stride
    return torch.outer(tent, tent)
