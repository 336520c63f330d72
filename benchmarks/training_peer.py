"""The peer in training: FCN-8s as pytorch-fcn has it, in plain PyTorch, written anew from its published architecture.

Shapes: B images, H x W pixels, C outputs.

What it does for each step is what its users' script does: normalised float images and int64 labels to the device,
forward, cross-entropy of full-size scores summed over labelled pixels and divided by the images, a look whether that is
a number, backward, SGD. Two things that its script does besides are left out, both in the peer's favour: it copies the
full-size log-probabilities once more to pick the labelled pixels, and scores each training batch on the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from training_steps import Scenes, largest, measure

PADDING = 100  # of the first convolution; the crops below follow from it
CROP_POOL4, CROP_POOL3, CROP_SCORES = 5, 9, 31
MEAN_BGR = (104.00699, 116.66877, 122.67892)
IGNORED = -1
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-10, 0.99, 5e-4  # its at-once configuration
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class PeerFCN8s(nn.Module):
    """VGG16 padded by 100 pixels, and three dense transposed convolutions up to full size."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        previous, padding = 3, PADDING
        for stage in STAGES:
            layers: list[nn.Module] = []
            for channels in stage:
                layers += [nn.Conv2d(previous, channels, 3, padding=padding), nn.ReLU(inplace=True)]
                previous, padding = channels, 1
            self.stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, stride=2, ceil_mode=True)))
        self.head = nn.Sequential(
            nn.Conv2d(512, 4096, 7),
            nn.ReLU(inplace=True),
            nn.Dropout2d(),
            nn.Conv2d(4096, 4096, 1),
            nn.ReLU(inplace=True),
            nn.Dropout2d(),
        )
        self.score_fr = nn.Conv2d(4096, num_outputs, 1)
        self.score_pool4 = nn.Conv2d(512, num_outputs, 1)
        self.score_pool3 = nn.Conv2d(256, num_outputs, 1)
        self.upscore2 = nn.ConvTranspose2d(num_outputs, num_outputs, 4, stride=2, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(num_outputs, num_outputs, 4, stride=2, bias=False)
        self.upscore8 = nn.ConvTranspose2d(num_outputs, num_outputs, 16, stride=8, bias=False)
        for upscore in (self.upscore2, self.upscore_pool4, self.upscore8):
            upscore.weight.data = bilinear(num_outputs, upscore.kernel_size[0])

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Scores (B, C, H, W)."""
        x, pools = images_B3HW, []
        for stage in self.stages:
            x = stage(x)
            pools.append(x)
        coarse = self.upscore2(self.score_fr(self.head(x)))
        coarse = self.upscore_pool4(coarse + cropped(self.score_pool4(pools[3]), CROP_POOL4, coarse))
        coarse = self.upscore8(coarse + cropped(self.score_pool3(pools[2]), CROP_POOL3, coarse))
        return cropped(coarse, CROP_SCORES, images_B3HW).contiguous()


def cropped(larger: Tensor, offset: int, like: Tensor) -> Tensor:
    """The part of `larger` from `offset` on in both directions, of the size of `like`."""
    return larger[:, :, offset : offset + like.shape[2], offset : offset + like.shape[3]]


def bilinear(outputs: int, size: int) -> Tensor:
    """Weights of a transposed convolution that interpolates each of `outputs` channels by itself."""
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    tent = 1 - (torch.arange(size) - centre).abs() / factor
    weights = torch.zeros(outputs, outputs, size, size)
    weights[range(outputs), range(outputs)] = torch.outer(tent, tent)
    return weights


def summed_loss(scores_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Cross-entropy summed over labelled pixels."""
    return F.nll_loss(F.log_softmax(scores_BCHW, dim=1), labels_BHW, ignore_index=IGNORED, reduction="sum")


def learned(model: nn.Module, bias: bool) -> Iterator[nn.Parameter]:
    """Weights or biases of convolutions: what its optimizer is given.

    The transposed convolutions are not among them. They stay what they are, though autograd computes their gradients.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            parameter = module.bias if bias else module.weight
            assert isinstance(parameter, nn.Parameter)
            yield parameter


class PeerTrainer:
    """The peer ready to train; its weights are random, as He draws them."""

    def __init__(self, outputs: int, device: torch.device, precision: str, compiled: bool) -> None:
        self.outputs, self.device = outputs, device
        with device:  # random numbers for 135 million weights are made where they are needed
            self.model = PeerFCN8s(outputs).train()
            for weight in learned(self.model, bias=False):
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
        groups: list[dict[str, Any]] = [
            {"params": list(learned(self.model, bias=False))},
            {"params": list(learned(self.model, bias=True)), "lr": 2 * LEARNING_RATE, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if precision == "autocast":
            self._autocast = lambda: torch.autocast(device.type, torch.bfloat16)
        self._forward: Callable[[Tensor, Tensor], Tensor] = self._loss
        if compiled:
            self.compile()

    def compile(self) -> None:
        """Compile forward and loss from now on, for each size of batch anew."""
        self._forward = torch.compile(self._loss, dynamic=False)

    def prepare(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """What its loader hands over."""
        images = (scenes.images.flip(-1).float() - torch.tensor(MEAN_BGR)).permute(0, 3, 1, 2).contiguous()
        labels = scenes.targets.long()
        labels[labels == scenes.ignored] = IGNORED
        return scenes.pinned(images), scenes.pinned(labels)

    def step(self, inputs: tuple[Tensor, Tensor]) -> float:
        """One step; returns the loss."""
        images, labels = (tensor.to(self.device) for tensor in inputs)
        self.optimizer.zero_grad()
        loss = self._forward(images, labels)
        value = float(loss.detach())
        if value != value:
            raise ValueError("the peer's loss is not a number")
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return value

    def flops(self, size: tuple[int, int]) -> int:
        """Of a step, for one image: what torch counts in its own geometry, dense transposed convolutions included."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            PeerFCN8s(self.outputs)(torch.zeros(1, 3, *size)).sum().backward()
        return int(counter.get_total_flops())

    def close(self) -> None:
        """Give memory back."""
        del self.model, self.optimizer, self._forward
        torch.compiler.reset()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            return summed_loss(self.model(images), labels) / len(images)


def train(precision: str, compiled: bool, **options: Any) -> dict[str, Any]:
    """Figures of training steps; `options` are those of `measure`."""
    return measure(lambda outputs, device: PeerTrainer(outputs, device, precision, compiled), **options)


def train_largest(precision: str, compiled: bool, **options: Any) -> dict[str, Any]:
    """The largest batches; `options` are those of `largest`."""
    return largest(lambda outputs, device: PeerTrainer(outputs, device, precision, False), compiled=compiled, **options)
