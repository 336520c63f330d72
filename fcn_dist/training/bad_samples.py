"""Damaged samples that loaders have replaced: counted over all ranks, written down, and held against the budget."""

import json
from collections.abc import Iterable

from fcn_dist.data.crops import BadSample
from fcn_dist.errors import UserError, named
from fcn_dist.ranks import Rank
from fcn_dist.training.collective import of_all_ranks, on_rank_zero
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.runfolder import Journal

EVENT = "bad_sample"


class BadSamples:
    """The distinct damaged samples of a run so far, the same on every rank."""

    def __init__(self, budget: int, rank: Rank, progress: TrainingDisplay, journal: Journal | None) -> None:
        """Begin with those that the journal tells of, if the run is continued. All ranks call it."""
        self._budget, self._rank, self._progress, self._journal = budget, rank, progress, journal
        self.reasons: dict[tuple[str, str], str] = on_rank_zero(rank, self._from_journal)

    def add(self, done: int, found: Iterable[BadSample]) -> None:
        """Take in what this rank met in the step that ends as step `done`. All ranks call it, when any of them met one.

        Raises UserError, on all ranks alike, when there are more than the budget allows.
        """
        for bad in (bad for of_rank in of_all_ranks(list(found), self._rank) for bad in of_rank):
            if (bad.shard, bad.key) in self.reasons:
                continue
            self.reasons[bad.shard, bad.key] = bad.reason
            self._progress.say(f"step {done}: replaced sample {bad.key!r} of {bad.shard}: {bad.reason}")
            if self._journal:
                self._journal.write(EVENT, done, **bad._asdict())
        if len(self.reasons) > self._budget:
            raise UserError(
                f"{len(self.reasons)} samples are damaged: {self.listed()}; data.max_bad_samples allows "
                f"{self._budget}; restore the shards (shards/verify.py finds all damage), or raise the budget"
            )

    def summary(self) -> str:
        """One line for the end of a run; empty if there were none."""
        count = len(self.reasons)
        return f"{count} damaged sample{'s' * (count > 1)} replaced: {self.listed()}" if count else ""

    def listed(self) -> str:
        """Where they lie."""
        return named([f"{key!r} in {shard}" for shard, key in self.reasons])

    def _from_journal(self) -> dict[tuple[str, str], str]:
        if not self._journal:
            return {}
        lines = (json.loads(line) for line in self._journal.path.read_text().splitlines())
        return {(line["shard"], line["key"]): line["reason"] for line in lines if line["event"] == EVENT}
