"""Loader processes are forked from a process that has threads; this keeps them from waiting for those threads.

A forked process has its parent's memory, but of its threads only the one that forked. Two things were seen to hang it:

- Objects that were garbage in the parent are collected in the child, and one of them joins threads: a process group.
- A thread of torch's is just entering Python, with CPython's lock on the list of threads taken; before Python 3.12 the
  forked process takes it without making it anew, and never comes out of `os.fork`.
"""

import gc
import os
import select
import signal
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess

from fcn_dist.data.loadersignals import holding_back_stops

BEGINS_WITHIN = 5.0  # seconds; a process does within milliseconds, and one that could not yet is forked again as well
ATTEMPTS = 5  # each waits twice as long as the one before


class Forked(ForkProcess):
    """A process that is forked again if it does not begin, and to which the garbage of its parent is no garbage.

    It begins with what asks it to stop held back. `start` raises RuntimeError if no attempt succeeds.
    """

    _says_begun = -1

    def run(self) -> None:
        """Say that this process has begun, and do what it is for."""
        os.write(self._says_begun, b"begun")
        os.close(self._says_begun)
        super().run()

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:
        assert isinstance(process_obj, Forked)
        for attempt in range(ATTEMPTS):
            begun, process_obj._says_begun = os.pipe()
            gc.freeze()
            try:
                with holding_back_stops():
                    popen = Popen(process_obj)
            finally:
                gc.unfreeze()
                os.close(process_obj._says_begun)
            try:
                # Readable, too, if it has died: `exitcode` will say so.
                if select.select([begun], [], [], BEGINS_WITHIN * 2**attempt)[0]:
                    return popen
            finally:
                os.close(begun)
            os.kill(popen.pid, signal.SIGKILL)
            popen.wait()
            popen.close()
        raise RuntimeError(f"{ATTEMPTS} times a loader process was forked and did not begin")


class ThreadedForkContext(ForkContext):
    """How a DataLoader is to start its processes: by fork, so that they inherit closures, mapped memory and locks."""

    Process = Forked
