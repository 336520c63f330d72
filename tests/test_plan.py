"""Which pair goes into which shard, by number and by size."""

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MakeScenes, smooth
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fcn_dist.commands.create import main
from fcn_dist.data.packing.plan import PackOptions, Part, plan_shards
from fcn_dist.data.packing.run import pack
from fcn_dist.data.scenes.listing import Pair, SourceFile
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import UserError


def pairs(sizes: list[int]) -> list[Pair]:
    return [
        Pair(f"{n:03d}", SourceFile(Path(f"{n:03d}.jpg"), size, n), SourceFile(Path(f"{n:03d}.png"), size // 7, n))
        for n, size in enumerate(sizes)
    ]


@given(st.lists(st.integers(0, 60_000), min_size=1, max_size=40), st.integers(1, 300_000), st.booleans())
def test_every_pair_stands_in_one_shard_and_none_could_take_the_next(
    sizes: list[int], shard_size: int, keep_order: bool
) -> None:
    options = PackOptions(shard_size=shard_size, keep_order=keep_order)
    plan = plan_shards("training", pairs(sizes), options, options.rules(5))
    keys = [pair.key for shard in plan for pair in shard.pairs]
    assert sorted(keys) == [pair.key for pair in pairs(sizes)]
    assert not keep_order or keys == sorted(keys)
    limit = shard_size // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 1024
    for shard, following in zip(plan, [*plan[1:], None], strict=True):
        assert shard.num_bytes <= limit or len(shard.pairs) == 1
        if following:
            (first, *_) = following.pairs
            assert shard.num_bytes + replace(following, pairs=(first,)).num_bytes > limit


def test_shards_are_as_large_as_asked_for_and_names_of_any_length_fit(make_scenes: MakeScenes, tmp_path: Path) -> None:
    scenes = make_scenes(n=12, splits=("training",), size=(60, 90))
    for number, stem in enumerate(["x" * 200, "街" * 80, "a." * 90]):
        for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
            path = scenes / kind / "training" / f"training_{number:04d}{suffix}"
            path.rename(path.with_name(stem + suffix))
    (shard_set,) = pack(scenes, tmp_path / "out", ("training",), workers=1, shard_size=30_000)
    assert len(shard_set.shards) > 2
    assert all(shard.size <= 30_000 for shard in shard_set.shards)
    assert all(shard.size > 15_000 for shard in shard_set.shards[:-1])
    assert shard_set.created_by["options"]["shard_size"] == 30_000
    assert shard_set.created_by["options"]["samples_per_shard"] is None


def test_a_pair_larger_than_a_shard_has_one_alone(make_scenes: MakeScenes, tmp_path: Path) -> None:
    (shard_set,) = pack(make_scenes(n=3, splits=("training",)), tmp_path, ("training",), workers=1, shard_size=1)
    assert [shard.num_samples for shard in shard_set.shards] == [1, 1, 1]


def test_the_command_takes_sizes_as_people_write_them(
    make_scenes: MakeScenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = make_scenes(n=6, splits=("training",))
    main([str(scenes), str(tmp_path / "out"), "--split", "training", "--shard-size", "20kB"])
    assert ShardSet.open(tmp_path / "out", "training").created_by["options"]["shard_size"] == 20_000
    for words in (["--shard-size", "20", "--samples-per-shard", "3"], ["--shard-size", "much"], ["--shard-size", ""]):
        with pytest.raises(UserError, match="size"):
            main([str(scenes), str(tmp_path / "other"), *words])


@pytest.mark.parametrize(
    "change",
    [
        lambda pair: pair._replace(key="other"),
        lambda pair: pair._replace(image=pair.image._replace(size=1)),
        lambda pair: pair._replace(mask=pair.mask._replace(size=1)),
    ],
)
def test_what_decides_the_bytes_decides_what_a_shard_is_called(change: "object") -> None:
    options = PackOptions(samples_per_shard=4, keep_order=True)
    before = plan_shards("training", pairs([100] * 8), options, options.rules(5))
    changed = pairs([100] * 8)
    changed[5] = change(changed[5])  # type: ignore[operator]
    after = plan_shards("training", changed, options, options.rules(5))
    assert after[0] == before[0]
    assert after[1].content != before[1].content and after[1].inputs != before[1].inputs


def test_times_decide_only_whether_a_finished_shard_is_kept() -> None:
    options = PackOptions(keep_order=True)
    (before,) = plan_shards("training", pairs([100, 100]), options, options.rules(5))
    touched = [pair._replace(mask=pair.mask._replace(mtime_ns=99)) for pair in pairs([100, 100])]
    (after,) = plan_shards("training", touched, options, options.rules(5))
    assert after.content == before.content
    assert after.inputs != before.inputs


def test_parts_share_the_shards_among_them() -> None:
    for total in (1, 2, 5):
        owners = [[part for part in range(1, total + 1) if Part.of(part, total).has(number)] for number in range(12)]
        assert all(len(of_one) == 1 for of_one in owners)
    with pytest.raises(UserError, match="--part is 2/1"):
        Part.of(2, 1)


def test_a_source_file_larger_than_any_image_is_refused_unread(make_scenes: MakeScenes, tmp_path: Path) -> None:
    scenes = make_scenes(n=2, splits=("training",))
    image = scenes / "images/training/training_0001.jpg"
    Image.fromarray(smooth()).save(image)
    with image.open("ab") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    with pytest.raises(UserError, match=r"training_0001\.jpg: file too large"):
        pack(scenes, tmp_path / "out", ("training",), workers=1, max_pixels=1000)
