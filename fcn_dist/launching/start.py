"""`python -m fcn_dist.launching.start ORDER`: what a launcher starts as a rank; becomes the rank itself.

DeepSpeed's pdsh launcher writes arguments, exports and the working folder into a shell's command line and quotes some
of them. An order is all of that in characters that no shell acts on.
"""

import base64
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from fcn_dist.errors import EXIT_USER_ERROR
from fcn_dist.launching.processes import RANK_PID_VARIABLE
from fcn_dist.outcome import leave_outcome


@dataclass(frozen=True)
class Order:
    """What every rank of a job is to run."""

    arguments: list[str]  # of Python, such as -m fcn_dist train ...
    folder: str  # to work in
    environment: dict[str, str]  # on top of what the launcher sets
    log_dir: str | None = None  # for a file per rank in place of the launcher's output

    def encode(self) -> str:
        """The order in the letters, digits, '-', '_' and '=' of base64."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @classmethod
    def decode(cls, text: str) -> "Order":
        """The reverse of `encode`."""
        return cls(**json.loads(base64.urlsafe_b64decode(text)))


def main() -> None:
    """Carry out the order of the command line in this very process, so that signals and exit code are the rank's."""
    order = Order.decode(sys.argv[1])
    try:
        os.chdir(order.folder)
        if order.log_dir is not None:
            redirect(Path(order.log_dir))
    except OSError as error:
        print(
            f"error: {error.filename} cannot be used on {socket.gethostname()} ({error.strerror}); the same folders "
            "are needed on all hosts; use a shared disk",
            file=sys.stderr,
        )
        leave_outcome(EXIT_USER_ERROR)
        sys.exit(EXIT_USER_ERROR)
    environment = {**os.environ, **order.environment, RANK_PID_VARIABLE: str(os.getpid())}
    os.execve(sys.executable, [sys.executable, "-u", *order.arguments], environment)


def redirect(log_dir: Path) -> None:
    """Append what this rank prints to a file of its own."""
    log_dir.mkdir(parents=True, exist_ok=True)
    log = os.open(log_dir / f"rank-{os.environ['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)


if __name__ == "__main__":
    main()
