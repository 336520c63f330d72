"""Which remote files a loader process is about to need, and whether the node's cache can hold them at a time."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from fcn_dist.config import DataConfig
from fcn_dist.data.remote.cache import RemoteFile
from fcn_dist.data.remote.readahead import ReadAhead
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import UserError
from fcn_dist.ranks import BatchPlan, Rank
from fcn_dist.sizes import show_size

FILES_A_SHARD = 2  # its member records and its tar
REMEMBERED = 1024  # shards; one that was named this recently is not named again


def upcoming_files(shard_set: ShardSet, batches: Iterable["NDArray[np.int64]"]) -> Iterator[tuple[int, RemoteFile]]:
    """Files in the order of their first use, each with the number of the batch of sample indices that needs it."""
    named: dict[int, None] = {}  # in the order of their last naming
    for number, indices in enumerate(batches):
        for shard_number in shard_set.shard_numbers(indices):
            if shard_number in named:
                del named[shard_number]
            else:
                shard = shard_set.shards[shard_number]
                yield number, shard.members_file
                yield number, shard.tar_file
            named[shard_number] = None
            if len(named) > REMEMBERED:
                del named[next(iter(named))]


def read_ahead(shard_set: ShardSet, batches: Iterable["NDArray[np.int64]"], shards: int) -> ReadAhead | None:
    """Keeps the next `shards` that the batches need in the cache; None where there is nothing to fetch."""
    if not shard_set.cache or not shards:
        return None
    return ReadAhead(shard_set.cache, upcoming_files(shard_set, batches), FILES_A_SHARD * shards)


def check_cache_limit(shard_set: ShardSet, plan: BatchPlan, config: DataConfig, rank: Rank) -> None:
    """Raise UserError if the cache cannot hold the shards that this node shuffles at a time.

    It would then fetch the same shards over and over.
    """
    if not shard_set.cache:
        return
    count, total = len(shard_set.shards), shard_set.shards.totals.size
    shards = count if config.window is None else min(count, _shards_at_a_time(config.window, plan, rank))
    needed = total * shards // count
    if needed > shard_set.cache.limit:
        window = "the whole set is shuffled" if config.window is None else f"data.window is {config.window}"
        raise UserError(
            f"{window}, so this node reads {shards} of the {count} shards of {shard_set.location} at a time, "
            f"{show_size(needed)}; data.cache_limit is {show_size(shard_set.cache.limit)}; raise it, or choose a "
            "smaller data.window"
        )


def _shards_at_a_time(window: int, plan: BatchPlan, rank: Rank) -> int:
    """Of a window, those in the lanes that the ranks of this node read."""
    first = rank.index - rank.local
    lanes = {
        position % plan.lanes
        for peer in range(first, first + rank.local_world_size)
        for micro_step in range(plan.accumulation)
        for position in plan.positions(peer, micro_step)
    }
    return -(-window * len(lanes) // plan.lanes)
