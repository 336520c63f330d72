"""Real ranks under the real launcher, with a hard time limit."""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest


def run_ranks(
    script: Path, arguments: Sequence[str], world_size: int, folder: Path, timeout: float, code: int = 0
) -> str:
    """Run `script` on `world_size` ranks from `folder`, and return all they print.

    Fails the test unless the launcher exits with `code`.
    """
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world_size)]
    return _run([*launcher, "--master_port", free_port(), str(script), *arguments], script, folder, timeout, code)


def free_port() -> str:
    """A port of this machine for a launcher's --master_port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_alone(script: Path, arguments: Sequence[str], folder: Path, timeout: float, code: int = 0) -> str:
    """Run `script` as one process without a launcher; the rest as `run_ranks`."""
    return _run([sys.executable, str(script), *arguments], script, folder, timeout, code)


def _run(command: Sequence[str], script: Path, folder: Path, timeout: float, wanted: int) -> str:
    """The launcher leaves its ranks behind when it is killed, so the whole process group is ended with it."""
    log = folder / f"{script.stem}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                _abort_with_stacks(process.pid)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text()
    if code != wanted:
        reason = f"no end within {timeout} s" if code is None else f"exit code {code}, not {wanted}"
        pytest.fail(f"{' '.join(command)}: {reason}\n{text[-30000:]}")
    return text


def _abort_with_stacks(group: int) -> None:
    """Have each process of a group print the Python stacks of its threads, as faulthandler does at SIGABRT, and end."""
    for pid in sorted(group_members(group)):
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            os.kill(pid, signal.SIGABRT)
            select.select([descriptor], [], [], 5)
            os.close(descriptor)


def group_members(group: int) -> list[int]:
    """The processes of a group that are not zombies."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, in_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(in_group) == group and state != "Z":
                members.append(int(folder.name))
    return members
