"""What a supervisor and the ranks it started share: a folder per host in which every rank leaves its exit code.

Launchers lose exit codes: DeepSpeed's reports a killed child as 0, and the first rank it finds gone speaks for all.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fcn_dist.errors import EXIT_DIVERGED, EXIT_REQUEUE, EXIT_STUCK, EXIT_USER_ERROR
from fcn_dist.files import write_text

# The job's folder, made by the supervisor's agent on each host. Its name is unique, so it marks a job's processes, too.
JOB_VARIABLE = "FCN_DIST_JOB"


_left: int | None = None


def leave_outcome(code: int) -> None:
    """Tell the supervisor, if one started this rank, the code it is about to exit with; the last thing a rank does."""
    global _left  # a process has one end
    _left = code
    folder = os.environ.get(JOB_VARIABLE)
    if folder:
        # Without a folder there is no one left to tell; the exit code itself still says it.
        with suppress(OSError):
            write_text(Path(folder) / os.environ["RANK"], str(code), flush=False)


def left_outcome(otherwise: int) -> int:
    """The code that this process has said that it exits with; `otherwise` if it has said nothing."""
    return otherwise if _left is None else _left


def read_outcomes(folder: Path) -> dict[int, int]:
    """Exit codes by rank, of those ranks that left one in `folder`."""
    return {int(path.name): int(path.read_text()) for path in folder.iterdir() if path.name.isdigit()}


def combine(outcomes: Mapping[int, int], launcher_code: int) -> int:
    """The exit code of a job.

    0 only if rank 0 says so, which leaves last. Then what any rank says of its own end: ranks that lost it in the
    middle of a collective fail with errors that tell less. Then the launcher's code, but never 0.
    """
    if outcomes.get(0) == 0:
        return 0
    for code in (EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_STUCK, EXIT_REQUEUE):
        if code in outcomes.values():
            return code
    return launcher_code if launcher_code > 0 else 1
