"""How a rank ends: its groups' threads are gone before the interpreter is, or the interpreter's end is skipped."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from pathlib import Path
import torch, torch.distributed as dist
from fcn_dist.commands.ranks import among_ranks
from fcn_dist.console import run_command
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

def command():
    with among_ranks():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(3))
        print("threads", threads())
        {ending}

atexit.register(lambda: print("interpreter ends with", threads()))
print("buffered")
sys.exit(run_command(command))
"""


def end(ending: str) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(ending=ending)
    # A pipe, so that output waits in a buffer.
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("raise EarlyEnd('stopped', 75)", 75)])
def test_ranks_that_end_together_leave_no_threads_to_the_interpreters_end(ending: str, code: int) -> None:
    process = end(ending)
    before, after = process.stdout.splitlines()[1:]
    assert process.returncode == code, process.stderr
    assert int(before.split()[-1]) > 0
    assert after == "interpreter ends with 0"


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("raise UserError('no such shard')", 2, "error: no such shard\n"),
        ("raise LostPeer('rank 1 is gone')", 1, "rank 1 is gone\n"),
        ("raise RuntimeError('a bug')", 1, "RuntimeError: a bug\n"),
    ],
)
def test_a_rank_that_fails_alone_says_so_and_skips_the_interpreters_end(ending: str, code: int, said: str) -> None:
    process = end(ending)
    assert process.returncode == code
    assert process.stderr.endswith(said)
    assert process.stdout.startswith("buffered\nthreads ")
    assert "interpreter ends" not in process.stdout


def test_a_command_that_fails_before_it_joins_others_ends_as_any_other() -> None:
    process = end("dist.destroy_process_group(); raise UserError('no such shard')")
    assert process.returncode == 2
    assert process.stdout.endswith("interpreter ends with 0\n")
