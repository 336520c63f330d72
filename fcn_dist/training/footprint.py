"""What a training step holds for its images: a network, a crop and a precision in, bytes out.

A step is taken with fake tensors, which have sizes but no content, so that neither a device nor much time is needed.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fcn_dist.config import ModelConfig, Recipe
from fcn_dist.model.auxiliary import HEAD_STRIDES, add_auxiliary_heads, head_offset
from fcn_dist.model.fcn import FCN
from fcn_dist.model.loss import SummedCrossEntropy, placed, saved_dtype, tiled_loss_and_gradient
from fcn_dist.model.upsampling import tiles
from fcn_dist.training.augment import jitter

SMALLEST = 8  # images; two sizes are tried, and what the recomputation of early stages holds has its full size in both


class Moment(NamedTuple):
    """Bytes above parameters and optimizer, at one moment of a step."""

    activations: float
    gradients: float  # of the parameters, those there are by then


class Step(NamedTuple):
    """The moments of a step's parts at which they hold most."""

    forward: Moment  # the loss, too
    head: Moment  # backward, until the gradient of the largest weight, that of fc6, is there: among the activations
    trunk: Moment  # the rest


@dataclass(frozen=True)
class Footprint:
    """What steps of any size hold: each of its parts grows by the same with every image."""

    small: Step
    large: Step
    images: tuple[int, int]  # in each

    def step(self, images: int) -> Step:
        """Of a micro-batch of so many images."""
        share = (images - self.images[0]) / (self.images[1] - self.images[0])
        return Step(*(between(*moments, share) for moments in zip(self.small, self.large, strict=True)))


def between(small: Moment, large: Moment, share: float) -> Moment:
    """On the line through two moments, `share` of the way from one to the other."""
    activations = small.activations + share * (large.activations - small.activations)
    return Moment(max(0.0, activations), large.gradients)


def footprint(recipe: Recipe, outputs: int, precision: torch.dtype, recompute_stages: int) -> Footprint:
    """Of a recipe's steps with a network of so many outputs, its pixels and labels included."""
    train, data = recipe.train, recipe.data
    smallest = max(SMALLEST, train.recompute_images)
    sizes = (smallest, 2 * smallest)
    options = (
        *(recipe.model, outputs, train.auxiliary > 0, data.crop, bool(data.jitter)),
        *(precision, recompute_stages, train.recompute_images),
    )
    return Footprint(rehearsed(sizes[0], *options), rehearsed(sizes[1], *options), sizes)


@cache
def rehearsed(
    images: int,
    config: ModelConfig,
    outputs: int,
    auxiliary: bool,
    crop: tuple[int, int],
    jittered: bool,
    precision: torch.dtype,
    recompute_stages: int,
    recompute_images: int,
) -> Step:
    """A step of `images` images, taken with fake tensors."""
    with FakeTensorMode(), default_dtype(precision):
        model = build(config, outputs, auxiliary)
        model.recompute_stages, model.recompute_images = recompute_stages, recompute_images
        with default_dtype(torch.float32):
            tracker = Tracker(model)
            pixels = torch.zeros(images, *crop, 3, dtype=torch.uint8)
            labels = torch.zeros(images, *crop, dtype=torch.uint8)
            tracker.add(pixels, labels)
            with tracker:
                if jittered:
                    pixels = jitter(pixels, torch.ones(images, 3))
                scores, *of_heads = model(pixels, coarse=True, dropout_keys=range(images), auxiliary=True)
                losses = [rehearsed_loss(scores, labels, model.stride, model.offset)]
                for coarse, stride in zip(of_heads, HEAD_STRIDES.values(), strict=False):  # no heads, no scores
                    losses.append(rehearsed_loss(coarse, labels, stride, head_offset(config)))
                tracker.begin_part()
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
                tracker.begin_part()
    return Step(*tracker.moments)


def rehearsed_loss(coarse: Tensor, labels: Tensor, stride: int, offset: int) -> Tensor:
    """As `summed_cross_entropy`."""
    loss: Tensor = RehearsedLoss.apply(coarse, placed(labels, coarse, stride, offset), stride)  # type: ignore[no-untyped-call]
    return loss


class RehearsedLoss(SummedCrossEntropy):
    """Holds what the loss of all images holds, but goes through the tiles of the first alone, one as large as another.

    The tiles of all of them took most of a rehearsal's time.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, stride: int) -> Tensor:
        gradient = torch.empty_like(scores, dtype=saved_dtype(scores.dtype))
        first = next(tiles(scores, (targets.shape[1], targets.shape[2]), stride)).images
        loss, _ = tiled_loss_and_gradient(scores[first], targets[first], stride, needs_gradient=True)
        ctx.save_for_backward(gradient)
        ctx.coarse_dtype = scores.dtype
        return loss


class Tracker(TorchDispatchMode):
    """Adds up the storages of tensors while operations make them and as they are freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held, self.gradients = 0, 0
        self.moments: list[Moment] = []  # of parts that have ended
        self._fullest = Moment(0, 0)  # of this part
        self._known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._largest = max(trained, key=lambda parameter: parameter.numel())
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._add_gradient)  # type: ignore[no-untyped-call]

    def add(self, *tensors: Tensor) -> None:
        """Count the storages of `tensors`, each once, until they are freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.held += size
                weakref.finalize(storage, self._drop, key, size)
        if self.held > sum(self._fullest):
            self._fullest = self._now()

    def begin_part(self) -> None:
        """Of the step."""
        self.moments.append(self._fullest)
        self._fullest = self._now()

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size

    def _add_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()
        if parameter is self._largest:
            self.begin_part()

    def _now(self) -> Moment:
        return Moment(self.held - self.gradients, self.gradients)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.add(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
        return result


def without_content(config: ModelConfig, outputs: int, auxiliary: bool = False) -> FCN:
    """A network whose weights have sizes alone."""
    with FakeTensorMode():
        return build(config, outputs, auxiliary)


def build(config: ModelConfig, outputs: int, auxiliary: bool) -> FCN:
    """A network, with auxiliary heads if it is to have them; its convolutions are those of any device."""
    model = FCN(outputs, config)
    for layer in (model.fc6, model.fc7):
        layer.by_columns = False  # of which a CPU holds a bounded number
    if auxiliary:
        add_auxiliary_heads(model)
    return model


@contextmanager
def default_dtype(precision: torch.dtype) -> Iterator[None]:
    """New floating-point tensors have this precision in the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(precision)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
