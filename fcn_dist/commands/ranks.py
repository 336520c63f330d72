"""How a command that is one of several ranks comes to its end."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from fcn_dist.errors import EarlyEnd, LostPeer, UserError
from fcn_dist.lasting import lasting_output


@contextmanager
def among_ranks() -> Iterator[None]:
    """All that a process does together with other ranks; the last thing it does.

    Torch's groups have threads that may want the interpreter's lock. One that asks for it while the interpreter ends
    aborts the process, whose exit code is then not what the command means. So they are ended first where all ranks
    come to their end together. A rank that fails alone would wait for threads that may wait for other ranks: it goes
    without the interpreter's end.
    """
    try:
        yield
    except EarlyEnd:
        _end_groups()
        raise
    except (UserError, LostPeer) as error:
        _skip_interpreter_end(error.code)
        raise
    except Exception:
        _skip_interpreter_end(1)  # Python's own after a traceback
        raise
    _end_groups()


def _end_groups() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _skip_interpreter_end(code: int) -> None:
    """Let the process end with `code` before the interpreter is taken down, after all that it still has to say."""
    if dist.is_initialized():
        atexit.register(_end_at_once, code)


def _end_at_once(code: int) -> None:
    with lasting_output():
        pass  # what is left to say is said at the block's end
    os._exit(code)
