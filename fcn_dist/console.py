"""Rank-0 output: what a person sees of a command, and how a command ends."""

import errno
import platform
import sys
import time
from collections.abc import Callable

from rich.console import Console

from fcn_dist.errors import EXIT_USER_ERROR, EarlyEnd, LostPeer, UserError
from fcn_dist.lasting import lasting_output
from fcn_dist.ranks import Rank

# A launcher ends the other ranks within about a second of the first failure, so a rank that is still alive after
# this many seconds is the only one that met its error, and must tell it itself.
SILENT_RANK_GRACE = 5.0

# What the place of a file can have against it, by the system's number, and what to do about that.
REMEDIES = {
    errno.ENOSPC: "make room there, or choose a place on another disk",
    errno.EDQUOT: "make room there, or choose a place on another disk",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or choose a place whose disk takes larger files",
    errno.EROFS: "choose a place that is not mounted for reading alone",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EISDIR: "a folder stands where a file is needed; choose another place",
    errno.EEXIST: "a file stands where a folder is needed; choose another place",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}

console = Console(highlight=False, soft_wrap=True, markup=False)  # standard output: results
status_console = Console(stderr=True, highlight=False, markup=False)  # standard error: progress


def run_command(command: Callable[[], None]) -> int:
    """Run `command` and return its exit code: 0, or with one message on standard error 2 for a UserError and for files
    whose place is full or forbidden, and its own code for an EarlyEnd, which all ranks raise together.

    Anything else is a bug and keeps its traceback.
    """
    try:
        command()
    except UserError as error:
        _tell(str(error))
        return error.code
    except EarlyEnd as end:
        if Rank.from_environment().index == 0:
            _say(str(end))
        return end.code
    except LostPeer as loss:
        rank = Rank.from_environment()
        _say(f"error (rank {rank.index} on {platform.node()}): {loss}")
        time.sleep(SILENT_RANK_GRACE)  # the lost rank's code is to be the launcher's
        return loss.code
    except BrokenPipeError:
        # The reader of our output, such as `head`, has what it wanted.
        sys.stderr.close()
    except OSError as error:
        if error.errno not in REMEDIES or not error.filename:
            raise  # it is of no file, as far as is known
        _tell(f"{error.filename}: {error.strerror}; {REMEDIES[error.errno]}")
        return EXIT_USER_ERROR
    return 0


def _tell(message: str) -> None:
    rank = Rank.from_environment()
    if rank.index:
        time.sleep(SILENT_RANK_GRACE)
    where = f" (rank {rank.index})" if rank.index else ""
    _say(f"error{where}: {message}")


def _say(message: str) -> None:
    """On standard error if it takes it; the exit code says the same."""
    with lasting_output():
        print(message, file=sys.stderr, flush=True)
