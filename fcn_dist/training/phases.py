"""Where a rank is in its work: the loop says what it begins, and others read what, since when, and how long it took."""

import time
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple


class Phase(Enum):
    """What a rank does, in the order in which a step goes through it; forward and backward in turns."""

    STARTING = "starting"
    DATA = "taking data"
    AGREEING = "agreeing"
    FORWARD = "in forward"
    BACKWARD = "in backward"
    LOGGING = "logging"
    EVALUATING = "evaluating"
    SAVING = "saving"


TRAINING_PHASES = (Phase.DATA, Phase.AGREEING, Phase.FORWARD, Phase.BACKWARD, Phase.LOGGING)


class Moment(NamedTuple):
    """One look at a PhaseClock."""

    step: int  # the step in work, counted from 1
    phase: Phase
    ticks: int  # how often there has been progress
    since: float  # of the last progress, by time.monotonic


class PhaseClock:
    """Which phase of which step the main thread is in, and the seconds it has spent in each phase.

    The main thread writes; `now` is one object, so that another thread reads it whole.
    """

    def __init__(self, step: int = 0, mark: Callable[[Phase], None] = lambda phase: None) -> None:
        """Before `step`, if that is not 0; `mark` is told of every phase that begins."""
        self.seconds = dict.fromkeys(Phase, 0.0)  # in each phase
        self.blocked = dict.fromkeys(Phase, 0.0)  # of those, in waits for other ranks; see waits.py
        self.now = Moment(step, Phase.STARTING, 0, time.monotonic())
        self._entered = self.now.since
        self._mark = mark

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Begin `phase`, of the step in work unless another is given; to begin it again is progress too."""
        moment = time.monotonic()
        self.seconds[self.now.phase] += moment - self._entered
        self._entered = moment
        self.now = Moment(self.now.step if step is None else step, phase, self.now.ticks + 1, moment)
        self._mark(phase)

    def advance(self) -> None:
        """There was progress within the phase."""
        self.now = self.now._replace(ticks=self.now.ticks + 1, since=time.monotonic())

    def add_wait(self, seconds: float) -> None:
        """The main thread was blocked until other ranks had come so far."""
        self.blocked[self.now.phase] += seconds
