"""What one rank cannot do, no rank goes on with: a failure of one becomes the same error on all."""

import torch.distributed as dist

from fcn_dist.errors import EarlyEnd, UserError
from fcn_dist.ranks import Rank


def raise_together(failure: UserError | EarlyEnd | None, rank: Rank) -> None:
    """Raise the failure of the lowest rank that has one, on all ranks. All of them call it."""
    failures = [failure]
    if rank.world_size > 1:
        failures = [None] * rank.world_size
        dist.all_gather_object(failures, failure)
    for found in failures:
        if found:
            raise found
