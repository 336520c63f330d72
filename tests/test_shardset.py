"""A shard set as it is read: single samples out, and what is said of one that is damaged."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeScenes

from fcn_dist.data.members import member_dtype
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shard import DamagedSample, read_members
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import UserError


@pytest.fixture
def packed(make_scenes: MakeScenes, tmp_path: Path) -> Path:
    pack(make_scenes(n=5), tmp_path / "out", workers=1, samples_per_shard=2, keep_order=True)
    return tmp_path / "out"


def test_every_sample_is_read_by_its_number(packed: Path) -> None:
    shard_set = ShardSet.open(packed, "training")
    assert len(shard_set) == 5
    assert [shard.num_samples for shard in shard_set.shards] == [2, 2, 1]
    scenes = packed.parent / "scenes"
    for i in range(5):
        sample = shard_set.read(i)
        assert sample.key == shard_set.key(i) == f"training_{i:04d}"
        assert sample.image == (scenes / f"images/training/{sample.key}.jpg").read_bytes()
        assert sample.mask == (scenes / f"annotations/training/{sample.key}.png").read_bytes()
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            shard_set.read(outside)


def test_a_split_can_be_opened_by_its_own_folder_and_moved(packed: Path, tmp_path: Path) -> None:
    shutil.move(packed / "validation", tmp_path / "elsewhere")
    shard_set = ShardSet.open(tmp_path / "elsewhere")
    assert shard_set.split == "validation"
    assert shard_set.read(4).key == "validation_0004"


def test_a_shard_set_survives_pickling_into_a_loader_process(packed: Path) -> None:
    shard_set = ShardSet.open(packed, "training")
    shard_set.read(0)
    assert pickle.loads(pickle.dumps(shard_set)).read(3) == shard_set.read(3)


@pytest.mark.parametrize("part", ["image", "mask"])
def test_one_flipped_bit_is_named_with_shard_and_key(packed: Path, part: str) -> None:
    shard_set = ShardSet.open(packed, "training")
    shard, record = shard_set.locate(3)
    data = bytearray(shard.path.read_bytes())
    data[int(record[f"{part}_offset"]) + int(record[f"{part}_size"]) // 2] ^= 1
    shard.path.write_bytes(bytes(data))
    shard_set.read(2)
    with pytest.raises(DamagedSample, match=rf"training-000001\.tar: sample 'training_0003': its {part} does not"):
        shard_set.read(3)


def test_a_shard_cut_short_is_damage_and_a_missing_one_is_named(packed: Path) -> None:
    shard_set = ShardSet.open(packed, "training")
    path = shard_set.shards[1].path
    path.write_bytes(path.read_bytes()[:2500])
    with pytest.raises(DamagedSample):
        shard_set.read(3)
    path.unlink()
    with pytest.raises(UserError, match=r"training-000001\.tar cannot be read \(No such file"):
        shard_set.read(3)


def _rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return rewrite


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text("{"), "is not JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda path: path.write_text("[]"), "__kind__ None"),
        (_rewrite(lambda i: i.update(format_version=1)), "format_version 1"),
        (_rewrite(lambda i: i.pop("classes")), "'classes'"),
        (_rewrite(lambda i: i.update(num_samples=6)), "num_samples 6"),
        (_rewrite(lambda i: i["shardlist"][0].update(url="../validation/validation-000000.tar")), "not the name"),
        (_rewrite(lambda i: i["shardlist"][0].update(url="/etc/passwd")), "not the name"),
        (_rewrite(lambda i: i["shardlist"].__setitem__(1, i["shardlist"][0])), "listed twice"),
        (_rewrite(lambda i: i["classes"].append("more")), "5 colours for 6 classes"),
        (_rewrite(lambda i: i["class_pixels"].pop()), "5 class_pixels for 5 classes"),
        (_rewrite(lambda i: i.update(channel_mean=[1, 2])), "lacks or misstates"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(packed: Path, damage: Callable[[Path], object], words: str) -> None:
    path = packed / "training" / "index.json"
    damage(path)
    with pytest.raises(UserError, match=words) as caught:
        ShardSet.open(packed, "training")
    assert str(path) in str(caught.value)


def test_a_folder_without_an_index_says_which_splits_there_are(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has the splits training, validation"):
        ShardSet.open(packed)
    with pytest.raises(UserError, match=r"make one with shards/create\.py"):
        ShardSet.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"garbage"),
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        lambda path: np.save(path, np.zeros(2, member_dtype(8))[:1]),
        lambda path: np.save(path, np.zeros(2)),
        lambda path: np.save(path, np.array([{"key": 1}] * 2), allow_pickle=True),
    ],
)
def test_member_records_that_cannot_be_used_are_named(packed: Path, damage: Callable[[Path], object]) -> None:
    shard_set = ShardSet.open(packed, "training")
    damage(shard_set.shards[0].members_path)
    read_members.cache_clear()
    with pytest.raises(UserError, match=r"training-000000\.members\.npy .*restore it, or pack"):
        shard_set.read(0)
