"""Start DeepSpeed's runner for a job, watch over its ranks, and return the exit code that the job has earned."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from fcn_dist.errors import EXIT_REQUEUE, EXIT_STUCK, EXIT_USER_ERROR, UserError, named
from fcn_dist.lasting import lasting_output
from fcn_dist.launching.agent import BEAT
from fcn_dist.launching.exports import of_families, read_export_files
from fcn_dist.launching.hostfile import Host
from fcn_dist.launching.node import Node
from fcn_dist.launching.processes import end_processes
from fcn_dist.launching.runner import (
    hosts_command,
    hosts_environment,
    local_command,
    local_environment,
    python_path,
    runner_mark,
)
from fcn_dist.launching.signals import Signals
from fcn_dist.launching.start import Order
from fcn_dist.outcome import combine, read_outcomes

HELLO_TIMEOUT = 60.0  # seconds for ssh and Python to start on a host
RELAY_TIMEOUT = 5.0  # seconds for the runner to pass on the last of what ended ranks have printed
START_TIMEOUT = 120.0  # seconds for the ranks of all hosts to be there, from the first one on
STALE = 10.0  # seconds that a stop waits for the latest news of every host
END_SLACK = 10.0  # seconds over the grace for an agent to say that nothing is left


@dataclass(frozen=True)
class Launch:
    """What to start, and where."""

    arguments: list[str]  # of Python on each rank
    ranks: int  # on this host, where `hosts` is None
    hosts: list[Host] | None = None
    visible_devices: str = ""  # CUDA_VISIBLE_DEVICES, where there are CUDA devices
    master_addr: str | None = None  # of the first host as the others reach it; None: its first address
    master_port: int | None = None  # None: a free one
    log_dir: Path | None = None  # for a file per rank
    grace: float = 20.0  # seconds to save in, for ranks that have lost their launcher or each other
    host_timeout: float = 60.0  # seconds without a word from a host after which it counts as lost


def supervise(launch: Launch) -> int:
    """Run a job to its end. Whatever happens, none of its processes is left on a host that can be reached.

    Raises UserError before anything is started if a host does not answer or arguments cannot be taken there.
    """
    private = tempfile.TemporaryDirectory(prefix="fcn-dist-") if launch.hosts else nullcontext("")
    with lasting_output(), Signals() as signals, private as folder:
        return Supervisor(launch, signals, Path(folder)).run()


class Supervisor:
    """One job; `run` is its story."""

    def __init__(self, launch: Launch, signals: Signals, folder: Path) -> None:
        """`folder` is private and takes what the runner of several hosts reads."""
        self.launch, self.signals, self.folder = launch, signals, folder
        self.job = Path("/tmp") / f"fcn-dist-{secrets.token_hex(8)}"  # on every host alike
        self.nodes: list[Node] = []
        self.runner: subprocess.Popen[bytes] | None = None
        self.outcomes: dict[int, int] = {}  # exit codes by rank
        self.beaten = 0.0
        self.stopped_early = False

    def run(self) -> int:
        """Agents first, then ranks; the end of both, and what came of it."""
        try:
            order = self.order()
            self.start_agents()
            if not self.signals.received:
                self.start_runner(order)
                self.watch()
            self.stopped_early = self.runner is None or self.stopped_early
        finally:
            self.end()
        return self.verdict()

    def order(self) -> str:
        """What each rank is to run; here, it has this process's environment already."""
        launch, variables = self.launch, {}
        if launch.hosts:
            exported = read_export_files([Path.home(), Path.cwd()])
            if exported:
                say(f"taken to all hosts from .deepspeed_env: {', '.join(exported)}")
            variables = {**of_families(os.environ), **exported, "PYTHONPATH": python_path()}
        log_dir = str(launch.log_dir.absolute()) if launch.log_dir else None
        return Order(launch.arguments, str(Path.cwd()), variables, log_dir).encode()

    def start_agents(self) -> None:
        """Reach every host, and know that it has this package."""
        launch, first = self.launch, 0
        hosts: list[Host | None] = [*launch.hosts] if launch.hosts else [None]
        for host in hosts:
            ranks = range(first, first + (host.slots if host else launch.ranks))
            self.nodes.append(Node(host, ranks, self.job, launch.host_timeout, launch.grace, python_path()))
            first = ranks.stop
        deadline = time.monotonic() + HELLO_TIMEOUT
        while any(node.report is None for node in self.nodes) and not self.signals.received:
            silent = [node.where for node in self.nodes if node.report is None and node.gone]
            if not silent and time.monotonic() > deadline:
                silent = [node.where for node in self.nodes if node.report is None]
            if silent:
                raise UserError(
                    f"no answer from {named(silent)}; ssh without a password, and this Python with this package at "
                    f"{sys.executable}, are needed there; try `ssh HOST {sys.executable} -m fcn_dist --version`"
                )
            self.listen()

    def start_runner(self, order: str) -> None:
        """DeepSpeed's own launcher, out of reach of the terminal's signals."""
        launch, first = self.launch, self.nodes[0].report
        assert first
        port = launch.master_port or first.port
        if launch.hosts:
            command = hosts_command(launch.hosts, self.folder, launch.master_addr, port, order)
            environment = hosts_environment(self.job, self.folder)
        else:
            command = local_command(launch.ranks, launch.visible_devices, port, order)
            environment = local_environment(self.job)
        self.runner = subprocess.Popen(
            command, cwd="/", env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def watch(self) -> None:
        """Until the runner is done, or the job can only be ended."""
        assert self.runner
        asked, stopped, whole = None, False, time.monotonic()
        while self.runner.poll() is None:
            self.listen()
            if self.signals.received and not stopped:
                asked = asked or time.monotonic()
                # What an agent told before may have been a moment older than a rank's handler.
                told = all(node.heard > asked + BEAT for node in self.nodes)
                if told or time.monotonic() > asked + STALE:
                    if not all(node.begun for node in self.nodes):
                        self.stopped_early = True
                        return
                    self.stop(self.signals.received[0])
                    stopped = True
            if self.silent():
                return
            if not any(node.missing for node in self.nodes) or not any(node.seen for node in self.nodes):
                whole = time.monotonic()
            # Launchers end the other ranks one after another, with half a minute for each, and not on other hosts.
            limit = self.launch.grace if all(node.seen for node in self.nodes) else START_TIMEOUT
            if time.monotonic() - whole > limit:
                return

    def listen(self) -> None:
        """Wait for a moment or for news, and let the agents know that someone is here."""
        if time.monotonic() - self.beaten >= BEAT:
            self.beaten = time.monotonic()
            for node in self.nodes:
                node.tell("beat")
        there = [node for node in self.nodes if not node.gone]
        readable = self.signals.wait([node.fileno() for node in there], BEAT)
        for node in there:
            if node.fileno() in readable:
                node.read()

    def stop(self, signum: int) -> None:
        """Pass a signal on to all ranks, once: each sets a flag, and they save together. More change nothing."""
        signum = signal.SIGTERM if signum == signal.SIGHUP else signum
        if self.launch.hosts or not sys.stderr.isatty():  # here, rank 0 has a panel on that screen, and says so in it
            say(f"{signal.Signals(signum).name}: the ranks save and stop")
        for node in self.nodes:
            node.tell(f"stop {signum}")

    def silent(self) -> list[Node]:
        """Nodes whose agent is gone or has told nothing for too long."""
        late = time.monotonic() - self.launch.host_timeout
        return [node for node in self.nodes if not node.ended and (node.gone or node.heard < late)]

    def end(self) -> None:
        """Leave nothing of the job on any host that answers, and then nothing of the runner."""
        for node in self.nodes:
            node.tell("end")
        deadline = time.monotonic() + self.launch.grace + END_SLACK
        while time.monotonic() < deadline and not all(node.ended or node.gone for node in self.nodes):
            self.listen()
        for node in self.nodes:
            node.close()
            self.outcomes |= node.report.outcomes if node.report else {}
        if self.runner:
            with suppress(subprocess.TimeoutExpired):
                self.runner.wait(RELAY_TIMEOUT)
            end_processes(runner_mark(self.job), 0)
        # Where this host's agent was killed itself, it has left its work to do.
        end_processes(str(self.job), self.launch.grace)
        if self.job.is_dir():
            self.outcomes |= read_outcomes(self.job)
            shutil.rmtree(self.job, ignore_errors=True)
        if self.runner:
            self.runner.wait()

    def verdict(self) -> int:
        """The exit code, and a line on standard error for what the ranks cannot have told themselves."""
        code = combine(self.outcomes, self.runner.returncode if self.runner else 0)
        if code in (0, EXIT_USER_ERROR):
            return code
        lost = [node for node in self.nodes if not node.ended]
        for node in lost:
            ranks = ", ".join(map(str, node.ranks))
            say(f"{node.where} (ranks {ranks}) does not answer; go on without it, or once it is back, with --resume")
        for node in self.nodes:
            if node.missing and node not in lost and not self.stopped_early:
                say(f"rank {', '.join(map(str, node.missing))} on {node.where} ended without a word of its own")
        if code in self.outcomes.values():
            return code
        if self.stopped_early:
            say("stopped before all ranks had begun: nothing was trained")
            return EXIT_REQUEUE
        return EXIT_STUCK if lost else code


def say(message: str) -> None:
    """A line on standard error that is told from the ranks' own."""
    print(f"fcn-dist: {message}", file=sys.stderr, flush=True)
