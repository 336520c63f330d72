"""The processes of one job on this host, found by what their environment says.

A process keeps the environment it was started with when its parent is killed, and no other job has the same: unlike a
walk down the tree, this finds orphans, and unlike a command line, it never finds what belongs to someone else.
"""

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fcn_dist.outcome import JOB_VARIABLE

# A rank's own process number. Loader processes are forked from ranks and have the environment of their parent.
RANK_PID_VARIABLE = "FCN_DIST_RANK_PID"
POLL = 0.1  # seconds


@dataclass
class JobProcesses:
    """Process numbers at one moment."""

    ranks: dict[int, int] = field(default_factory=dict)  # by rank
    all: list[int] = field(default_factory=list)  # launchers, ranks, loader processes and what else they started


def find_processes(job: str) -> JobProcesses:
    """All living processes of the job but this one."""
    found = JobProcesses()
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with suppress(OSError):
            environment = _environment(folder)
            if environment.get(JOB_VARIABLE) == job and pid != os.getpid():
                found.all.append(pid)
                if environment.get(RANK_PID_VARIABLE) == folder.name:
                    found.ranks[int(environment["RANK"])] = pid
    return found


def _environment(folder: Path) -> dict[str, str]:
    """Empty for a zombie and for the kernel's own; OSError for another user's."""
    entries = (folder / "environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return {name: value for name, _, value in (entry.partition("=") for entry in entries)}


def handles(pid: int, signum: int) -> bool:
    """Whether the process has a handler of its own for a signal."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signum - 1) & 1)
    return False


def send(pids: list[int], signum: int) -> None:
    """Signal processes, some of which may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def end_processes(job: str, grace: float) -> None:
    """Let the ranks save and leave within `grace` seconds, then kill what is left of the job on this host.

    Launchers are not asked: DeepSpeed's answers a signal by ending its ranks one after another.
    """
    send(list(find_processes(job).ranks.values()), signal.SIGTERM)
    deadline = time.monotonic() + grace
    while find_processes(job).ranks and time.monotonic() < deadline:
        time.sleep(POLL)
    while left := find_processes(job).all:  # again, as one that is killed may just have started another
        send(left, signal.SIGKILL)
        time.sleep(POLL)
