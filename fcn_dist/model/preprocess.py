"""From uint8 images to what the first convolution expects, on the device the images are on.

Shapes: B images, H x W pixels, 3 channels.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """How the weights of a network want their pixels; it travels with the weights."""

    channel_order: str  # "RGB" or "BGR"
    mean: tuple[float, float, float]  # subtracted, in 0-255, in channel order
    std: tuple[float, float, float]  # divided by, in 0-255, in channel order

    def __post_init__(self) -> None:
        assert self.channel_order in ("RGB", "BGR") and all(s > 0 for s in self.std)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """From JSON form; raises KeyError, TypeError or ValueError if it is not one."""
        (m0, m1, m2), (s0, s1, s2) = values["mean"], values["std"]
        mean, std = (float(m0), float(m1), float(m2)), (float(s0), float(s1), float(s2))
        if values["channel_order"] not in ("RGB", "BGR") or min(std) <= 0:
            raise ValueError(f"no preprocessing: {values}")
        return cls(values["channel_order"], mean, std)


# The means of Simonyan & Zisserman's release of VGG (ILSVRC 2014), blue first.
CAFFE = Preprocessing("BGR", (103.939, 116.779, 123.68), (1.0, 1.0, 1.0))
# torchvision's ImageNet statistics, times 255.
TORCHVISION = Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def normalise(images_BHW3: Tensor, preprocessing: Preprocessing, dtype: torch.dtype) -> Tensor:
    """RGB images in 0-255, uint8 or floating, to (B, 3, H, W) of `dtype` in channels_last memory.

    The arithmetic is float32 whatever `dtype` is: pixels minus mean lose bits in bfloat16 otherwise.
    """
    images = images_BHW3.float()
    if preprocessing.channel_order == "BGR":
        images = images.flip(-1)
    mean = images.new_tensor(preprocessing.mean)
    std = images.new_tensor(preprocessing.std)
    return ((images - mean) / std).to(dtype).permute(0, 3, 1, 2)
