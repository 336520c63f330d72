"""Being asked to stop: signals and a vanished launcher in, one flag out that the ranks agree on between two steps.

A handler may do no more than set the flag. A collective in it could meet another that this rank has begun, and a
launcher may signal one rank long before the next; so the flag of any rank goes into the agreement that begins each
step, and all of them stop at the same one.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fcn_dist.data.loadersignals import STOP_SIGNALS
from fcn_dist.errors import EXIT_REQUEUE
from fcn_dist.outcome import leave_outcome

LOOKS_EVERY = 1.0  # seconds between two looks at the launcher
# Seconds from the launcher's end until a rank ends itself although it could not save: where others are gone already,
# it may wait for them in a collective. Nothing is to be left of a job 30 s after its launcher.
ORPHAN_GRACE = 25.0
DEEPSPEED_LAUNCHER = b"deepspeed.launcher.launch"


@dataclass
class StopRequest:
    """Whether this rank has been asked to stop, and why."""

    reason: str = ""  # empty: it has not
    saving: bool = False  # while it is true, the grace of an orphan does not run out

    def ask(self, reason: str) -> None:
        """Stop after this step. The first reason counts; asking again changes nothing."""
        self.reason = self.reason or reason


@contextmanager
def heeding_signals() -> Iterator[StopRequest]:
    """Within the block, signals and the launcher's end ask for a stop in place of ending the process.

    Call it before a loader forks its workers, and in the main thread; elsewhere signals do what they did.
    """
    request = StopRequest()

    def handler(number: int, _: FrameType | None) -> None:
        request.ask(signal.Signals(number).name)

    before = {}
    if threading.current_thread() is threading.main_thread():
        # nohup has SIGHUP ignored, and means it.
        heeded = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handler) for number in heeded}
    over = threading.Event()
    if "RANK" in os.environ:
        threading.Thread(target=_watch_launcher, args=(request, _ancestors(), over), daemon=True).start()
    try:
        yield request
    finally:
        over.set()
        for number, action in before.items():
            signal.signal(number, action)


def _watch_launcher(request: StopRequest, ancestors: list[int], over: threading.Event) -> None:
    """Ask for a stop when a process that started this one has vanished, and see to it that this one ends."""
    while not over.wait(LOOKS_EVERY):
        if _ancestors()[: len(ancestors)] != ancestors:
            break
    else:
        return
    request.ask("the launcher has vanished")
    while not over.wait(ORPHAN_GRACE):
        if not request.saving:
            print("error: the launcher has vanished, and the other ranks do not answer", file=sys.stderr, flush=True)
            leave_outcome(EXIT_REQUEUE)
            os._exit(EXIT_REQUEUE)


def _ancestors() -> list[int]:
    """The processes that this one must not outlive: its launcher, and the command above DeepSpeed's launcher."""
    parent = os.getppid()
    try:
        if DEEPSPEED_LAUNCHER not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return [parent]
        state_and_parent = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # gone between two looks, or no /proc
        return [parent]
    return [parent, int(state_and_parent[1])]
