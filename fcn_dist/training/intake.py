"""The data of a step: a loader's micro-batches in, and what all ranks agree on about them out.

A loader that fails on one rank would leave the others waiting in their next collective. So each step begins with one
sum over the ranks that says whether all have their data, and whether one of them has been asked to stop.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from fcn_dist.data.loader import Batch
from fcn_dist.errors import UserError
from fcn_dist.ranks import Rank
from fcn_dist.scoring.agreement import raise_together
from fcn_dist.training.bad_samples import BadSamples
from fcn_dist.training.collective import sum_over_ranks
from fcn_dist.training.stop import StopRequest


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step before they train it."""

    labelled: int  # pixels of the global batch, at least 1
    stop: bool  # a rank has been asked to stop: the step is not to be trained


@dataclass
class Intake:
    """Takes a step's micro-batches from this rank's loader."""

    batches: Iterator[Batch]
    accumulation: int
    rank: Rank
    device: torch.device
    bad_samples: BadSamples
    stop: StopRequest
    _failure: UserError | None = None

    def take(self) -> list[Batch]:
        """The next step's micro-batches; fewer if the loader failed, which `agree` then says on all ranks."""
        micro_batches: list[Batch] = []
        try:
            micro_batches += islice(self.batches, self.accumulation)
        except UserError as error:
            self._failure = error
        return micro_batches

    def agree(self, done: int, micro_batches: list[Batch]) -> Agreement:
        """What the ranks agree on about the global batch that ends step `done`. All ranks call it.

        Raises UserError, on all ranks alike, if a rank's loader failed, or damaged samples exceed their budget.
        """
        labelled = sum(batch.labelled for batch in micro_batches)
        found = [bad for batch in micro_batches for bad in batch.bad_samples]
        counts = [labelled, len(found), int(self._failure is not None), int(bool(self.stop.reason))]
        total, damaged, failed, stop = sum_over_ranks(torch.tensor(counts, device=self.device), self.rank).tolist()
        if stop:  # before any failure: what ends this job may have ended a loader first
            return Agreement(1, stop=True)
        if failed:
            raise_together(self._failure, self.rank)
        if damaged:
            self.bad_samples.add(done, found)
        return Agreement(max(1, int(total)), stop=False)
