"""How a command that is one of several ranks comes to its end."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from fcn_dist.errors import EarlyEnd, LostPeer, UserError
from fcn_dist.lasting import lasting_output
from fcn_dist.outcome import left_outcome


@contextmanager
def among_ranks() -> Iterator[None]:
    """All that a process does together with other ranks; the last thing it does.

    Torch's groups have threads that may want the interpreter's lock, and that live on after a group's end while
    anything still refers to it, as DeepSpeed does. One that asks for the lock while the interpreter is taken down
    aborts the process, whose exit code is then not what the command means: a job that has saved its state would not be
    continued. So the interpreter is never taken down. Where all ranks come to their end together, their groups are
    ended first, and everything else that is to happen at the end happens. A rank that fails alone could wait there for
    threads that wait for other ranks: it says what it has to say, and goes.
    """
    try:
        yield
    except EarlyEnd as end:
        _end_with_others(end.code)
        raise
    except (UserError, LostPeer) as error:
        _end_alone(error.code)
        raise
    except Exception:
        _end_alone(1)  # Python's own after a traceback
        raise
    _end_with_others(0)


def _end_with_others(code: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        atexit.register(_end_after_handlers, code)


def _end_alone(code: int) -> None:
    if dist.is_initialized():
        atexit.register(_end_at_once, code)


def _end_after_handlers(code: int) -> None:
    atexit.unregister(_end_after_handlers)
    atexit._run_exitfuncs()  # the other ones, in their order
    _end_at_once(code)


def _end_at_once(code: int) -> None:
    """End the process with the code that it has said, or else with `code`."""
    with lasting_output():
        pass  # what is left to say is said at the block's end
    os._exit(left_outcome(code))
