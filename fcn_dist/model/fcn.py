"""FCN-32s, -16s and -8s on VGG: images in, scores out (Shelhamer, Long, Darrell 2016, section 4).

Shapes: B images, H x W pixels, C outputs, h x w = ceil(H / stride) x ceil(W / stride) cells.

Geometry "same": every convolution is padded to keep its size and pooling rounds up, so a cell of stride s covers
pixels [s*i, s*(i+1)), maps of different stride stay aligned at their top left corner, and any image size works.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_dist.config import BACKBONES, ModelConfig
from fcn_dist.model.batchnorm import BatchNorm2d
from fcn_dist.model.dropout import keyed_dropout
from fcn_dist.model.preprocess import TORCHVISION, Preprocessing, normalise
from fcn_dist.model.upsampling import upsample

# Convolutions and their channels in each of the five stages (Simonyan & Zisserman 2015, table 1, D and E).
STAGE_CHANNELS = (64, 128, 256, 512, 512)
STAGE_CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
HEAD_CHANNELS = 4096
STRIDES = {"fcn8s": 8, "fcn16s": 16, "fcn32s": 32}
# The at-once form's fixed scales, for pool4 and pool3 (voc-fcn8s-atonce/net.py of the Caffe release).
AT_ONCE_SCALES = (0.01, 0.0001)

BATCH_NORM = "_bn"  # ends the names of backbones that have it

assert {backbone.removesuffix(BATCH_NORM) for backbone in BACKBONES} == set(STAGE_CONVOLUTIONS)


class FCN(nn.Module):
    """A fully convolutional network with `num_outputs` scores a pixel.

    `config` gives variant, backbone and widths; `preprocessing` is what the weights expect of their pixels.
    """

    def __init__(
        self,
        num_outputs: int,
        config: ModelConfig | None = None,
        preprocessing: Preprocessing = TORCHVISION,
    ) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.num_outputs = num_outputs
        self.preprocessing = preprocessing
        self.stride = STRIDES[config.variant]
        channels = [scaled(c, config.width) for c in STAGE_CHANNELS]
        head = config.head_width or scaled(HEAD_CHANNELS, config.width)
        self.features = build_trunk(config.backbone, channels)
        self.fc6 = nn.Conv2d(channels[4], head, 7, padding=3)
        self.fc7 = nn.Conv2d(head, head, 1)
        self.score_fr = nn.Conv2d(head, num_outputs, 1)
        self.score_pool4 = nn.Conv2d(channels[3], num_outputs, 1) if self.stride <= 16 else None
        self.score_pool3 = nn.Conv2d(channels[2], num_outputs, 1) if self.stride <= 8 else None
        self.reset_parameters()
        self.freeze(config.frozen_stages)

    def reset_parameters(self) -> None:
        """He's normal initialisation; score layers start at zero, as in the reference."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, BatchNorm2d):
                module.reset_parameters()
        for score in (self.score_fr, self.score_pool4, self.score_pool3):
            if score is not None:
                nn.init.zeros_(score.weight)

    def freeze(self, stages: int) -> None:
        """Leave the first `stages` stages of the trunk out of training; no gradient is computed for them.

        Their batch normalisation is that of evaluation from now on.
        """
        ends = [i for i, layer in enumerate(self.features, start=1) if isinstance(layer, nn.MaxPool2d)]
        self._frozen = list(self.features)[: ends[stages - 1] if stages else 0]
        for layer in self._frozen:
            layer.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """As torch's, but layers of frozen stages stay in evaluation mode."""
        super().train(mode)
        for layer in self._frozen:
            layer.eval()
        return self

    def forward(self, images_BHW3: Tensor, coarse: bool = False, dropout_keys: Sequence[int] | None = None) -> Tensor:
        """Scores (B, C, H, W) of RGB images in 0-255 (uint8 or floating), or (B, C, h, w) if `coarse`.

        In training mode, dropout draws from `dropout_keys`, one 64-bit key an image, or if None from torch's
        global generator.
        """
        size = (images_BHW3.shape[1], images_BHW3.shape[2])
        x = normalise(images_BHW3, self.preprocessing, self.score_fr.weight.dtype)
        pools = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(x)
        scores = self.fuse(self.score_fr(self.head(x, dropout_keys)), pool4=pools[3], pool3=pools[2])
        return scores if coarse else upsample(scores, size, self.stride)

    def head(self, x: Tensor, dropout_keys: Sequence[int] | None) -> Tensor:
        """fc6 and fc7 as convolutions, (B, 512, h, w) to (B, 4096, h, w) at full width."""
        probability = self.config.dropout if self.training else 0.0
        x = keyed_dropout(F.relu(self.fc6(x)), probability, dropout_keys, layer=6)
        return keyed_dropout(F.relu(self.fc7(x)), probability, dropout_keys, layer=7)

    def fuse(self, scores: Tensor, pool4: Tensor, pool3: Tensor) -> Tensor:
        """Add the skips' scores, coarsest first."""
        scale4, scale3 = AT_ONCE_SCALES if self.config.at_once else (1.0, 1.0)
        for score, pool, scale in ((self.score_pool4, pool4, scale4), (self.score_pool3, pool3, scale3)):
            if score is not None:
                scores = upsample(scores, (pool.shape[2], pool.shape[3]), 2) + score(pool * scale)
        return scores

    @property
    def new_layers(self) -> tuple[str, ...]:
        """Prefixes of the parameters that a classifier's convolutions do not provide."""
        return ("fc6.", "fc7.", "score_")


def build_trunk(backbone: str, channels: Sequence[int]) -> nn.Sequential:
    """The convolutions of VGG, their layers numbered as torchvision numbers them.

    Convolutions keep their bias before batch normalisation, which takes it out again, as torchvision's files have it.
    """
    layers: list[nn.Module] = []
    previous = 3
    for count, width in zip(STAGE_CONVOLUTIONS[backbone.removesuffix(BATCH_NORM)], channels, strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(previous, width, 3, padding=1))
            if backbone.endswith(BATCH_NORM):
                layers.append(BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            previous = width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers)


def scaled(channels: int, width: float) -> int:
    """Channels at a width factor, a multiple of 8 for the sake of the hardware."""
    return max(8, round(channels * width / 8) * 8)


def parameter_count(model: nn.Module) -> int:
    """Learned numbers."""
    return sum(p.numel() for p in model.parameters())


def torch_dtype(name: str) -> torch.dtype:
    """ "float32", "bfloat16" or "float16" as torch names it."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
