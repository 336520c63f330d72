"""The few things ranks say to each other outside DeepSpeed's own traffic."""

import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from torch import Tensor

from fcn_dist.errors import LostPeer, UserError
from fcn_dist.model.devices import keep_freed_memory
from fcn_dist.ranks import Rank, cores_of

T = TypeVar("T")

# How gloo, NCCL and the store say that the other end is gone; whatever else they raise is a bug.
LOST_CONNECTION = re.compile(
    r"closed by peer|reset by peer|[Tt]imed out|Broken pipe|No route to host|Connection refused|remote process exited",
)


def start_ranks() -> Rank:
    """Join the ranks that a launcher started, or be the only one; returns who this process is."""
    rank = Rank.from_environment()
    if "RANK" not in os.environ:
        # Started without a launcher. DeepSpeed would ask MPI; one process on a port of its own needs no one.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    if torch.cuda.is_available():
        torch.cuda.set_device(rank.local)
    else:
        torch.set_num_threads(cores_of(rank))
        keep_freed_memory()
    # DeepSpeed calls names that torch has renamed; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not dist.is_initialized():
        # On CPU, DeepSpeed would compile a collective of its own, which only its inference uses, and leave 69 MB of
        # shared memory a rank behind for good.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
    return rank


def allow_waits(seconds: float) -> None:
    """Let collectives of all groups wait for at least so long before torch ends the process for it."""
    # DeepSpeed makes groups of its own and has no way to say how long they wait: torch's default is 10 minutes with
    # NCCL, whatever the default group has.
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(max(default_pg_timeout, timedelta(seconds=seconds)), group)


def device(rank: Rank) -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", rank.local) if torch.cuda.is_available() else torch.device("cpu")


def on_rank_zero(rank: Rank, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone and give its result to all; a UserError is raised on all ranks alike."""
    outcome: list[T | UserError | None] = [None]
    if rank.index == 0:
        try:
            outcome = [action()]
        except UserError as error:
            outcome = [error]
    if rank.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]


def sum_over_ranks(values: Tensor, rank: Rank) -> Tensor:
    """The element-wise sum of `values` over all ranks, in place."""
    if rank.world_size > 1:
        dist.all_reduce(values)
    return values


def largest_over_ranks(values: Tensor, rank: Rank) -> Tensor:
    """The element-wise maximum of `values` over all ranks, in place."""
    if rank.world_size > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


@contextmanager
def noticing_lost_peers() -> Iterator[None]:
    """Turn what a collective raises when another rank has died into a LostPeer that says it in a line."""
    try:
        yield
    except RuntimeError as error:  # torch's own classes derive from it
        reason = str(error).partition("\n")[0].partition(". ")[0]  # the rest is advice
        if not LOST_CONNECTION.search(reason):
            raise
        raise LostPeer(
            f"another rank is gone ({reason}); its own output says why; continue with --auto-resume"
        ) from None


def of_all_ranks(value: T, rank: Rank) -> list[T]:
    """The values of all ranks, by rank."""
    values = [value] * rank.world_size
    if rank.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def barrier(rank: Rank) -> None:
    """Wait for all ranks."""
    if rank.world_size > 1:
        dist.barrier()
