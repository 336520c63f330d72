"""Ranks that begin where an import ends: forks of one process that has loaded torch, DeepSpeed and the toolkit.

A rank under DeepSpeed's launcher spends most of a short test on imports, and the launcher as much again, twice. Here
each rank is a process of its own with the environment and arguments that the launcher gives it, and comes to its end
as any Python process does; the launcher alone is missing. Tests of what the launcher does use it.

Run as a script, it is that one process: it takes an order a line, answers with the process group of the ranks, and
with their exit codes once all have ended. As with the launcher, the first rank that fails has the others ended.
"""

import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

IMPORTS = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "fcn_dist.commands.evaluate",
    "fcn_dist.commands.train",
    "jsonargparse",
    "torch._dynamo",
    "torch._inductor.compile_fx",
)

Order = dict[str, Any]


class WarmRanks:
    """The process that forks ranks; started with the first of them, ended when this one ends."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.group = 0  # of the ranks that have not been seen to end

    def start(
        self,
        script: Path,
        arguments: Sequence[str],
        world_size: int | None,
        port: str,
        folder: Path,
        log: Path,
        environment: Mapping[str, str],
    ) -> int:
        """Start ranks in `folder`, which write to `log`; returns their process group.

        With no world size, one process as without a launcher.
        """
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-u", __file__],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # so that what has not been read can be waited for
                start_new_session=True,
            )
        order: Order = {
            "script": str(script.resolve()),
            "arguments": list(arguments),
            "world_size": world_size,
            "port": port,
            "folder": str(folder),
            "log": str(log.resolve()),
            "environment": dict(environment),
        }
        self.kill()  # whom a test that failed has left
        assert self.process.stdin
        self.process.stdin.write(f"{json.dumps(order)}\n".encode())
        self.group = self._answer()
        return self.group

    def ended(self, timeout: float) -> int | None:
        """The exit code of the first rank that failed, or 0; None if they have not all ended within `timeout` s."""
        assert self.process and self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready:
            return None
        self.group = 0
        return self._answer()

    def kill(self) -> None:
        """SIGKILL ranks that still run."""
        if self.group:
            with suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)
            self.ended(timeout=60)

    def _answer(self) -> int:
        assert self.process and self.process.stdout
        return int(self.process.stdout.readline())


def main() -> str | None:
    """Fork ranks until the input ends. A rank returns from here with the script that it is to run."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whoever reads the answers wants nothing else that is printed
    load()
    for line in iter(sys.stdin.readline, ""):
        order: Order = json.loads(line)
        ranks: list[int] = []
        for rank in range(order["world_size"] or 1):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, ranks[0] if ranks else 0)
                answers.close()
                become(rank, order)
                return sys.argv[0]
            with suppress(PermissionError):  # it has done so itself and gone on
                os.setpgid(pid, ranks[0] if ranks else pid)
            ranks.append(pid)
        print(ranks[0], file=answers, flush=True)
        print(first_failure(ranks), file=answers, flush=True)
    return None


def load() -> None:
    """Import what a rank imports sooner or later."""
    for name in IMPORTS:
        import_module(name)


def become(rank: int, order: Order) -> None:
    """Have the surroundings of a rank that DeepSpeed's launcher has started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path(order["log"]).open("ab") as log, Path(os.devnull).open("rb") as nothing:
        for stream, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(stream.fileno(), number)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = [order["script"], *order["arguments"]]
    if order["world_size"]:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(order["world_size"]),
            LOCAL_SIZE=str(order["world_size"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=order["port"],
        )
        sys.argv.insert(1, f"--local_rank={rank}")
    sys.path[0] = str(Path(order["script"]).parent)


def first_failure(ranks: list[int]) -> int:
    """Wait for all ranks, ending the others when one fails; returns the code of that one, or 0."""
    left, code = set(ranks), 0
    while left:
        pid, status = os.wait()
        left.remove(pid)
        ended_with = os.waitstatus_to_exitcode(status)
        if ended_with and not code:
            code = ended_with
            for other in left:
                os.kill(other, signal.SIGTERM)
    return code


if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
    if script := main():
        runpy.run_path(script, run_name="__main__")
