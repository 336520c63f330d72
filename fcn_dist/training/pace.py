"""Who slows the others down: each rank's own seconds a step, compared over ranks at every log step.

A step takes all ranks equally long, since they wait for each other in it. What tells them apart is the time that is a
rank's own: waiting for its data, and computing. On CPU, computing is all of a step but the wait for data and the waits
inside collectives (waits.py), whatever the ZeRO stage. On CUDA it is the device's time from the start to the end of
the forward, backward not seen; under ZeRO-3 that holds the gathers, in which the fast wait for the slow, so that there
only a rank that waits for data is found.
"""

import platform
from dataclasses import dataclass
from statistics import median_low
from typing import NamedTuple

import torch

from fcn_dist.ranks import Rank
from fcn_dist.training.collective import of_all_ranks
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.phases import Phase, PhaseClock
from fcn_dist.training.runfolder import Journal

EVENT = "straggler"
SLOWER = 1.2  # times the typical rank's own time, and
MARGIN = 0.05  # seconds more than it, is what makes a straggler


class Pace(NamedTuple):
    """One rank's seconds a step."""

    data: float  # waiting for its loader
    computing: float
    waiting: float  # for other ranks

    @property
    def own(self) -> float:
        """What the others may have to wait for."""
        return self.data + self.computing


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than the others."""

    rank: int
    waits_for_data: bool  # rather than computes for longer
    pace: Pace
    typical: float  # seconds a step of its own that the other ranks take


def find_stragglers(paces: list[Pace]) -> list[Straggler]:
    """The ranks, of `paces` in order of rank, whose own time stands out from the lower median of all."""
    typical = Pace(*(median_low(seconds) for seconds in zip(*paces, strict=True)))
    own = median_low(pace.own for pace in paces)
    return [
        Straggler(rank, pace.data - typical.data > pace.computing - typical.computing, pace, own)
        for rank, pace in enumerate(paces)
        if pace.own > own * SLOWER and pace.own > own + MARGIN
    ]


class DeviceEvents:
    """The time a CUDA device takes for forwards, by events in its stream that are read at log time alone."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def mark(self, phase: Phase) -> None:
        """A phase begins; each forward is followed by its backward."""
        if phase in (Phase.FORWARD, Phase.BACKWARD):
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)

    def take_seconds(self) -> float:
        """Of the forwards since the last call."""
        events, self._events = self._events, []
        if events:
            events[-1].synchronize()
        return sum(float(a.elapsed_time(b)) for a, b in zip(events[::2], events[1::2], strict=True)) / 1000


class PaceReport:
    """Measures this rank's pace between log steps, and tells of stragglers when they change."""

    def __init__(
        self,
        rank: Rank,
        clock: PhaseClock,
        events: DeviceEvents | None,
        first_step: int,
        progress: TrainingDisplay,
        journal: Journal | None,
    ) -> None:
        """All ranks call it. `events` are of a device that computes beside the clock, if there is one."""
        self._rank, self._clock, self._events = rank, clock, events
        self._progress, self._journal = progress, journal
        self._computed = 0.0
        self._first_step = self._done = first_step
        self._before = self._so_far()
        self._known: set[tuple[int, bool]] = set()
        self._hosts = of_all_ranks(platform.node(), rank)

    def compare(self, done: int) -> None:
        """Compare the ranks' paces since the last call, step `done` being the last one. All ranks call it."""
        so_far, steps = self._so_far(), done - self._done
        mine = Pace(*((now - before) / steps for now, before in zip(so_far, self._before, strict=True)))
        self._done, self._before, is_first = done, so_far, self._done == self._first_step
        if is_first:
            return  # its steps hold the start of loaders and devices, which tells nothing of those to come
        stragglers = find_stragglers(of_all_ranks(mine, self._rank))
        for straggler in stragglers:
            if (straggler.rank, straggler.waits_for_data) not in self._known:
                self._tell(done, straggler)
        self._known = {(straggler.rank, straggler.waits_for_data) for straggler in stragglers}

    def _so_far(self) -> Pace:
        """Seconds, from the start on."""
        seconds, blocked = self._clock.seconds, self._clock.blocked
        passes = (Phase.FORWARD, Phase.BACKWARD)
        if self._events:
            self._computed += self._events.take_seconds()
        else:
            self._computed = sum(seconds[phase] - blocked[phase] for phase in passes)
        return Pace(seconds[Phase.DATA], self._computed, sum(blocked[phase] for phase in (Phase.AGREEING, *passes)))

    def _tell(self, done: int, straggler: Straggler) -> None:
        host, pace = self._hosts[straggler.rank], straggler.pace
        what = "it waits for data" if straggler.waits_for_data else "its computing takes longer"
        self._progress.say(
            f"step {done}: rank {straggler.rank} on {host} slows the others down: {what}; a step takes "
            f"{pace.own:.2f} s of its own ({pace.data:.2f} s waiting for data, {pace.computing:.2f} s computing), of "
            f"the typical rank {straggler.typical:.2f} s"
        )
        if self._journal:
            reason = "data" if straggler.waits_for_data else "computing"
            figures = {f"{name}_seconds": round(value, 4) for name, value in pace._asdict().items()}
            typical = round(straggler.typical, 4)
            self._journal.write(
                EVENT, done, rank=straggler.rank, host=host, reason=reason, **figures, typical_seconds=typical
            )
