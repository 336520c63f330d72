"""How a command that is one of several ranks comes to its end."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from fcn_dist.errors import EarlyEnd, LostPeer, UserError
from fcn_dist.lastly import end_after_handlers, end_before_handlers


@contextmanager
def among_ranks() -> Iterator[None]:
    """All that a process does together with other ranks; the last thing it does.

    Where all ranks come to their end together, their groups are ended first, and everything else that is to happen at
    the end happens. A rank that fails alone could wait there for threads that wait for other ranks: it says what it has
    to say, and goes. The interpreter is not taken down either way: see lastly.py.
    """
    try:
        yield
    except EarlyEnd as end:
        _end_with_others(end.code)
        raise
    except BaseException as error:
        _end_alone(error)
        raise
    _end_with_others(0)


def _end_with_others(code: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        end_after_handlers(code)


def _end_alone(error: BaseException) -> None:
    if not dist.is_initialized():
        return
    code = error.code if isinstance(error, (UserError, LostPeer, SystemExit)) else 1
    end_before_handlers(code if isinstance(code, int) else 1)  # Python's own after a traceback or a text
