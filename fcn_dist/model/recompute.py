"""Recomputation: a part of a network keeps its input alone, and is computed again in backward.

Where no image depends on another, it is computed a few images at a time, so that what it holds for a while does not
grow with the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fcn_dist.model.batchnorm import BatchNorm2d

PARTITIONED = "ds_id"  # an attribute of parameters that ZeRO-3 has taken apart


def recomputed(part: Callable[[Tensor], Tensor], layers: Sequence[nn.Module], x: Tensor, images: int) -> Tensor:
    """`part(x)`, which uses `layers`, to be computed again in backward, `images` at a time (0: all at once).

    Gradients of parameters are summed over the images in float32, unless ZeRO-3 has taken them apart. With batch
    normalisation in training the images of a micro-batch depend on each other, so it is computed in one; its running
    statistics move once.
    """
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not parameters:
        return part(x)
    if any(isinstance(module, BatchNorm2d) and module.training for layer in layers for module in layer.modules()):
        images = 0
    if any(hasattr(parameter, PARTITIONED) for parameter in parameters):
        return _recomputed_through_hooks(part, layers, images or len(x), x)
    result: Tensor = _Recomputed.apply(part, layers, images or len(x), x, *parameters)  # type: ignore[no-untyped-call]
    return result


def _recomputed_through_hooks(
    part: Callable[[Tensor], Tensor], layers: Sequence[nn.Module], images: int, x: Tensor
) -> Tensor:
    """The same for weights that are only there while their layer computes, by hooks on its forward and backward.

    Gradients of parameters are summed over the images in their own precision: autograd does it.
    """
    parts: list[Tensor] = [
        checkpoint(
            part,
            some,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _statistics_kept(layers)),
            determinism_check="none",  # of sizes, which weights have lost by the second time
            preserve_rng_state=False,  # dropout is keyed
        )
        for some in torch.split(x, images)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        part: Callable[[Tensor], Tensor],
        layers: Sequence[nn.Module],
        images: int,
        x: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.part, ctx.layers, ctx.images, ctx.parameters = part, layers, images, parameters
        ctx.save_for_backward(x)
        if images >= len(x):
            return part(x)
        result: Tensor | None = None
        for first, some in zip(range(0, len(x), images), torch.split(x, images), strict=True):
            values = part(some)
            if result is None:
                shape = (len(x), *values.shape[1:])
                result = values.new_empty(shape).to(memory_format=torch.channels_last)
            result[first : first + images] = values
        assert result is not None
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[3]
        gradient_x = torch.empty_like(x) if needs_x else None
        sums: list[Tensor] = []
        for first, some, passed in zip(
            range(0, len(x), ctx.images), torch.split(x, ctx.images), torch.split(gradient, ctx.images), strict=True
        ):
            with torch.enable_grad(), _statistics_kept(ctx.layers):
                some = some.detach().requires_grad_(needs_x)
                values = ctx.part(some)
            wanted = ([some] if needs_x else []) + list(ctx.parameters)
            found = list(torch.autograd.grad(values, wanted, passed))
            if gradient_x is not None:
                gradient_x[first : first + ctx.images] = found.pop(0)
            if ctx.images >= len(x):
                sums = found
            else:
                sums = [s + f for s, f in zip(sums, found, strict=True)] if sums else [f.float() for f in found]
        in_order = (s.to(p.dtype) for s, p in zip(sums, ctx.parameters, strict=True))
        return (None, None, None, gradient_x, *in_order)


@contextmanager
def _statistics_kept(layers: Sequence[nn.Module]) -> Iterator[None]:
    norms = [m for layer in layers for m in layer.modules() if isinstance(m, BatchNorm2d) and m.moving]
    for norm in norms:
        norm.moving = False
    try:
        yield
    finally:
        for norm in norms:
            norm.moving = True
