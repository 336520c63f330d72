"""The data of a step: a loader's micro-batches in, and what all ranks agree on about them out.

A loader that fails on one rank would leave the others waiting in their next collective. So each step begins with one
sum over the ranks that says whether all have their data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from fcn_dist.data.loader import Batch
from fcn_dist.errors import EarlyEnd, UserError
from fcn_dist.ranks import Rank
from fcn_dist.scoring.agreement import raise_together
from fcn_dist.training.bad_samples import BadSamples
from fcn_dist.training.collective import sum_over_ranks


@dataclass
class Intake:
    """Takes a step's micro-batches from this rank's loader."""

    batches: Iterator[Batch]
    accumulation: int
    rank: Rank
    device: torch.device
    bad_samples: BadSamples
    _failure: UserError | EarlyEnd | None = None

    def take(self) -> list[Batch]:
        """The next step's micro-batches; fewer if the loader failed, which `agree` then says on all ranks."""
        micro_batches: list[Batch] = []
        try:
            micro_batches += islice(self.batches, self.accumulation)
        except (UserError, EarlyEnd) as error:
            self._failure = error
        return micro_batches

    def agree(self, done: int, micro_batches: list[Batch]) -> int:
        """The labelled pixels of the global batch that ends step `done`, at least 1. All ranks call it.

        Raises UserError, on all ranks alike, if a rank's loader failed, or damaged samples exceed their budget;
        EarlyEnd if one of its processes was killed.
        """
        labelled = sum(batch.labelled for batch in micro_batches)
        found = [bad for batch in micro_batches for bad in batch.bad_samples]
        counts = torch.tensor([labelled, len(found), int(self._failure is not None)], device=self.device)
        total, damaged, failed = sum_over_ranks(counts, self.rank).tolist()
        if failed:
            raise_together(self._failure, self.rank)
        if damaged:
            self.bad_samples.add(done, found)
        return max(1, int(total))
