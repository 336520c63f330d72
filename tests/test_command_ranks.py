"""How a rank ends: with the exit code that it means, whatever torch's threads do; the interpreter is not taken down."""

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, errno, sys
from pathlib import Path
from types import SimpleNamespace
import torch, torch.distributed as dist
from fcn_dist.commands.entry import run_script
from fcn_dist.commands.ranks import among_ranks
from fcn_dist.errors import EarlyEnd, LostPeer, UserError

EXITING = 4  # PF_EXITING: the kernel's flag of a thread that may have been joined, and is in /proc a little longer

def running(task):
    try:
        name, _, fields = (task / "stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if int(fields.split()[6]) & EXITING else name

def threads():
    return sum("gloo" in running(task) for task in Path("/proc/self/task").iterdir())

class LastToGo:
    def __del__(self):
        print("taken down", flush=True)

def command(argv):
    with among_ranks():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(3))
        print("threads", threads())
        {ending}

last = LastToGo()
atexit.register(lambda: print("handlers run with", threads()))
sys.modules["fcn_dist.commands.stand_in"] = SimpleNamespace(main=command)
print("buffered")
sys.exit(run_script("stand_in"))
"""


def end(ending: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(ending=ending)
    # A pipe, so that output waits in a buffer.
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("raise EarlyEnd('stopped', 75)", 75)])
def test_ranks_that_end_together_end_their_groups_and_run_all_handlers(ending: str, code: int) -> None:
    process = end(ending)
    before, after = process.stdout.splitlines()[1:]
    assert process.returncode == code, process.stderr
    assert int(before.split()[-1]) > 0
    assert after == "handlers run with 0"


def test_a_group_that_something_still_refers_to_does_not_meet_the_interpreters_end() -> None:
    # As DeepSpeed's modules do. Its threads live on, and one that wanted the lock then would abort the process.
    process = end("globals()['kept'] = dist.distributed_c10d._get_default_group()")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith("handlers run with ")
    assert not process.stdout.endswith("handlers run with 0\n"), "nothing was kept"


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("raise UserError('no such shard')", 2, "error: no such shard\n"),
        ("raise LostPeer('rank 1 is gone')", 1, "rank 1 is gone\n"),
        ("raise RuntimeError('a bug')", 1, "RuntimeError: a bug\n"),
        ("raise OSError(errno.ENOSPC, 'No space left', '/here')", 2, "choose a place on another disk\n"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "interrupted\n"),
        ("raise SystemExit(3)", 3, ""),
    ],
)
def test_a_rank_that_fails_alone_says_so_and_goes(ending: str, code: int, said: str) -> None:
    process = end(ending)
    assert process.returncode == code
    assert process.stderr.endswith(said)
    assert process.stdout.startswith("buffered\nthreads ")
    assert "handlers run" not in process.stdout and "taken down" not in process.stdout


def test_what_a_process_does_at_its_end_is_done_once_whenever_it_was_registered() -> None:
    process = end("globals()['later'] = atexit.register(print, 'later')")
    assert process.returncode == 0 and process.stdout.splitlines()[-2:] == ["later", "handlers run with 0"]


def test_what_fails_after_the_ranks_came_to_their_end_is_a_failure() -> None:
    script = SCRIPT.format(ending="pass").replace('run_script("stand_in")', "command([]) or 1 / 0")
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert process.returncode == 1 and "ZeroDivisionError" in process.stderr


def test_a_command_that_fails_before_it_joins_others_ends_as_any_other() -> None:
    process = end("dist.destroy_process_group(); raise UserError('no such shard')")
    assert process.returncode == 2
    assert process.stdout.endswith("handlers run with 0\ntaken down\n")
