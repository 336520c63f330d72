"""Beats: the small file in which each rank says, every few seconds, where it is. RUN/ranks/rank-00003.json

Files, so that a rank can be read while it is stopped, over hosts and without a port; and so that users can read them.
"""

import json
import os
import platform
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fcn_dist.files import write_text
from fcn_dist.training.phases import Phase

RANKS_DIR = "ranks"  # in the run folder


@dataclass(frozen=True)
class Process:
    """A process, such that another of the same number is not taken for it."""

    host: str
    pid: int
    started: int  # clock ticks after the host's start; 0 where there is no /proc

    def state(self) -> str | None:
        """The kernel's letter for it, such as T for stopped; empty if it is gone, None from another host."""
        if self.host != platform.node() or not self.started:
            return None
        letter, started = _stat(self.pid)
        return letter if started == self.started else ""


def this_process() -> Process:
    """Who runs this."""
    return Process(platform.node(), os.getpid(), _stat(os.getpid())[1])


def _stat(pid: int) -> tuple[str, int]:
    """State and start time from proc_pid_stat(5); empty and 0 if there is no such process."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return values[0], int(values[19])


@dataclass(frozen=True)
class Beat:
    """What a rank said last."""

    job: str  # one start of the run
    rank: int
    process: Process
    count: int  # of this beat; a rank whose count stands still is stopped or dead
    step: int
    phase: Phase
    ticks: int  # how often there has been progress
    idle: float  # seconds since the last progress
    stack: tuple[str, ...]  # of the main thread, the innermost call last

    @property
    def where(self) -> str:
        """In words."""
        return f"in step {self.step}, {self.phase.value}"

    @property
    def waits(self) -> bool:
        """Whether the main thread is inside a collective."""
        return any(place in call for call in self.stack for place in ("torch/distributed/", "deepspeed/comm/"))


def beat_path(ranks_dir: Path, rank: int) -> Path:
    """Where a rank's beats are written."""
    return ranks_dir / f"rank-{rank:05d}.json"


def write_beat(ranks_dir: Path, beat: Beat) -> None:
    """Replace the rank's last one. If there is no room for it, at least its time of change says that the rank lives.

    Raises OSError if it cannot be written.
    """
    path = beat_path(ranks_dir, beat.rank)
    try:
        write_text(path, json.dumps({**asdict(beat), "phase": beat.phase.value}, indent=1) + "\n", flush=False)
    except OSError:
        with suppress(OSError):
            os.utime(path)
        raise


def read_beat(ranks_dir: Path, rank: int, job: str) -> tuple[Beat, int] | None:
    """The last beat of a rank of this job and its file's time of change in ns, which is no clock to compare with.

    None if there is none that can be read.
    """
    path = beat_path(ranks_dir, rank)
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        changed = path.stat().st_mtime_ns
        values |= {
            "process": Process(**values["process"]),
            "phase": Phase(values["phase"]),
            "stack": tuple(values["stack"]),
        }
        beat = Beat(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (beat, changed) if beat.job == job else None


def stack_of(thread: int) -> tuple[str, ...]:
    """The Python calls a thread is in, the innermost last; empty for one that has ended."""
    frame: FrameType | None = sys._current_frames().get(thread)
    calls: list[str] = []
    while frame:
        calls.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}")
        frame = frame.f_back
    return tuple(reversed(calls))
