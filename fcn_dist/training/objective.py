"""What training makes small: a micro-batch and a network in, summed losses out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fcn_dist.model.auxiliary import auxiliary_cross_entropy, head_offset
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.training.job import Job


class Losses(NamedTuple):
    """Cross-entropies summed over labelled pixels: float32 scalars."""

    main: Tensor  # of the network's own scores
    auxiliary: Tensor | None = None  # of the auxiliary heads together, without their weight; None: there are none

    def total(self, weight: float) -> Tensor:
        """What is trained, with this weight of the auxiliary heads."""
        return self.main if self.auxiliary is None else self.main + weight * self.auxiliary

    def shares(self, labelled: int) -> list[Tensor]:
        """Of the losses of a global batch with so many labelled pixels."""
        return [loss.detach() / labelled for loss in self if loss is not None]


def summed_losses(
    network: Callable[..., Any], job: Job, images_BHW3: Tensor, targets_BHW: Tensor, dropout_keys: Sequence[int]
) -> Losses:
    """One forward of `network`, an engine or the model itself, and its losses."""
    if not job.recipe.train.auxiliary:
        scores = network(images_BHW3, coarse=True, dropout_keys=dropout_keys)
        return Losses(summed_cross_entropy(scores, targets_BHW, job.stride, job.offset))
    scores, *of_heads = network(images_BHW3, coarse=True, dropout_keys=dropout_keys, auxiliary=True)
    return Losses(
        summed_cross_entropy(scores, targets_BHW, job.stride, job.offset),
        auxiliary_cross_entropy(of_heads, targets_BHW, head_offset(job.recipe.model)),
    )
