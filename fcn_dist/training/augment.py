"""What is done to a micro-batch on the device: mirroring and colour jitter, keyed by stream position.

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
    # Copied even where they are on the device already: a batch is not changed under its owner.
    images = batch.images.to(device, non_blocking=True, copy=True)
    targets = batch.targets.to(device, non_blocking=True, copy=True)
    draws = np.stack([generator(seed, position, Purpose.PHOTOMETRIC).random(4) for position in batch.positions])
    # Known here already, so that the device neither waits nor mirrors images only to drop them.
    mirrored = torch.from_numpy(np.flatnonzero(draws[:, 0] < config.flip)).to(device, non_blocking=True)
    images[mirrored] = images[mirrored].flip(2)
    targets[mirrored] = targets[mirrored].flip(2)
    if config.jitter:
        factors = torch.from_numpy(1 + config.jitter * (2 * draws[:, 1:] - 1)).float()
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
