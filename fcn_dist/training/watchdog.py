"""The watchdog: ends a job in which no rank makes progress, and says which rank holds the others up, and where.

A thread in each rank. It needs neither the main thread nor a collective: ranks tell each other where they are by files
(beats.py). When its own main thread has made no progress for the limit, and no other rank that still beats has made
any either, the first rank to see it makes the folder RUN/ranks/stuck-JOB, which tells the others; each writes the
stacks of its threads there and ends with EXIT_STUCK.
"""

import faulthandler
import multiprocessing
import os
import secrets
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from fcn_dist.errors import EXIT_STUCK
from fcn_dist.outcome import leave_outcome
from fcn_dist.ranks import Rank
from fcn_dist.training.beats import Beat, Process, read_beat, stack_of, this_process, write_beat
from fcn_dist.training.collective import allow_waits, on_rank_zero
from fcn_dist.training.phases import Phase, PhaseClock
from fcn_dist.training.verdict import judge, report

LAST_BEAT = 1.0  # seconds between beats once the limit is near
FILE_PHASES = (Phase.STARTING, Phase.SAVING)
MOVED = 1 << 20  # bytes read and written since the last beat that count as progress of a phase that moves files
LAUNCHER_GRACE = 3.0  # seconds; a launcher looks at its ranks every second, and must see our exit code first
REPORT_NAME = "report.txt"
STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "Z": "it has died", "": "it has died"}


@dataclass
class Heard:
    """What one other rank has said since we began to listen."""

    beat: Beat
    changed: int  # the file's time of change, by its own clock
    idle: float  # seconds without progress, as it said or as we have seen since
    silence: float = 0.0  # seconds without a new beat


@dataclass
class Watchdog:
    """Watches this rank from a thread of its own between `__enter__` and `__exit__`; a limit of 0 watches nothing."""

    ranks_dir: Path
    job: str  # the same on all ranks, and of no other start
    rank: Rank
    clock: PhaseClock
    limit: float  # seconds
    _stop: threading.Event = field(default_factory=threading.Event)
    _heard: dict[int, Heard] = field(default_factory=dict)
    _ticks: int = -1
    _idle: float = 0.0
    _moved: int = 0
    _count: int = 0
    _warned: bool = False

    def __post_init__(self) -> None:
        self._interval = min(max(self.limit / 10, 1.0), 10.0)
        # So long before the limit a rank begins to listen. Network file systems show changes up to a minute late.
        self._window = max(self.limit / 5, 5 * self._interval)
        self._process = this_process()
        self._main = threading.main_thread().ident or 0
        self._stuck_dir = self.ranks_dir / f"stuck-{self.job}"
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.limit:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.limit:
            return
        if error and self._stuck_dir.exists():
            # The end of another rank has broken a collective of ours. The thread ends us with the right code.
            self._thread.join()
        self._stop.set()
        self._thread.join(timeout=LAST_BEAT)

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            now = time.monotonic()
            # What is longer than asked for was not ours: this process, or the whole machine, was stopped.
            passed = min(now - before, 2 * self._interval)
            before = now
            beat = self._look(passed)
            try:
                write_beat(self.ranks_dir, beat)
            except OSError as error:
                self._warn(error)
            self._moved = bytes_moved()
            if self._stuck_dir.exists():
                self._end(beat)
            self._listen(passed)
            if self._idle >= self.limit and all(heard.idle >= self.limit for heard in self._living()):
                self._call(beat)
            near = self._idle >= self.limit - self._window
            if self._stop.wait(LAST_BEAT if near else self._interval):
                return

    def _look(self, passed: float) -> Beat:
        """See where the main thread is; `passed` are the seconds since the last look."""
        now = self.clock.now
        if now.ticks != self._ticks:
            self._ticks, self._idle = now.ticks, min(time.monotonic() - now.since, passed)
        elif now.phase in FILE_PHASES and bytes_moved() > self._moved + MOVED:
            self._idle = 0.0
        else:
            self._idle += passed
        self._count += 1
        stack = stack_of(self._main)
        return Beat(
            self.job, self.rank.index, self._process, self._count, now.step, now.phase, now.ticks, self._idle, stack
        )

    def _listen(self, passed: float) -> None:
        """Read what the others say, once the limit is near."""
        if self._idle < self.limit - self._window:
            self._heard.clear()
            return
        for index in range(self.rank.world_size):
            read = read_beat(self.ranks_dir, index, self.job) if index != self.rank.index else None
            if read is None:
                continue
            beat, changed = read
            heard = self._heard.setdefault(index, Heard(beat, changed, beat.idle))
            heard.idle += passed
            heard.silence += passed
            if changed != heard.changed:
                heard.changed, heard.silence = changed, 0.0
            if beat.count != heard.beat.count:
                heard.beat, heard.idle, heard.silence = beat, beat.idle, 0.0

    def _living(self) -> list[Heard]:
        return [heard for heard in self._heard.values() if heard.silence < 3 * self._interval]

    def _silent(self) -> list[Heard]:
        return [heard for heard in self._heard.values() if heard.silence >= 3 * self._interval]

    def _call(self, own: Beat) -> None:
        """Tell the other ranks that the job ends, and people why. Only the first rank to come here does the latter."""
        try:
            self._stuck_dir.mkdir()
        except FileExistsError:
            self._end(own)
        except OSError as error:
            self._warn(error)
        beats = {heard.beat.rank: heard.beat for heard in self._heard.values()} | {own.rank: own}
        silent = {heard.beat.rank: describe(heard.beat.process) for heard in self._silent()}
        verdict = judge(beats, silent, self.rank.world_size)
        text = report(beats, verdict, self._idle, str(self._stuck_dir), self.rank.world_size)
        try:
            (self._stuck_dir / REPORT_NAME).write_text(text + "\n")
        except OSError as error:
            self._warn(error)
        print(text, file=sys.stderr, flush=True)
        self._end(own)

    def _end(self, own: Beat) -> NoReturn:
        try:
            with stacks_path(self._stuck_dir, own.rank).open("w") as file:
                file.write(f"rank {own.rank} (host {self._process.host}, pid {self._process.pid}): {own.where}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            self._warn(error)
        self._await_stacks()
        for child in multiprocessing.active_children():
            child.kill()  # a loader process that is stuck would not notice that we are gone
        neighbours = [heard.beat for heard in self._living() if heard.beat.process.host == self._process.host]
        if all(own.rank < beat.rank for beat in neighbours):
            for heard in self._silent():
                kill_later(heard.beat.process)
        leave_outcome(EXIT_STUCK)
        os._exit(EXIT_STUCK)

    def _await_stacks(self) -> None:
        """Give the ranks that live the time to write theirs: our end breaks the collectives they are in."""
        paths = [stacks_path(self._stuck_dir, heard.beat.rank) for heard in self._living()]
        deadline = time.monotonic() + 2 * self._interval
        while time.monotonic() < deadline and not all(path.exists() for path in paths):
            time.sleep(LAST_BEAT / 10)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            text = f"warning: rank {self.rank.index} cannot write where it is, for the watchdog of the others: {error}"
            print(text, file=sys.stderr, flush=True)


def start_watchdog(ranks_dir: Path, rank: Rank, clock: PhaseClock, limit: float) -> Watchdog:
    """The watchdog of this rank, once collectives are made to wait longer than it does. All ranks call it."""
    job = on_rank_zero(rank, lambda: new_job(ranks_dir))
    ranks_dir.mkdir(parents=True, exist_ok=True)  # where each host has a disk of its own
    if limit and rank.world_size > 1:
        allow_waits(10 * limit)  # a save may take longer than the limit, while other ranks wait for its end
    return Watchdog(ranks_dir, job, rank, clock, limit)


def new_job(ranks_dir: Path) -> str:
    """An id for this start of the run, and no beats of former ones."""
    ranks_dir.mkdir(parents=True, exist_ok=True)
    for old in ranks_dir.glob("rank-*.json"):
        old.unlink(missing_ok=True)
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def stacks_path(stuck_dir: Path, rank: int) -> Path:
    """Where a rank of a stuck job writes the stacks of its threads."""
    return stuck_dir / f"rank-{rank:05d}.stacks.txt"


def describe(process: Process) -> str:
    """What is known of a process whose beats have stopped."""
    state = process.state()
    if state is None:
        return "it is not heard of: stopped, dead, or on a host that is out of reach"
    return STATES.get(state, "its threads do not run")


def kill_later(process: Process) -> None:
    """Kill a process of this host once the launcher has seen how we ended: it reports the first end that it sees.

    A stopped process does not act on the launcher's own SIGTERM.
    """
    if process.state() not in (None, "", "Z"):
        command = ["/bin/sh", "-c", f"sleep {LAUNCHER_GRACE}; kill -KILL {process.pid}"]
        nowhere = subprocess.DEVNULL
        subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


def bytes_moved() -> int:
    """The bytes this process has read and written so far; 0 where the system does not say."""
    try:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    except OSError:
        return 0
    return int(counts["rchar"]) + int(counts["wchar"])
