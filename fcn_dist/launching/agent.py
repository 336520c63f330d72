"""`python -m fcn_dist.launching.agent FOLDER TIMEOUT GRACE`: the supervisor's hand on one host.

Orders come in on standard input, one a line: `beat`, `stop SIGNAL`, `end`. A report goes out on standard output every
second. When orders stop coming, for whatever reason, the job on this host is ended: no rank outlives its supervisor.
"""

import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fcn_dist.launching.processes import end_processes, find_processes, handles, send
from fcn_dist.outcome import read_outcomes

BEAT = 1.0  # seconds from one report, or beat, to the next


@dataclass(frozen=True)
class Report:
    """What an agent tells."""

    ranks: tuple[int, ...]  # that live
    listening: bool  # whether all of them have a handler for SIGTERM: those that have begun to train do
    outcomes: dict[int, int]  # exit codes that ranks have left
    port: int  # that was free when the agent began
    ended: bool = False  # nothing is left of the job, and nothing more will be told

    def encode(self) -> bytes:
        """One line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> "Report":
        """The reverse of `encode`; raises ValueError for anything else that a host may print."""
        try:
            values = json.loads(line)
            outcomes = {int(rank): code for rank, code in values.pop("outcomes").items()}
            return cls(ranks=tuple(values.pop("ranks")), outcomes=outcomes, **values)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{line!r} is no report") from error


@dataclass
class Agent:
    """Serves one job on this host."""

    job: Path
    timeout: float  # seconds without a word after which the supervisor counts as gone
    grace: float  # seconds that ranks have to save in when the job is ended
    port: int

    def serve(self) -> None:
        """Report, and carry out orders, until told to end or left alone."""
        pending, heard, reported = b"", time.monotonic(), 0.0
        while time.monotonic() - heard < self.timeout:
            if time.monotonic() - reported >= BEAT:
                reported = time.monotonic()
                sys.stdout.buffer.write(self.report().encode())
                sys.stdout.flush()
            if not select.select([0], [], [], BEAT)[0]:
                continue
            words = os.read(0, 4096)
            if not words:
                return
            heard = time.monotonic()
            *lines, pending = (pending + words).split(b"\n")
            for line in lines:
                if line == b"end":
                    return
                if line.startswith(b"stop "):
                    send(list(find_processes(str(self.job)).ranks.values()), int(line.split()[1]))

    def report(self, ended: bool = False) -> Report:
        """The state of the job on this host."""
        ranks = find_processes(str(self.job)).ranks
        listening = all(handles(pid, signal.SIGTERM) for pid in ranks.values())
        return Report(tuple(sorted(ranks)), listening, read_outcomes(self.job), self.port, ended)


def main() -> None:
    """Serve, then leave nothing of the job on this host."""
    job, timeout, grace = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)  # meant for the job; the supervisor decides
    job.mkdir(mode=0o700)
    with socket.socket() as probe:
        probe.bind(("", 0))
        agent = Agent(job, timeout, grace, probe.getsockname()[1])
    try:
        agent.serve()
        end_processes(str(job), grace)
        sys.stdout.buffer.write(agent.report(ended=True).encode())
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stderr.close()
    finally:
        end_processes(str(job), grace)
        shutil.rmtree(job, ignore_errors=True)


if __name__ == "__main__":
    main()
