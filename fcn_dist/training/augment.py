"""What is done to a micro-batch on the device: colour jitter, keyed by stream position.

Shapes: B images, H x W the crop.
"""

import numpy as np
import torch
from torch import Tensor

from fcn_dist.config import DataConfig
from fcn_dist.data.loader import Batch
from fcn_dist.data.transforms import generator
from fcn_dist.keys import Purpose


def to_device(batch: Batch, config: DataConfig, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, H, W, 3), uint8 or float32 in 0-255, and targets (B, H, W) uint8 as the network trains on them."""
    images = batch.images.to(device, non_blocking=True)
    targets = batch.targets.to(device, non_blocking=True)
    if config.jitter:
        draws = np.stack([generator(seed, position, Purpose.PHOTOMETRIC).random(3) for position in batch.positions])
        factors = torch.from_numpy(1 + config.jitter * (2 * draws - 1)).float()
        images = jitter(images, factors.to(device, non_blocking=True))
    return images, targets


def jitter(images_BHW3: Tensor, factors_B3: Tensor) -> Tensor:
    """Scale brightness, contrast (about the image's mean grey) and saturation (about each pixel's grey).

    Returns float32 in 0-255. Grey is Rec. 601 luma.
    """
    brightness, contrast, saturation = factors_B3[:, :, None, None, None].unbind(1)
    images = images_BHW3.float() * brightness
    luma = images.new_tensor((0.299, 0.587, 0.114))
    mean = (images @ luma).mean(dim=(1, 2))[:, None, None, None]
    images = mean + (images - mean) * contrast
    grey = (images @ luma)[..., None]
    return (grey + (images - grey) * saturation).clamp_(0, 255)
