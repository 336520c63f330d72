"""The supervisor's end of an agent: one host of a job, this one or one that ssh reaches."""

import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from fcn_dist.launching.agent import Report
from fcn_dist.launching.hostfile import Host

SSH = (
    *("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20"),
    *("-o", "ControlMaster=no", "-o", "ControlPath=none"),  # a shared connection would outlive this one
)


class Node:
    """Starts the agent at once. What it last told is in `report`, None before its first word."""

    def __init__(
        self, host: Host | None, ranks: range, job: Path, timeout: float, grace: float, python_path: str
    ) -> None:
        """The node with `ranks` of the job; `host` None is this one; `timeout` and `grace` in seconds."""
        self.ranks = ranks
        self.where = f"host {host.name}" if host else "this host"
        self.report: Report | None = None
        self.seen: set[int] = set()  # ranks that have been alive
        self.heard = time.monotonic()
        self._pending = b""
        # -P: whatever lies in the folder that ssh or the user starts in is not to be imported.
        agent = [sys.executable, "-P", "-m", "fcn_dist.launching.agent", str(job), str(timeout), str(grace)]
        agent = ["env", f"PYTHONPATH={python_path}", *agent]
        self._process = subprocess.Popen(
            [*SSH, host.name, shlex.join(agent)] if host else agent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            start_new_session=True,  # the terminal's ^C is for the supervisor alone
        )
        assert self._process.stdout and self._process.stdin
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout

    def fileno(self) -> int:
        """For select, while the agent is there."""
        return self._stdout.fileno()

    @property
    def gone(self) -> bool:
        """Whether the agent has closed its output: it has ended, or the connection to it."""
        return self._stdout.closed

    @property
    def ended(self) -> bool:
        """Whether the agent has confirmed that nothing of the job is left on its host."""
        return self.report is not None and self.report.ended

    @property
    def begun(self) -> bool:
        """Whether all ranks of the node handle signals, or have come and gone."""
        if self.report is None:
            return False
        return self.report.listening and {*self.seen, *self.report.outcomes} == set(self.ranks)

    @property
    def missing(self) -> list[int]:
        """Ranks that are not there and left no word: not yet started, or gone."""
        told = {*self.report.ranks, *self.report.outcomes} if self.report else set()
        return sorted(set(self.ranks) - told)

    def read(self) -> None:
        """Take in what the agent has told since."""
        words = os.read(self._stdout.fileno(), 65536)
        if not words:
            self._stdout.close()
            return
        self.heard = time.monotonic()
        *lines, self._pending = (self._pending + words).split(b"\n")
        for line in lines:
            with suppress(ValueError):  # greetings of a login shell
                self.report = Report.decode(line)
                self.seen.update(self.report.ranks)

    def tell(self, order: str) -> None:
        """Send an order; if the agent is gone, `gone` or silence will say so."""
        with suppress(OSError):
            self._stdin.write(order.encode() + b"\n")
            self._stdin.flush()

    def close(self) -> None:
        """Let go of the agent. One that is still at work goes on by itself; the connection to it is cut."""
        with suppress(OSError):
            self._stdin.close()
        if not self.ended and self._process.args[0] == SSH[0]:  # type: ignore[index]
            self._process.kill()
        self._process.wait()
        self._stdout.close()
