"""Damaged and hostile shards under the loader: what is delivered is right, the rest is listed, and nothing is silent.

Each kind of damage that tar readers pass over or fall for is made for real. `verify` is tested on its own.
"""

import io
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from colour_scenes import write_colour_scenes
from shard_surgery import plant, rewrite_records

from fcn_dist.config import DataConfig
from fcn_dist.data.crops import BadSample, CropReader, trained_samples
from fcn_dist.data.loader import Batch, build_loader, build_scene_loader
from fcn_dist.data.members import members_path
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shard import DamagedSample, read_members
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.errors import UserError
from fcn_dist.ranks import BatchPlan, Rank

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:This DataLoader will create")]

COUNT, SHARD, CROP, BATCH = 12, 4, (40, 56), 6
VICTIM = "training-000001.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    root = tmp_path_factory.mktemp("damage")
    scenes = write_colour_scenes(root / "scenes", COUNT)
    (shard_set,) = pack(scenes, root / "shards", ["training"], samples_per_shard=SHARD, workers=1)
    return shard_set


@pytest.fixture
def folder(sound: ShardSet, tmp_path: Path) -> Path:
    """A copy to damage, in a folder of its own, so that what would be written outside is seen."""
    shutil.copytree(sound.dir, tmp_path / "set" / "training")
    return tmp_path / "set" / "training"


def one_epoch(shard_set: ShardSet, budget: int, workers: int = 0) -> list[Batch]:
    plan = BatchPlan(BATCH, BATCH, 1, 1)
    config = DataConfig(crop=CROP, workers=workers, max_bad_samples=budget)
    return list(build_loader(shard_set, SampleStream(shard_set, 3), plan, config, 0, range(COUNT // BATCH)))


def by_position(batches: list[Batch]) -> dict[int, tuple[bytes, bytes]]:
    return {
        position: (batch.images[row].numpy().tobytes(), batch.targets[row].numpy().tobytes())
        for batch in batches
        for row, position in enumerate(batch.positions)
    }


def assert_nothing_silent(sound: ShardSet, folder: Path) -> list[BadSample]:
    """Each position has its own sample, or is listed; every damaged sample of the epoch is."""
    read_members.cache_clear()
    batches = one_epoch(ShardSet.open(folder), budget=100)
    found, expected = by_position(batches), by_position(one_epoch(sound, budget=0))
    bad = [bad for batch in batches for bad in batch.bad_samples]
    listed = {one.position for one in bad}
    assert found.keys() == expected.keys()
    for position, pair in found.items():
        assert position in listed or pair == expected[position]
    assert all(one.shard.endswith(VICTIM) and one.key and one.reason for one in bad)
    return bad


def member(path: Path, number: int) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmembers()[number]


def cut_inside_a_payload(path: Path) -> int:
    info = member(path, 2)
    path.write_bytes(path.read_bytes()[: info.offset_data + info.size // 2])
    return 3


def cut_between_image_and_mask(path: Path) -> int:
    path.write_bytes(path.read_bytes()[: member(path, 3).offset])
    return 3


def cut_between_samples(path: Path) -> int:
    path.write_bytes(path.read_bytes()[: member(path, 4).offset])
    return 2


def cut_in_a_header(path: Path) -> int:
    path.write_bytes(path.read_bytes()[: member(path, 4).offset + 100])
    return 2


def change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(data)


def flip_in_a_header(path: Path) -> int:
    change(path, member(path, 2).offset + 3)
    return 0  # where a tar reader loses the rest of the shard, nothing is lost: offsets lead to the payloads


def flip_in_an_image(path: Path) -> int:
    info = member(path, 2)
    change(path, info.offset_data + info.size // 2)
    return 1


def flip_in_a_mask(path: Path) -> int:
    info = member(path, 3)
    change(path, info.offset_data + info.size // 2)
    return 1


def empty(path: Path) -> int:
    path.write_bytes(b"")
    return SHARD


def garbage(path: Path) -> int:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
    return SHARD


def another_shard(path: Path) -> int:
    shutil.copy(path.with_name("training-000000.tar"), path)
    return SHARD


@pytest.mark.parametrize(
    "damage",
    [
        cut_inside_a_payload,
        cut_between_image_and_mask,
        cut_between_samples,
        cut_in_a_header,
        flip_in_a_header,
        flip_in_an_image,
        flip_in_a_mask,
        empty,
        garbage,
        another_shard,
    ],
)
def test_damage_is_listed_sample_by_sample_and_the_rest_is_right(
    sound: ShardSet, folder: Path, damage: Callable[[Path], int]
) -> None:
    damaged = damage(folder / VICTIM)
    bad = assert_nothing_silent(sound, folder)
    assert len({one.key for one in bad}) == damaged
    if damaged:
        with pytest.raises(DamagedSample, match=VICTIM):
            one_epoch(ShardSet.open(folder), budget=0)
        with pytest.raises(DamagedSample, match=VICTIM):
            list(build_scene_loader(ShardSet.open(folder), Rank(), 0))


def test_the_samples_of_a_batch_are_told_as_they_were_replaced(sound: ShardSet, folder: Path) -> None:
    """With the crops themselves as the witness: at its position, the told sample gives the delivered pixels."""
    garbage(folder / VICTIM)
    shard_set = ShardSet.open(folder)
    stream = SampleStream(shard_set, 3)
    reader = CropReader(sound, SampleStream(sound, 3), DataConfig(crop=CROP))
    batches = one_epoch(shard_set, budget=100)
    assert sum(len(batch.bad_samples) for batch in batches) > SHARD, "some replacement is damaged itself"
    for batch in batches:
        told = trained_samples(stream, batch.positions, batch.bad_samples)
        for row, (position, index) in enumerate(zip(batch.positions, told, strict=True)):
            image, target = np.empty((*CROP, 3), np.uint8), np.empty(CROP, np.uint8)
            reader._read(position, index, image, target)
            assert np.array_equal(image, batch.images[row].numpy())


def rewrite_tar(
    path: Path, order: Callable[[list[tuple[tarfile.TarInfo, bytes]]], list[tuple[tarfile.TarInfo, bytes]]]
) -> None:
    """The tar alone, with its members as `order` returns them; records and index stay."""
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, payload in order(members):
            tar.addfile(info, io.BytesIO(payload))


def link(name: str, target: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def foreign(name: str) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = 4
    return info, b"evil"


@pytest.mark.parametrize(
    "order",
    [
        lambda m: [*m[0::2], *m[1::2]],  # interleaved: all images, then all masks
        lambda m: [foreign("../../outside.jpg"), *m],
        lambda m: [foreign("/tmp/absolute.png"), *m],
        lambda m: [link("link.jpg", "/etc/passwd", tarfile.SYMTYPE), *m],
        lambda m: [link("hard.jpg", "../../x", tarfile.LNKTYPE), *m],
        lambda m: [foreign("evil.pkl"), foreign("evil.pth"), foreign("bomb.gz"), *m],
    ],
)
def test_members_that_readers_fall_for_are_never_looked_at(
    sound: ShardSet, folder: Path, order: Callable[[object], list[tuple[tarfile.TarInfo, bytes]]]
) -> None:
    rewrite_tar(folder / VICTIM, order)
    before = sorted(path for path in folder.parents[1].rglob("*"))
    bad = assert_nothing_silent(sound, folder)
    # The records do not fit the tar any more: what they point at is not what was packed, and is said to be damaged.
    assert bad
    assert sorted(path for path in folder.parents[1].rglob("*")) == before


# ---- hostile records, with digests that fit


@pytest.mark.parametrize("part", ["image", "mask"])
def test_a_record_that_claims_gigabytes_is_refused_without_asking_for_them(folder: Path, part: str) -> None:
    def claim(records: "np.ndarray[tuple[int], np.dtype[np.void]]") -> None:
        records[f"{part}_size"][1] = 2**32 - 1

    rewrite_records(folder, VICTIM, claim)
    shard_set = ShardSet.open(folder)
    index = SHARD + 1
    tracemalloc.start()
    try:
        with pytest.raises(DamagedSample, match=f"its {part} does not have the checksum"):
            shard_set.read(index)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_record_that_leads_out_of_its_shard_is_refused(folder: Path) -> None:
    def lead(records: "np.ndarray[tuple[int], np.dtype[np.void]]") -> None:
        records["image_offset"][1] = 2**63

    rewrite_records(folder, VICTIM, lead)
    with pytest.raises(DamagedSample, match="its image does not have the checksum"):
        ShardSet.open(folder).read(SHARD + 1)


def test_two_records_that_were_exchanged_are_no_pair_of_image_and_mask(sound: ShardSet, folder: Path) -> None:
    """Sizes differ between neighbours, so a mask of another scene is seen even where all checksums hold."""

    def exchange(records: "np.ndarray[tuple[int], np.dtype[np.void]]") -> None:
        for field in ("mask_offset", "mask_size", "mask_crc32"):
            records[field][0], records[field][1] = records[field][1], records[field][0]

    rewrite_records(folder, VICTIM, exchange)
    bad = assert_nothing_silent(sound, folder)
    assert len({one.key for one in bad}) == 2 and all("in its header" in one.reason for one in bad)


@pytest.mark.parametrize("key", ["../../outside", "/tmp/absolute", "a\nb", "\x1b[31mred", "é" * 40])
def test_a_hostile_key_is_only_ever_shown(folder: Path, key: str) -> None:
    def rename(records: "np.ndarray[tuple[int], np.dtype[np.void]]") -> None:
        records["key"][1] = key.encode()[: records.dtype["key"].itemsize]
        records["image_crc32"][1] ^= 1

    before = sorted(path for path in folder.parents[1].rglob("*"))
    rewrite_records(folder, VICTIM, rename)
    with pytest.raises(DamagedSample) as caught:
        ShardSet.open(folder).read(SHARD + 1)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert sorted(path for path in folder.parents[1].rglob("*")) == before


def test_an_image_bomb_is_refused_by_its_header(sound: ShardSet, folder: Path) -> None:
    def bomb(key: str, image: bytes, mask: bytes) -> tuple[bytes, bytes]:
        at = image.index(b"\xff\xc0")
        return image[: at + 5] + b"\xff\xff\xff\xff" + image[at + 9 :], mask

    plant(folder, bomb)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedSample, match="states 65535x65535 pixels in its header"):
            one_epoch(ShardSet.open(folder), budget=0)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_records_of_another_shard_are_refused(folder: Path) -> None:
    shutil.copy(members_path(folder / "training-000000.tar"), members_path(folder / VICTIM))
    read_members.cache_clear()
    with pytest.raises(UserError, match=r"training-000001\.members\.npy differs from its SHA-256"):
        one_epoch(ShardSet.open(folder), budget=100)


def test_the_checksums_of_records_are_those_of_the_payloads(sound: ShardSet) -> None:
    """An oracle by the tar itself, so that the tests above do not stand on checksums of nothing."""
    for shard in sound.shards:
        with tarfile.open(shard.path) as tar:
            sums = [crc32(tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
        records = read_members(shard)
        assert [int(v) for r in records for v in (r["image_crc32"], r["mask_crc32"])] == sums
