"""FCN-32s, -16s and -8s on VGG: images in, scores out (Shelhamer, Long, Darrell 2016, section 4).

Shapes: B images, H x W pixels, C outputs, h x w = ceil(H / stride) x ceil(W / stride) cells.

Geometry "same": every convolution is padded to keep its size and pooling rounds up, so a cell of stride s covers
pixels [s*i, s*(i+1)), maps of different stride stay aligned at their top left corner, and any image size works.
Geometry "reference" is in reference.py; there the image is a window of what the cells cover.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fcn_dist.config import BACKBONES, ModelConfig
from fcn_dist.model import reference
from fcn_dist.model.batchnorm import BatchNorm2d
from fcn_dist.model.columns import ColumnConv2d
from fcn_dist.model.dropout import drawn_keys, relu_dropout
from fcn_dist.model.preprocess import TORCHVISION, Preprocessing, normalise
from fcn_dist.model.recompute import recomputed
from fcn_dist.model.relupool import POOLS, ReLUAveragePool, ReLUPool
from fcn_dist.model.score import Score, at_once_scale
from fcn_dist.model.upsampling import upsample

# Convolutions and their channels in each of the five stages (Simonyan & Zisserman 2015, table 1, D and E).
STAGE_CHANNELS = (64, 128, 256, 512, 512)
STAGE_CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
HEAD_CHANNELS = 4096
HEAD_STAGE = 6  # fc6 and fc7, after the five of the trunk
SKIP_STAGES = (4, 3)  # whose pooled maps are scored as well, coarsest first
# Stages recomputed as one part, by a few images: where nearly all the memory is. The weights beyond are so many
# that summing their gradients would cost more than their activations are worth.
EARLY_STAGES = 3
STRIDES = {"fcn8s": 8, "fcn16s": 16, "fcn32s": 32}

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
        self.is_reference = config.geometry == "reference"
        # Pixels that the coarse map covers before the image's first.
        self.offset = reference.pixels_before(self.stride) if self.is_reference else 0
        channels = [scaled(c, config.width) for c in STAGE_CHANNELS]
        head = config.head_width or scaled(HEAD_CHANNELS, config.width)
        padding = reference.PADDING if self.is_reference else 1
        self.features = build_trunk(config.backbone, channels, padding, config.pooling)
        self.fc6 = ColumnConv2d(channels[4], head, 7, padding=0 if self.is_reference else 3)
        self.fc7 = ColumnConv2d(head, head, 1)
        self.score_fr = nn.Conv2d(head, num_outputs, 1)
        scale4, scale3 = (at_once_scale(config, stage) for stage in SKIP_STAGES)
        self.score_pool4 = Score(channels[3], num_outputs, scale4) if self.stride <= 16 else None
        self.score_pool3 = Score(channels[2], num_outputs, scale3) if self.stride <= 8 else None
        self.auxiliary: nn.ModuleDict | None = None  # heads that training may add; see auxiliary.py
        # In training, see recompute.py: how many of the first stages, and images at once in the early ones (0: all).
        self.recompute_stages, self.recompute_images = 0, 0
        self._compiled: list[Callable[[Tensor], Tensor]] = []  # by stage; see compile_stages
        self.reset_parameters()
        for parameter in self.parameters():
            # As convolutions of channels_last activations return their gradients, which are then not copied.
            if parameter.dim() == 4 and parameter.shape[-1] > 1:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        self.freeze(config.frozen_stages)

    def reset_parameters(self) -> None:
        """He's normal initialisation; score layers start at zero, as in the reference."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module.weight.is_meta:
                    continue  # no numbers to draw, and torch would load its compiler for it, which takes 1.6 s
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
        self._frozen = [layer for stage in self.stages()[:stages] for layer in stage]
        for layer in self._frozen:
            layer.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """As torch's, but layers of frozen stages stay in evaluation mode."""
        super().train(mode)
        for layer in self._frozen:
            layer.eval()
        return self

    def forward(
        self,
        images_BHW3: Tensor,
        coarse: bool = False,
        dropout_keys: Sequence[int] | None = None,
        auxiliary: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Scores (B, C, H, W) of RGB images in 0-255 (uint8 or floating), or of all cells, (B, C, h, w), if `coarse`.

        In training mode, dropout draws from `dropout_keys`, one 64-bit key an image; None: keys from torch's global
        generator. With `auxiliary`, a tuple: also the scores of the auxiliary heads, of the cells of pool3 and pool4.
        """
        size = (images_BHW3.shape[1], images_BHW3.shape[2])
        if dropout_keys is None:
            dropout_keys = drawn_keys(len(images_BHW3)) if self.training and self.config.dropout else []
        skips: dict[int, Tensor] = {}
        of_heads: list[Tensor] = []
        x, stages = images_BHW3, self.stages()
        for numbers in self.parts():
            layers = [layer for number in numbers for layer in stages[number - 1]]
            x = self.run(lambda x, numbers=numbers: self.through(numbers, x), layers, x, numbers[-1])  # type: ignore[misc]
            score = {4: self.score_pool4, 3: self.score_pool3}.get(numbers[-1])
            if score is not None:
                # At once: backward goes the other way, and would otherwise hold its gradient through the whole head.
                skips[numbers[-1]] = score(x)
            if auxiliary and self.auxiliary is not None and numbers[-1] in SKIP_STAGES:
                of_heads.append(self.auxiliary[f"pool{numbers[-1]}"](x))
        x = self.run(lambda x: self.head(x, dropout_keys), [self.fc6, self.fc7], x, HEAD_STAGE)
        scores = (reference.fuse if self.is_reference else fuse)(self.score_fr(x), skips)
        if not coarse:
            scores = upsample(scores, size, self.stride, self.offset)
        return (scores, *of_heads) if auxiliary else scores

    def stages(self) -> list[list[nn.Module]]:
        """The layers of the trunk's five stages."""
        stages: list[list[nn.Module]] = [[]]
        for layer in self.features:
            stages[-1].append(layer)
            if isinstance(layer, POOLS):
                stages.append([])
        return stages[:-1]

    def parts(self) -> list[list[int]]:
        """The numbers of the stages that are computed as one: the early ones that are recomputed, else each alone."""
        first, last = self.config.frozen_stages + 1, min(self.recompute_stages, EARLY_STAGES)
        together = list(range(first, last + 1))
        alone = [[number] for number in range(1, len(STAGE_CHANNELS) + 1) if number not in together]
        return sorted([together, *alone] if together else alone)

    def run(self, part: Callable[[Tensor], Tensor], layers: Sequence[nn.Module], x: Tensor, last_stage: int) -> Tensor:
        """`part(x)`, recomputed in backward if its last stage is among those that are."""
        if last_stage > self.recompute_stages:
            return part(x)
        return recomputed(part, layers, x, self.recompute_images if last_stage <= EARLY_STAGES else 0)

    def through(self, numbers: Sequence[int], x: Tensor) -> Tensor:
        """Stages of the trunk; pixels are prepared for the first."""
        stages = self.stages()
        for number in numbers:
            *layers, pool = stages[number - 1]
            if number == 1:
                x = normalise(x, self.preprocessing, self.score_fr.weight.dtype)
            if self._compiled and self.training:  # images that are evaluated are of many sizes
                x = self._compiled[number - 1](x)
            else:
                for layer in layers:
                    x = layer(x)
            x = pool(x)
        return x

    def compile_stages(self) -> None:
        """From now on, torch.compile makes one function of the layers before each pooling, for each size in training.

        Names and values of weights stay what they are.
        """
        self._compiled = [torch.compile(nn.Sequential(*layers), dynamic=False) for *layers, _ in self.stages()]

    def head(self, x: Tensor, dropout_keys: Sequence[int]) -> Tensor:
        """fc6 and fc7 as convolutions, (B, 512, h, w) to (B, 4096, h, w) at full width."""
        probability = self.config.dropout if self.training else 0.0
        x = relu_dropout(self.fc6(x), probability, dropout_keys, layer=6)
        return relu_dropout(self.fc7(x), probability, dropout_keys, layer=7)

    @property
    def new_layers(self) -> tuple[str, ...]:
        """Prefixes of the parameters that a classifier's convolutions do not provide."""
        return ("fc6.", "fc7.", "score_", "auxiliary.")


def fuse(scores: Tensor, skips: Mapping[int, Tensor]) -> Tensor:
    """Add the skips' scores, by their stages, coarsest first."""
    for stage in SKIP_STAGES:
        if stage in skips:
            scores = upsample(scores, (skips[stage].shape[2], skips[stage].shape[3]), 2) + skips[stage]
    return scores


def build_trunk(backbone: str, channels: Sequence[int], padding: int, pooling: str) -> nn.Sequential:
    """The convolutions of VGG, their layers numbered as torchvision numbers them.

    The first convolution pads by `padding` pixels, the others by one cell. Convolutions keep their bias before batch
    normalisation, which takes it out again, as torchvision's files have it.
    """
    layers: list[nn.Module] = []
    previous = 3
    counts = STAGE_CONVOLUTIONS[backbone.removesuffix(BATCH_NORM)]
    for stage, (count, width) in enumerate(zip(counts, channels, strict=True), 1):
        for _ in range(count):
            layers.append(nn.Conv2d(previous, width, 3, padding=1 if layers else padding))
            if backbone.endswith(BATCH_NORM):
                layers.append(BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            previous = width
        layers[-1] = nn.Identity()
        layers.append(ReLUAveragePool() if pooling == "average" and stage < len(counts) else ReLUPool())
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
