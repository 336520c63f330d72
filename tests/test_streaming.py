"""Remote shard sets end to end: the batches of a local one, each file fetched once a node, damage refused by name."""

import json
import multiprocessing
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import gs_server
import pytest
import torch
from colour_scenes import write_colour_scenes
from gs_server import serving_gs
from s3_server import BUCKET, serving_s3
from shard_server import ShardServer, serving_folder

from fcn_dist.config import DataConfig
from fcn_dist.data.loader import Batch, build_loader, build_scene_loader
from fcn_dist.data.packing.run import pack
from fcn_dist.data.remote.cache import NodeCache
from fcn_dist.data.remote.urls import Retries
from fcn_dist.data.shard import read_members
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.data.upcoming import check_cache_limit, upcoming_files
from fcn_dist.errors import UserError
from fcn_dist.ranks import BatchPlan, Rank

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]

COUNT, SHARD, GLOBAL_BATCH, SEED = 16, 2, 8, 5
CROP = (24, 32)
STEPS = range(1, 7)  # three epochs, from the middle of the first


class Remote(NamedTuple):
    server: ShardServer
    local: ShardSet
    cache: NodeCache

    def open(self, **changes: object) -> ShardSet:
        cache = replace(self.cache, **changes)  # type: ignore[arg-type]
        return ShardSet.open(self.server.url, "training", cache)

    @property
    def files(self) -> list[str]:
        return [name for shard in self.local.shards for name in (shard.path.name, shard.members_path.name)]


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    scenes = write_colour_scenes(tmp_path / "scenes", COUNT)
    (local,) = pack(scenes, tmp_path / "shards", ["training"], samples_per_shard=SHARD, workers=1)
    quick = Retries(tries=4, first=0.001, longest=0.001)
    with serving_folder(tmp_path / "shards") as server:
        yield Remote(server, local, NodeCache(tmp_path / "cache", 10**9, quick))


def stream_of(shard_set: ShardSet, window: int | None = None, lanes: int = 1) -> SampleStream:
    return SampleStream(shard_set, SEED, window=window, lanes=lanes)


def load(shard_set: ShardSet, stream: SampleStream, rank: int, world_size: int, workers: int) -> list[Batch]:
    plan = BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // world_size, 1, world_size, stream.lanes)
    config = DataConfig(crop=CROP, workers=workers, score_other=True)
    return list(build_loader(shard_set, stream, plan, config, rank, STEPS))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.positions == theirs.positions
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.targets, theirs.targets)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("window", "lanes"), [(None, 1), (4, 1), (4, 2)])
def test_a_remote_set_gives_the_batches_of_a_local_one_and_each_file_is_fetched_once(
    remote: Remote, workers: int, window: int | None, lanes: int
) -> None:
    shard_set = remote.open()
    found = load(shard_set, stream_of(shard_set, window, lanes), 0, 1, workers)
    assert_same(found, load(remote.local, stream_of(remote.local, window, lanes), 0, 1, 0))
    assert {name: remote.server.whole_reads(name) for name in remote.files} == dict.fromkeys(remote.files, 1)


def _one_rank(remote: Remote, rank: int, world_size: int, cache: NodeCache) -> None:
    shard_set = ShardSet.open(remote.server.url, "training", cache)
    found = load(shard_set, stream_of(shard_set), rank, world_size, 2)
    assert_same(found, load(remote.local, stream_of(remote.local), rank, world_size, 0))


def run_ranks_here(remote: Remote, caches: list[NodeCache]) -> None:
    """One process a rank, each with two loader processes."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_one_rank, args=(remote, rank, len(caches), cache)) for rank, cache in enumerate(caches)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * len(ranks)


def test_ranks_and_workers_of_a_node_share_what_is_fetched(remote: Remote) -> None:
    run_ranks_here(remote, [remote.cache] * 2)
    assert {name: remote.server.whole_reads(name) for name in remote.files} == dict.fromkeys(remote.files, 1)


def test_each_node_fetches_for_itself(remote: Remote) -> None:
    run_ranks_here(remote, [replace(remote.cache, dir=remote.cache.dir / str(node)) for node in range(2)])
    assert {name: remote.server.whole_reads(name) for name in remote.files} == dict.fromkeys(remote.files, 2)


def test_a_second_run_fetches_nothing_but_the_index(remote: Remote) -> None:
    for _ in range(2):
        shard_set = remote.open()
        load(shard_set, stream_of(shard_set), 0, 1, 0)
    assert remote.server.bodies["index.json"] == 2
    assert max(remote.server.bodies[name] for name in remote.files) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_smaller_than_the_set_holds_a_window_at_a_time(remote: Remote, workers: int) -> None:
    sizes = [shard.size + shard.members_size for shard in remote.local.shards]
    limit = sum(sorted(sizes)[-5:])
    assert limit < sum(sizes)
    shard_set = remote.open(limit=limit)
    found = load(shard_set, stream_of(shard_set, window=2), 0, 1, workers)
    assert_same(found, load(remote.local, stream_of(remote.local, window=2), 0, 1, 0))
    kept = sum(path.stat().st_size for path in remote.cache.dir.rglob("*") if path.is_file())
    assert 0 < kept <= limit


def test_a_node_fetches_only_the_lanes_of_its_ranks_within_an_epoch(remote: Remote) -> None:
    """Two nodes of one rank, two lanes: each fetches half of the shards for an epoch of whole windows."""
    plan = BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // 2, 1, 2, lanes=2)
    for rank in range(2):
        shard_set = remote.open(dir=remote.cache.dir / str(rank))
        config = DataConfig(crop=CROP, workers=0, read_ahead=0)
        stream = stream_of(shard_set, window=4, lanes=2)
        list(build_loader(shard_set, stream, plan, config, rank, range(COUNT // GLOBAL_BATCH)))
    tars = [shard.path.name for shard in remote.local.shards]
    assert {name: remote.server.whole_reads(name) for name in tars} == dict.fromkeys(tars, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_on_s3_gives_the_batches_of_a_local_one(remote: Remote, workers: int) -> None:
    with serving_s3() as client:
        for path in remote.local.dir.iterdir():
            client.upload_file(str(path), BUCKET, f"sets/one/training/{path.name}")
        shard_set = ShardSet.open(f"s3://{BUCKET}/sets/one", "training", remote.cache)
        found = load(shard_set, stream_of(shard_set), 0, 1, workers)
        assert_same(found, load(remote.local, stream_of(remote.local), 0, 1, 0))
        # Half-way replaced by another set's: refused, though the client finds nothing wrong.
        client.upload_file(
            str(remote.local.shards[0].path), BUCKET, f"sets/one/training/{remote.local.shards[1].path.name}"
        )
        anew = ShardSet.open(f"s3://{BUCKET}/sets/one", "training", replace(remote.cache, dir=remote.cache.dir / "b"))
        with pytest.raises(UserError, match=rf"s3://{BUCKET}/sets/one/training/training-000001\.tar is refused"):
            load(anew, stream_of(anew), 0, 1, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_on_gs_gives_the_batches_of_a_local_one(remote: Remote, workers: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving_gs(remote.local.dir, "sets/one/training", port):
        shard_set = ShardSet.open(f"gs://{gs_server.BUCKET}/sets/one", "training", remote.cache)
        found = load(shard_set, stream_of(shard_set), 0, 1, workers)
        assert_same(found, load(remote.local, stream_of(remote.local), 0, 1, 0))


# ---- a server that fails


def test_503_and_dropped_connections_are_outlived(remote: Remote) -> None:
    first, second = (shard.path.name for shard in remote.local.shards[:2])
    remote.server.busy[first] = 2
    remote.server.cut[second] = 2
    remote.server.busy["index.json"] = 1
    shard_set = remote.open()
    found = load(shard_set, stream_of(shard_set), 0, 1, 2)
    assert_same(found, load(remote.local, stream_of(remote.local), 0, 1, 0))
    assert remote.server.busy[first] < 0 and remote.server.cut[second] < 0


def test_wrong_bytes_once_are_fetched_anew(remote: Remote) -> None:
    name = remote.local.shards[3].path.name
    remote.server.wrong[name] = 1
    shard_set = remote.open()
    found = load(shard_set, stream_of(shard_set), 0, 1, 0)
    assert_same(found, load(remote.local, stream_of(remote.local), 0, 1, 0))
    assert remote.server.whole_reads(name) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["tar", "members"])
def test_a_file_that_stays_wrong_is_refused_by_its_url(remote: Remote, workers: int, kind: str) -> None:
    shard = remote.local.shards[3]
    name = shard.path.name if kind == "tar" else shard.members_path.name
    remote.server.wrong[name] = 10**6
    shard_set = remote.open()
    with pytest.raises(UserError) as caught:
        load(shard_set, stream_of(shard_set), 0, 1, workers)
    assert f"{remote.server.url}/training/{name}" in str(caught.value) and "refused" in str(caught.value)
    file = shard_set.shards[3].tar_file if kind == "tar" else shard_set.shards[3].members_file
    assert not remote.cache.path(file).exists()


@pytest.mark.parametrize("kind", ["tar", "members"])
def test_a_copy_that_the_node_s_disk_has_damaged_is_fetched_anew(remote: Remote, kind: str) -> None:
    shard_set = remote.open()
    load(shard_set, stream_of(shard_set), 0, 1, 0)
    shard = shard_set.shards[3]
    file = shard.tar_file if kind == "tar" else shard.members_file
    path = remote.cache.path(file)
    data = bytearray(path.read_bytes())
    data[-20 if kind == "members" else int(shard_set.locate(6)[1]["image_offset"]) + 50] ^= 1
    path.write_bytes(data)
    read_members.cache_clear()
    shard_set = remote.open()
    found = load(shard_set, stream_of(shard_set), 0, 1, 2)
    assert_same(found, load(remote.local, stream_of(remote.local), 0, 1, 0))
    assert remote.server.whole_reads(file.url.rpartition("/")[2]) == 2


def test_a_file_that_is_gone_is_named(remote: Remote) -> None:
    shard_set = remote.open()
    remote.local.shards[2].path.unlink()
    with pytest.raises(UserError, match=rf"{remote.server.url}/training/training-000002\.tar"):
        load(shard_set, stream_of(shard_set), 0, 1, 0)


def test_a_server_without_a_set_is_named(remote: Remote) -> None:
    with pytest.raises(UserError, match=rf"{remote.server.url}/nothing/index\.json"):
        ShardSet.open(f"{remote.server.url}/nothing", cache=remote.cache)


@pytest.mark.parametrize("name", ["a?b.tar", "a#b.tar", "a%2e.tar", "pipe:cat x.tar", "../x.tar", "http://h/x.tar"])
def test_an_index_cannot_lead_elsewhere(remote: Remote, name: str) -> None:
    path = remote.local.dir / "index.json"
    index = json.loads(path.read_text())
    index["shardlist"][0]["url"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="not the name of a tar file"):
        remote.open()


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "pipe://cat", "simplecache::http://h/x", "nothing://h/x"])
def test_urls_that_run_commands_or_wrap_others_are_refused(url: str) -> None:
    with pytest.raises(UserError):
        ShardSet.open(url, "training")


# ---- evaluation, and what is needed when


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_of_a_remote_set_sees_the_scenes_of_the_local_one(remote: Remote, workers: int) -> None:
    found = list(build_scene_loader(remote.open(), Rank(1, 2), workers))
    expected = list(build_scene_loader(remote.local, Rank(1, 2), 0))
    assert [scene.key for scene in found] == [scene.key for scene in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.image, theirs.image) and torch.equal(ours.labels, theirs.labels)


def test_upcoming_files_are_named_once_in_the_order_of_their_first_use(remote: Remote) -> None:
    shard_set = remote.open()
    stream = stream_of(shard_set)
    batches = [stream.samples(range(start, start + 4)) for start in range(0, 32, 4)]
    uses = list(upcoming_files(shard_set, iter(batches)))
    tars = [file.url for _, file in uses if file.url.endswith(".tar")]
    first_use: dict[int, int] = {}
    for number, samples in enumerate(batches):
        for sample in samples.tolist():
            first_use.setdefault(sample // SHARD, number)
    assert tars == [shard_set.shards[shard].name for shard in first_use]
    assert [number for number, file in uses if file.url.endswith(".tar")] == list(first_use.values())
    assert len(uses) == 2 * len(tars)


def test_a_cache_that_cannot_hold_what_is_shuffled_is_refused(remote: Remote) -> None:
    size = sum(shard.size + shard.members_size for shard in remote.local.shards)
    plan, lanes = BatchPlan(8, 4, 1, 2), BatchPlan(8, 4, 1, 2, lanes=2)
    half = remote.open(limit=size // 2 + 1)
    alone, both = Rank(0, 2, 0, 1), Rank(0, 2, 0, 2)
    with pytest.raises(UserError, match=r"whole set is shuffled.*data\.cache_limit is"):
        check_cache_limit(half, plan, DataConfig(), alone)
    check_cache_limit(half, plan, DataConfig(window=4), alone)
    with pytest.raises(UserError, match=r"data\.window is 5, so this node reads 5 of the 8 shards"):
        check_cache_limit(half, plan, DataConfig(window=5), alone)
    # With a lane a node, it is half of the window.
    check_cache_limit(half, lanes, DataConfig(window=8, lanes=2), alone)
    with pytest.raises(UserError, match="reads 8 of the 8 shards"):
        check_cache_limit(half, lanes, DataConfig(window=8, lanes=2), both)
    check_cache_limit(remote.local, plan, DataConfig(), alone)  # nothing is fetched
