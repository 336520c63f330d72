"""Real ranks, with the real launcher and without, under a hard time limit."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from warm_ranks import WarmRanks

WARM = WarmRanks()
LOG_SHOWN = 30_000  # characters at its end


def launch_ranks(
    script: Path, arguments: Sequence[str], world_size: int, folder: Path, timeout: float, code: int = 0
) -> str:
    """Run `script` under DeepSpeed's launcher, which is to end with `code`; returns all that is printed."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world_size)]
    return _run_command(
        [*launcher, "--master_port", free_port(), str(script), *arguments], script, folder, timeout, code
    )


def launch_alone(script: Path, arguments: Sequence[str], folder: Path, timeout: float, code: int = 0) -> str:
    """The same as a user starts one process."""
    return _run_command([sys.executable, str(script), *arguments], script, folder, timeout, code)


def run_ranks(
    script: Path, arguments: Sequence[str], world_size: int, folder: Path, timeout: float, code: int = 0
) -> str:
    """Run `script` on `world_size` ranks from `folder`, and return all they print.

    Each is a process as the launcher would start it, without the launcher and without the imports' time.
    Fails the test unless the first to fail ends with `code`, or all with 0.
    """
    return _run_warm(script, arguments, world_size, folder, timeout, code)


def run_alone(script: Path, arguments: Sequence[str], folder: Path, timeout: float, code: int = 0) -> str:
    """The same with one process that no launcher has told its rank."""
    return _run_warm(script, arguments, None, folder, timeout, code)


def kill_ranks(
    script: Path, arguments: Sequence[str], world_size: int, folder: Path, timeout: float, when: Callable[[str], bool]
) -> str:
    """SIGKILL all ranks of `run_ranks` as soon as `when` holds for what they have printed, which is returned."""
    log = _fresh_log(script, folder)
    WARM.start(script, arguments, world_size, free_port(), folder, log, _environment())
    deadline = time.monotonic() + timeout
    while not when(text := log.read_text() if log.exists() else ""):
        if WARM.ended(0.05) is not None or time.monotonic() > deadline:
            WARM.kill()
            pytest.fail(f"{script} {' '.join(arguments)}: what is awaited never came\n{text[-LOG_SHOWN:]}")
    WARM.kill()
    return text


def free_port() -> str:
    """A port of this machine for a launcher's --master_port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _run_command(command: Sequence[str], script: Path, folder: Path, timeout: float, wanted: int) -> str:
    """The launcher leaves its ranks behind when it is killed, so the whole process group is ended with it."""
    log = _fresh_log(script, folder)
    with log.open("a") as output, _told_if_cut_off(log):
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(),
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
    return _judge(" ".join(command), code, wanted, timeout, log)


def _run_warm(
    script: Path, arguments: Sequence[str], world_size: int | None, folder: Path, timeout: float, code: int
) -> str:
    log = _fresh_log(script, folder)
    group = WARM.start(script, arguments, world_size, free_port(), folder, log, _environment())
    found = None
    with _told_if_cut_off(log):
        try:
            found = WARM.ended(timeout)
        finally:
            if found is None:
                _abort_with_stacks(group)
                WARM.kill()
    return _judge(f"{script} {' '.join(arguments)}", found, code, timeout, log)


@contextmanager
def _told_if_cut_off(log: Path) -> Iterator[None]:
    """Print what the ranks wrote, and their stacks, where the test's own time limit ends the wait for them."""
    try:
        yield
    except BaseException:
        print(log.read_text()[-LOG_SHOWN:])
        raise


def _fresh_log(script: Path, folder: Path) -> Path:
    log = folder / f"{script.stem}.log"
    log.unlink(missing_ok=True)
    return log


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def _judge(command: str, code: int | None, wanted: int, timeout: float, log: Path) -> str:
    text = log.read_text()
    if code != wanted:
        reason = f"no end within {timeout} s" if code is None else f"exit code {code}, not {wanted}"
        pytest.fail(f"{command}: {reason}\n{text[-LOG_SHOWN:]}")
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
