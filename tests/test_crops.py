"""Damaged samples in the stream: named, or replaced within the budget, the same way by any rank and worker."""

import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from colour_scenes import write_colour_scenes
from conftest import MakeScenes
from shard_surgery import plant

from fcn_dist.config import DataConfig
from fcn_dist.data.crops import BadSample, CropReader
from fcn_dist.data.loader import Batch, build_loader
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shard import DamagedSample
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.errors import UserError
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.ranks import BatchPlan

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

COUNT, CROP, GLOBAL_BATCH, STEPS, SEED = 12, (40, 56), 6, range(6), 2


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = tmp_path_factory.mktemp("crops")
    scenes = write_colour_scenes(root / "scenes", COUNT)
    (shard_set,) = pack(scenes, root / "shards", ["training"], samples_per_shard=4, workers=1)
    return shard_set


def copy_of(sound: ShardSet, folder: Path) -> Path:
    shutil.copytree(sound.dir, folder)
    return folder


def flip(shard_set: ShardSet, index: int, part: str = "image") -> str:
    """Flip one byte of a payload; returns the sample's key."""
    shard, record = shard_set.locate(index)
    data = bytearray(shard.path.read_bytes())
    data[int(record[f"{part}_offset"]) + int(record[f"{part}_size"]) // 2] ^= 0x10
    shard.path.write_bytes(data)
    return str(record["key"].decode())


def config(budget: int, workers: int = 0) -> DataConfig:
    return DataConfig(crop=CROP, scale=(0.6, 1.6), workers=workers, max_bad_samples=budget)


def load(shard_set: ShardSet, budget: int, world_size: int = 1, workers: int = 0) -> list[Batch]:
    """All ranks' batches."""
    plan = BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // world_size, 1, world_size)
    stream = SampleStream(shard_set, SEED)
    ranks = range(world_size)
    loaders = (build_loader(shard_set, stream, plan, config(budget, workers), rank, STEPS) for rank in ranks)
    return [batch for loader in loaders for batch in loader]


def by_position(batches: list[Batch]) -> dict[int, tuple[bytes, bytes]]:
    return {
        position: (batch.images[row].numpy().tobytes(), batch.targets[row].numpy().tobytes())
        for batch in batches
        for row, position in enumerate(batch.positions)
    }


def bad_of(batches: list[Batch]) -> list[BadSample]:
    return sorted((bad for batch in batches for bad in batch.bad_samples), key=lambda bad: bad.position)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 1), (3, 0)])
@pytest.mark.parametrize("part", ["image", "mask"])
def test_a_damaged_sample_is_replaced_where_it_stood_and_nowhere_else(
    sound: ShardSet, tmp_path: Path, part: str, world_size: int, workers: int
) -> None:
    shard_set = ShardSet.open(copy_of(sound, tmp_path / "training"))
    key = flip(shard_set, 5, part)
    stream = SampleStream(shard_set, SEED)
    total = GLOBAL_BATCH * len(STEPS)
    hit = [position for position in range(total) if stream.sample(position) == 5]
    assert len(hit) == total // COUNT

    batches = load(shard_set, budget=1, world_size=world_size, workers=workers)
    assert all(len(batch.positions) == GLOBAL_BATCH // world_size for batch in batches)
    found, expected = by_position(batches), by_position(load(sound, budget=0))
    assert found.keys() == expected.keys()
    assert {position for position in found if found[position] != expected[position]} == set(hit)
    bad = bad_of(batches)
    assert [(b.key, b.position) for b in bad] == [(key, position) for position in hit]
    assert all(b.shard.endswith("training-000001.tar") and f"its {part} does not" in b.reason for b in bad)

    # What stands there instead: a whole sample, drawn by the position, cut as the position says.
    for position in hit:
        other = stream.replacement(position, 0)
        assert other != 5
        image, target = np.empty((*CROP, 3), np.uint8), np.empty(CROP, np.uint8)
        CropReader(sound, Fixed(other), config(0)).fill((position,), image[None], target[None])
        assert found[position] == (image.tobytes(), target.tobytes())


class Fixed(SampleStream):
    """One sample at every position."""

    def __init__(self, sample: int) -> None:
        super().__init__(range(COUNT), SEED)
        self._only = sample

    def samples(self, positions: object) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
        return np.array([self._only])


def test_a_replacement_that_is_damaged_too_is_replaced_again(sound: ShardSet, tmp_path: Path) -> None:
    shard_set = ShardSet.open(copy_of(sound, tmp_path / "training"))
    stream = SampleStream(shard_set, SEED)
    first = stream.sample(0)
    second = stream.replacement(0, 0)
    keys = [flip(shard_set, index) for index in dict.fromkeys((first, second))]
    batch = load(shard_set, budget=5)[0]
    assert [bad.key for bad in batch.bad_samples if bad.position == 0] == keys
    assert by_position([batch])[0] != by_position(load(sound, budget=0))[0]


def test_without_a_budget_the_first_is_raised(sound: ShardSet, tmp_path: Path) -> None:
    shard_set = ShardSet.open(copy_of(sound, tmp_path / "training"))
    key = flip(shard_set, 5)
    with pytest.raises(DamagedSample, match=rf"training-000001\.tar: sample '{key}': its image does not"):
        load(shard_set, budget=0)


def test_a_set_with_nothing_whole_ends_the_run_at_any_budget(sound: ShardSet, tmp_path: Path) -> None:
    folder = copy_of(sound, tmp_path / "training")
    for path in folder.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"100 samples in a row .* are damaged"):
        load(ShardSet.open(folder), budget=10**6)


# ---- planted contents, with right digests


BLACK_PNG = bytes(cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1])


@pytest.mark.parametrize(
    ("image", "mask", "reason"),
    [
        (b"", None, "its image states no size"),
        (b"\xff\xd8\xff\xe0garbage", None, "its image states no size"),
        (None, b"\x89PNG\r\n\x1a\n", "its mask states no size"),
        (None, BLACK_PNG, "its mask states 4x4 pixels in its header"),
        (b"CUT", None, "it decodes to image and mask of shapes"),
    ],
)
def test_a_sample_that_does_not_decode_is_named_with_shard_key_and_reason(
    sound: ShardSet, tmp_path: Path, image: bytes | None, mask: bytes | None, reason: str
) -> None:
    folder = copy_of(sound, tmp_path / "training")
    victim = sound.key(6)

    def change(key: str, sound_image: bytes, sound_mask: bytes) -> tuple[bytes, bytes]:
        if key != victim:
            return sound_image, sound_mask
        # Cut within the last table: the header is whole, and there is nothing to decode.
        planted = sound_image[: sound_image.index(b"\xff\xda")] if image == b"CUT" else image
        return (sound_image if planted is None else planted), (sound_mask if mask is None else mask)

    plant(folder, change)
    shard_set = ShardSet.open(folder)
    bad = bad_of(load(shard_set, budget=1))
    assert {b.key for b in bad} == {victim} and all(reason in b.reason for b in bad)
    with pytest.raises(DamagedSample) as caught:
        load(shard_set, budget=0)
    assert "training-000001.tar" in str(caught.value) and repr(victim) in str(caught.value)


def test_planting_the_same_contents_changes_no_batch(sound: ShardSet, tmp_path: Path) -> None:
    folder = copy_of(sound, tmp_path / "training")
    plant(folder, lambda key, image, mask: (image, mask))
    assert by_position(load(ShardSet.open(folder), budget=0)) == by_position(load(sound, budget=0))


def test_an_image_is_never_given_without_its_own_mask(sound: ShardSet, tmp_path: Path) -> None:
    """Whatever is flipped, what is delivered is what an untouched set delivers at that position, or is listed."""
    expected = by_position(load(sound, budget=0))
    rng = np.random.default_rng(0)
    seen: Counter[bool] = Counter()
    for trial in range(25):
        folder = copy_of(sound, tmp_path / str(trial) / "training")
        for path in folder.glob("*.tar"):
            data = bytearray(path.read_bytes())
            for at in rng.integers(0, len(data), 3):
                data[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
        batches = load(ShardSet.open(folder), budget=100)
        listed = {bad.position for bad in bad_of(batches)}
        for position, pair in by_position(batches).items():
            assert position in listed or pair == expected[position]
        seen[bool(listed)] += 1
    assert seen[True] > 5  # else no payload was ever hit


def test_a_crop_that_one_class_fills_is_drawn_again_alike_on_any_rank(tmp_path: Path, make_scenes: MakeScenes) -> None:
    """Blocks of six classes, so that small crops often lie in one alone."""
    (blocks,) = pack(make_scenes(n=8, size=(96, 128)), tmp_path / "blocks", ["training"], workers=1)
    stream = SampleStream(blocks, SEED)
    shares: dict[float, list[float]] = {}
    found: dict[tuple[float, int], dict[int, tuple[bytes, bytes]]] = {}
    for limit in (1.0, 0.6):
        for ranks, workers in ((1, 0), (2, 2)):
            limited = DataConfig(crop=(32, 32), scale=(0.9, 1.1), class_limit=limit, workers=workers)
            plan = BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // ranks, 1, ranks)
            loaders = (build_loader(blocks, stream, plan, limited, rank, range(20)) for rank in range(ranks))
            found[limit, ranks] = by_position([batch for loader in loaders for batch in loader])
        assert found[limit, 1] == found[limit, 2]
        shares[limit] = []
        for _, target in found[limit, 1].values():
            labels = np.frombuffer(target, np.uint8)
            counts = np.bincount(labels[labels != IGNORE_LABEL], minlength=1)
            shares[limit].append(counts.max() / max(1, counts.sum()))
    full, mixed = (np.mean([share > 0.65 for share in shares[limit]]) for limit in (1.0, 0.6))
    assert full > 0.5 and mixed < full / 2
    # What is far from the limit at the first draw stays as it was drawn.
    mixed_at_once = [position for position, share in zip(found[1.0, 1], shares[1.0], strict=True) if share < 0.5]
    assert len(mixed_at_once) > 5
    assert all(found[0.6, 1][position] == found[1.0, 1][position] for position in mixed_at_once)
