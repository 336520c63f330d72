"""launch/train.py on a rank whose memory runs out as SCARCE says: RANK:STEP:MEGABYTES.

From that step on the rank may have so many megabytes more than it has just before, and no more: a limit that the kernel
keeps, as when another program has the rest; on a GPU, one that torch keeps. Step 0 is before the micro-batch is chosen.
"""

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from fcn_dist.commands.entry import run_script
from fcn_dist.training import collective, ready
from fcn_dist.training.shortage import Shortage

RANK, STEP, MEGABYTES = map(int, os.environ["SCARCE"].split(":"))
FIT, TRAIN = vars(ready)["fit"], Shortage.train


def return_freed_memory() -> None:
    """In place of keep_freed_memory: what steps have freed would otherwise do for the next ones, limit or not."""
    m_mmap_threshold = -3  # malloc.h
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 16)


def set_limit(step: int) -> None:
    if step != STEP or os.environ.get("RANK", "0") != str(RANK):
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + MEGABYTES * 1024**2
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    else:
        status = Path("/proc/self/status").read_text()
        used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, ((used + MEGABYTES * 1024) * 1024, resource.RLIM_INFINITY))


def fit(*arguments: Any) -> Any:
    set_limit(0)
    return FIT(*arguments)


def train(self: Shortage, done: int, *arguments: Any) -> Any:
    set_limit(done)
    return TRAIN(self, done, *arguments)


vars(collective)["keep_freed_memory"] = return_freed_memory
vars(ready)["fit"] = fit
Shortage.train = train  # type: ignore[method-assign,assignment]

if __name__ == "__main__":
    sys.exit(run_script("train"))
