"""The hand-off: a slot is filled again only after it has been copied out, across real processes."""

import gc
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from colour_scenes import write_colour_scenes

from fcn_dist.config import DataConfig
from fcn_dist.data import loader
from fcn_dist.data.crops import CropReader
from fcn_dist.data.handoff import Place, Slots
from fcn_dist.data.loader import Batch, build_loader
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.ranks import BatchPlan, cut_anew

CROP = (8, 12)


def test_a_slot_is_free_until_as_many_batches_as_there_are_slots_are_not_copied() -> None:
    slots = Slots(workers=2, slots=3, micro_batch=2, crop=CROP)
    assert [slots.free(Place(1, number, 2)) for number in range(5)] == [True, True, True, False, False]
    slots.take(Place(1, 0, 2), pin_memory=False)
    assert [slots.free(Place(1, number, 2)) for number in range(5)] == [True, True, True, True, False]
    assert not slots.free(Place(0, 3, 2))  # of another process


def test_what_is_taken_is_a_copy_and_what_a_child_writes_is_seen() -> None:
    slots = Slots(workers=1, slots=2, micro_batch=2, crop=CROP)
    child = os.fork()
    if not child:
        images, targets = slots.arrays(Place(0, 1, 2))
        images[:] = 7
        targets[:] = 9
        os._exit(0)
    os.waitpid(child, 0)
    taken, labels = slots.take(Place(0, 1, 2), pin_memory=False)
    slots.arrays(Place(0, 1, 2))[0][:] = 0
    assert taken.shape == (2, *CROP, 3) and (taken == 7).all()
    assert labels.shape == (2, *CROP) and (labels == 9).all()
    assert taken.dtype == labels.dtype == torch.uint8


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = tmp_path_factory.mktemp("handoff")
    (packed,) = pack(write_colour_scenes(root / "scenes", 10), root / "shards", ["training"], workers=1)
    return packed


def batches_of(shard_set: ShardSet, workers: int) -> "list[tuple[torch.Tensor, torch.Tensor]]":
    plan, config = BatchPlan(2, 2, 1, 1), DataConfig(crop=CROP, workers=workers)
    batches = build_loader(shard_set, SampleStream(shard_set, 0), plan, config, 0, range(60))
    return [(batch.images, batch.targets) for batch in batches]


@pytest.mark.timeout(60)
def test_batches_that_are_kept_are_never_written_over(shard_set: ShardSet) -> None:
    kept, reference = batches_of(shard_set, 2), batches_of(shard_set, 0)
    assert len(kept) == 60  # many times as many as there are slots
    for ours, expected in zip(kept, reference, strict=True):
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.timeout(60)
def test_a_loader_process_that_is_ahead_of_its_slots_leaves_them_alone(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slot, and a consumer that takes nothing before the loader process has gone on as far as it can."""
    filled = multiprocessing.get_context("fork").Semaphore(0)

    class Counting(CropReader):
        def fill(self, *arguments: Any) -> Any:
            bad = super().fill(*arguments)
            filled.release()
            return bad

    monkeypatch.setattr(loader, "CropReader", Counting)
    monkeypatch.setattr(loader, "Slots", lambda workers, slots, *rest: Slots(workers, 1, *rest))
    plan, steps = BatchPlan(2, 2, 1, 1), 12
    config = DataConfig(crop=CROP, workers=1)
    batches = build_loader(shard_set, SampleStream(shard_set, 0), plan, config, 0, range(steps))
    # `take` waits for the loader process: it is asked for the first batch only after all that may be under way are.
    take = Slots.take
    waited: list[int] = []

    def late(slots: Slots, place: Place, pin_memory: bool) -> Any:
        if not waited:
            for _ in range(loader.PREFETCHED_BATCHES):
                assert filled.acquire(timeout=30)
                waited.append(1)
        return take(slots, place, pin_memory)

    monkeypatch.setattr(Slots, "take", late)
    found = list(batches)
    assert len(waited) == loader.PREFETCHED_BATCHES
    for ours, expected in zip(found, batches_of_one(shard_set, steps), strict=True):
        assert torch.equal(ours.images, expected.images) and torch.equal(ours.targets, expected.targets)


def batches_of_one(shard_set: ShardSet, steps: int) -> list[Batch]:
    config = DataConfig(crop=CROP, workers=0)
    return list(build_loader(shard_set, SampleStream(shard_set, 0), BatchPlan(2, 2, 1, 1), config, 0, range(steps)))


def anonymous_shared_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Shmem:")) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc/self/smaps_rollup")
def test_the_memory_is_given_back_with_the_last_reference() -> None:
    gc.collect()
    before = anonymous_shared_bytes()
    slots = Slots(workers=1, slots=2, micro_batch=16, crop=(512, 512))
    for number in (0, 1):
        slots.arrays(Place(0, number, 16))[0][:] = 1
    assert anonymous_shared_bytes() - before > 20_000_000
    del slots
    gc.collect()
    assert anonymous_shared_bytes() - before < 1_000_000


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_two_sizes_hold_together_what_one_batch_holds(shard_set: ShardSet, workers: int) -> None:
    stream, config, steps = SampleStream(shard_set, 0), DataConfig(crop=CROP, workers=workers), 6
    whole = build_loader(shard_set, stream, BatchPlan(7, 7, 1, 1), config, 0, range(steps))
    plan = cut_anew(7, 2, 2)
    ranks = [list(build_loader(shard_set, stream, plan, config, rank, range(steps))) for rank in range(2)]
    assert {len(batch.images) for batches in ranks for batch in batches} == {1, 2}
    for step, expected in enumerate(whole):
        parts = [
            batch for batches in ranks for batch in batches[step * plan.accumulation : (step + 1) * plan.accumulation]
        ]
        assert sum((part.positions for part in parts), ()) == expected.positions
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert torch.equal(torch.cat([part.targets for part in parts]), expected.targets)
        assert sum(part.labelled for part in parts) == expected.labelled
