"""The list of shards as a mapped table: the same set as from the index, and a million shards in little memory."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeScenes
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_server import serving_folder

from fcn_dist.data import shardset
from fcn_dist.data.packing import write_index
from fcn_dist.data.packing.run import pack
from fcn_dist.data.remote.cache import NodeCache
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.shardtable import TABLE_NAME, ShardTable, records_of, totals_of
from fcn_dist.data.verifying.verify import verify
from fcn_dist.errors import UserError


def entries(counts: list[int]) -> list[dict[str, object]]:
    return [
        {
            "url": f"training-{number:06d}.tar",
            "nsamples": count,
            "filesize": 1000 + number,
            "sha256": hashlib.sha256(b"%d" % number).hexdigest(),
            "members_filesize": 100 + number,
            "members_sha256": hashlib.sha256(b"m%d" % number).hexdigest(),
        }
        for number, count in enumerate(counts)
    ]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any))
@settings(max_examples=200)
def test_every_sample_is_in_the_shard_that_counting_finds(counts: list[int]) -> None:
    records = records_of(entries(counts))
    table = ShardTable(records, totals_of(records), "folder", None)
    expected = [number for number, count in enumerate(counts) for _ in range(count)]
    assert table.totals.samples == len(expected) and table.totals.most_samples == max(counts)
    assert table.totals.size == sum(1100 + 2 * number for number in range(len(counts)))
    assert table.holding(np.arange(len(expected))).tolist() == expected
    for number, count in enumerate(counts):
        assert table.first_sample(number) == sum(counts[:number])
        assert table[number].num_samples == count


def test_digests_that_end_in_zeros_are_kept_whole() -> None:
    (entry,) = entries([3])
    entry["sha256"] = "ab" * 20 + "00" * 12
    records = records_of([entry])
    assert ShardTable(records, totals_of(records), "folder", None)[0].sha256 == entry["sha256"]


@pytest.fixture
def short_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index longer than 2 kB counts as long."""
    monkeypatch.setattr(shardset, "HEAD_SIZE", 2000)
    monkeypatch.setattr(write_index, "HEAD_SIZE", 2000)


@pytest.fixture
def with_table(make_scenes: MakeScenes, tmp_path: Path, short_head: None) -> Path:
    pack(make_scenes(n=9), tmp_path / "out", ("training",), samples_per_shard=1, workers=1)
    return tmp_path / "out"


def test_a_long_index_is_read_by_its_head_and_table_as_by_its_list(
    with_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((with_table / "training" / "index.json").read_text())
    assert list(index)[-1] == "shardlist" and len(index["shardlist"]) == 9
    by_table = ShardSet.open(with_table, "training")
    # The list is not looked at: it is what makes the index long.
    text = (with_table / "training" / "index.json").read_text()
    (with_table / "training" / "index.json").write_text(
        text[:2000].rpartition('"shardlist"')[0] + '"shardlist": ' + "#" * 2000
    )
    assert list(ShardSet.open(with_table, "training").shards) == list(by_table.shards)
    (with_table / "training" / "index.json").write_text(text)
    monkeypatch.undo()
    by_list = ShardSet.open(with_table, "training")
    assert list(by_table.shards) == list(by_list.shards)
    assert by_table.shards.totals == by_list.shards.totals
    assert [by_table.key(i) for i in range(9)] == [by_list.key(i) for i in range(9)]
    assert by_table.read(7) == by_list.read(7)


def test_a_short_index_has_no_table(make_scenes: MakeScenes, tmp_path: Path) -> None:
    pack(make_scenes(n=2), tmp_path / "out", ("training",), workers=1)
    assert not (tmp_path / "out" / "training" / TABLE_NAME).exists()


def test_a_long_remote_index_is_read_by_its_head_and_table(with_table: Path, tmp_path: Path) -> None:
    with serving_folder(with_table) as server:
        shard_set = ShardSet.open(server.url, "training", NodeCache(tmp_path / "cache", 10**8))
        local = ShardSet.open(with_table, "training")
        assert [shard_set.read(i) for i in range(9)] == [local.read(i) for i in range(9)]
        assert server.bodies[TABLE_NAME] == 1


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes() + b"x")]
)
def test_a_table_that_is_not_the_one_of_the_index_is_refused(with_table: Path, damage) -> None:  # type: ignore[no-untyped-def]
    damage(with_table / "training" / TABLE_NAME)
    with pytest.raises(UserError, match=r"shards\.npy cannot be used"):
        ShardSet.open(with_table, "training")


def forge_table(
    folder: Path, change: Callable[["np.ndarray[tuple[int], np.dtype[np.void]]"], Any], **stated: Any
) -> None:
    """Another table under the index, with the digest that fits it."""
    records = change(np.load(folder / TABLE_NAME))
    np.save(folder / TABLE_NAME, records)
    digest = hashlib.sha256((folder / TABLE_NAME).read_bytes()).hexdigest()
    index = json.loads((folder / "index.json").read_text())
    table = index["shard_table"] | {"filesize": (folder / TABLE_NAME).stat().st_size, "sha256": digest} | stated
    text = write_index._text({**index, "shard_table": table})
    (folder / "index.json").write_text(text)


def renamed(name: bytes) -> Callable[["np.ndarray[tuple[int], np.dtype[np.void]]"], Any]:
    def change(records: "np.ndarray[tuple[int], np.dtype[np.void]]") -> Any:
        records["url"][4] = name
        return records

    return change


@pytest.mark.parametrize("name", [b"../../x.tar", b"/etc/x.tar", b"a%2e.tar", b"x.zip", b"\xff\xfe", b""])
def test_a_table_cannot_lead_elsewhere(with_table: Path, name: bytes) -> None:
    forge_table(with_table / "training", renamed(name))
    shard_set = ShardSet.open(with_table, "training")
    shard_set.read(3)
    with pytest.raises(UserError, match=r"is not the name of a tar file beside the index"):
        shard_set.read(4)


@pytest.mark.parametrize(
    "change",
    [
        lambda records: records[["first", "nsamples"]].copy(),
        lambda records: np.zeros(9),
        lambda records: records.reshape(3, 3),
        lambda records: records[:0],
    ],
)
def test_a_table_of_another_form_is_refused(with_table: Path, change: Callable[[object], Any]) -> None:
    forge_table(with_table / "training", change)
    with pytest.raises(UserError, match=r"shards\.npy cannot be used"):
        ShardSet.open(with_table, "training")


@pytest.mark.parametrize("totals", [[9, 1, 0], [9, 1, -1], [10, 1, 1], [9, 1], None])
def test_totals_that_do_not_fit_the_table_are_refused(with_table: Path, totals: object) -> None:
    forge_table(with_table / "training", lambda records: records, totals=totals)
    with pytest.raises(UserError):
        ShardSet.open(with_table, "training")


def test_verify_compares_the_table_with_the_list(with_table: Path) -> None:
    (report,) = verify(with_table, workers=1)
    assert not report.problems
    path = with_table / "training" / "index.json"
    text = path.read_text()
    position = text.index('"nsamples": 1', text.index('"shardlist"'))
    path.write_text(text[:position] + '"nsamples": 2' + text[position + 13 :])
    (report,) = verify(with_table, workers=1)
    assert [problem.file for problem in report.problems] == [TABLE_NAME]


PLANNING = """
import json, resource, sys, time
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.ranks import BatchPlan
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
shard_set = ShardSet.open(sys.argv[1])
stream = SampleStream(shard_set, 0, window=4096, lanes=512)
plan = BatchPlan(32 * 4096, 32, 1, 4096, 512)
shards = shard_set.shard_numbers(stream.samples(plan.positions(4095, 7)))
names = [shard_set.shards[number].path.name for number in shards]
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([len(shard_set), names, grown, time.perf_counter() - began]))
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_million_shards_are_opened_and_planned_in_memory_that_does_not_grow_with_them(
    make_scenes: MakeScenes, tmp_path: Path
) -> None:
    pack(make_scenes(n=1), tmp_path / "out", ("training",), workers=1)
    index = json.loads((tmp_path / "out" / "training" / "index.json").read_text())
    grown = {}
    for shards in (50_000, 1_000_000):
        folder = tmp_path / str(shards)
        folder.mkdir()
        write_index.write_fields(folder, {**index, "num_samples": 1000 * shards, "shardlist": entries([1000] * shards)})
        done = subprocess.run(
            [sys.executable, "-c", PLANNING, folder], capture_output=True, text=True, timeout=100, check=True
        )
        samples, names, kilobytes, seconds = json.loads(done.stdout)
        print(f"{shards:,} shards: opened and planned in {seconds:.3f} s, {kilobytes / 1024:.1f} MB more")
        assert samples == 1000 * shards and 1 <= len(names) <= 10
        grown[shards] = kilobytes * 1024
    assert grown[1_000_000] < grown[50_000] + 8_000_000  # a list of as many would take a gigabyte
