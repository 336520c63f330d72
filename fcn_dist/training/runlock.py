"""One job a run folder: a lock that dies with the process that holds it, and a look at whether all ranks see it."""

import fcntl
import json
import os
import platform
import secrets
import time
from pathlib import Path

from fcn_dist.errors import UserError
from fcn_dist.training.runfolder import LOCK_NAME

VISIBLE_WITHIN = 20.0  # seconds; a network file system may show a new file late
LOOKS_EVERY = 0.2


class RunLock:
    """Held by rank 0 for as long as its process lives, or until it is released."""

    # A POSIX lock, not flock: it is not handed down to loader processes, which may outlive the rank by seconds, and
    # network file systems have it. It is lost when this process closes any descriptor of the file, so no one else here
    # opens it.

    def __init__(self, run_dir: Path, command: str) -> None:
        """Take the lock of a run folder, which is made if need be. Raises UserError if another process has it."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / LOCK_NAME
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 4096).decode(errors="replace")
            os.close(self._descriptor)
            raise UserError(
                f"{run_dir} is in use by {_described(holder)}; one job at a time can train a run; wait for its end, "
                "stop it, or give another --output"
            ) from None
        except OSError as error:
            os.close(self._descriptor)
            raise UserError(
                f"{path} cannot be locked ({error.strerror}); a file system with locks is needed"
            ) from error
        self.token = secrets.token_hex(8)  # of this job, unlike that of any other
        us = {"token": self.token, "host": platform.node(), "pid": os.getpid(), "command": command}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(us).encode(), 0)
        os.fsync(self._descriptor)

    def release(self) -> None:
        """Let another job have the run folder."""
        os.close(self._descriptor)


def sees(run_dir: Path, token: str) -> bool:
    """Whether this process finds in the run folder what rank 0 has written there; for other ranks than 0."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while True:
        try:
            if json.loads((run_dir / LOCK_NAME).read_text())["token"] == token:
                return True
        except (OSError, ValueError, KeyError):
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOKS_EVERY)


def _described(holder: str) -> str:
    try:
        values = json.loads(holder)
        return f"process {values['pid']} on {values['host']} ({values['command']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
