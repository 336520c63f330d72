"""Scenes to shards: what is kept byte for byte, what is converted, and what any reader gets."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import HEIGHT, WIDTH, MakeScenes, pixels, save_oriented, smooth, tree_bytes

from fcn_dist.data.packing import run as packing
from fcn_dist.data.packing.run import pack
from fcn_dist.data.pixel_counts import PixelCounts
from fcn_dist.data.scenes.listing import Pair, Problem, find_pairs
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import UserError

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(REPO / "shards" / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def by_key(shard_set: ShardSet) -> dict[str, tuple[bytes, bytes]]:
    samples = [shard_set.read(i) for i in range(len(shard_set))]
    return {sample.key: (sample.image, sample.mask) for sample in samples}


# --- what is packed as it is ---------------------------------------------------------------------------------


def test_ordinary_files_are_packed_byte_for_byte(make_scenes: MakeScenes, out: Path) -> None:
    scenes = make_scenes(n=5)
    for shard_set in pack(scenes, out, workers=1):
        samples = by_key(shard_set)
        assert len(samples) == 5
        for key, (image, mask) in samples.items():
            assert image == (scenes / "images" / shard_set.split / f"{key}.jpg").read_bytes()
            assert mask == (scenes / "annotations" / shard_set.split / f"{key}.png").read_bytes()
        assert shard_set.created_by["conversions"] == {}


def test_scenes_far_larger_and_smaller_than_a_crop_are_packed_as_they_are(make_scenes: MakeScenes, out: Path) -> None:
    """The benchmark has squares up to 2100 pixels, and 817 training images with a short side under 224."""
    large = make_scenes(n=1, size=(2100, 2100), splits=("training",), name="large")
    small = make_scenes(n=1, size=(7, 300), splits=("training",), name="small")
    for scenes, size in ((large, (2100, 2100)), (small, (7, 300))):
        (shard_set,) = pack(scenes, out / scenes.name, ("training",), workers=1)
        _, member = shard_set.locate(0)
        assert (member["height"], member["width"]) == size
        assert pixels(shard_set.read(0).mask).shape == size
        assert sum(shard_set.class_pixels) == size[0] * size[1]


def test_the_plain_webdataset_reader_and_tar_read_every_sample(make_scenes: MakeScenes, out: Path) -> None:
    import webdataset  # slow to import

    scenes = make_scenes(n=5)
    stem = "über.v2 街 " + "x" * 120 + "%"
    for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
        folder = scenes / kind / "training"
        (folder / f"training_0000{suffix}").rename(folder / f"{stem}{suffix}")
    shard_set, _ = pack(scenes, out, workers=1, samples_per_shard=3)
    found = {}
    for shard in shard_set.shards:
        listed = subprocess.run(
            ["tar", "tf", shard.path], capture_output=True, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"}
        )
        assert listed.stdout.count(b"\n") == 2 * shard.num_samples
        for sample in webdataset.WebDataset(str(shard.path), shardshuffle=False).decode("rgb8"):
            assert {"jpg", "png"} <= sample.keys()
            found[sample["__key__"]] = sample["jpg"], sample["png"]
    assert set(found) == {stem.replace("%", "%25").replace(".", "%2E")} | {f"training_{i:04d}" for i in range(1, 5)}
    for key, (image, mask) in found.items():
        name = key.replace("%2E", ".").replace("%25", "%")
        assert np.array_equal(image, pixels(scenes / "images" / "training" / f"{name}.jpg"))
        assert np.array_equal(mask[..., 0], pixels(scenes / "annotations" / "training" / f"{name}.png"))


def test_member_records_point_at_the_payloads_that_tarfile_finds(make_scenes: MakeScenes, out: Path) -> None:
    scenes = make_scenes(n=3)
    folder = scenes / "images" / "training"
    (folder / "training_0001.jpg").rename(folder / f"{'ü' * 60}.jpg")
    folder = scenes / "annotations" / "training"
    (folder / "training_0001.png").rename(folder / f"{'ü' * 60}.png")
    shard_set, _ = pack(scenes, out, workers=1)
    with tarfile.open(shard_set.shards[0].path) as tar:
        infos = {info.name: info for info in tar}
    assert len(infos) == 6
    for i in range(3):
        _, record = shard_set.locate(i)
        for part, suffix in (("image", ".jpg"), ("mask", ".png")):
            info = infos[shard_set.key(i) + suffix]
            assert (record[f"{part}_offset"], record[f"{part}_size"]) == (info.offset_data, info.size)
        assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
        assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)


# --- the set as a whole --------------------------------------------------------------------------------------


def test_the_same_scenes_give_the_same_bytes_with_any_number_of_workers(
    make_scenes: MakeScenes, tmp_path: Path
) -> None:
    scenes = make_scenes(n=11)
    save_oriented(scenes / "images/training/training_0003.jpg", smooth(WIDTH, HEIGHT), 6)
    for name, workers in (("one", 1), ("two", 2), ("five", 5)):
        pack(scenes, tmp_path / name, workers=workers, samples_per_shard=3)
    one = tree_bytes(tmp_path / "one")
    assert len(one) == 2 * (4 * 2 + 1)
    assert one == tree_bytes(tmp_path / "two") == tree_bytes(tmp_path / "five")
    assert str(tmp_path).encode() not in b"".join(one.values())


def test_order_is_drawn_from_the_seed_or_kept(make_scenes: MakeScenes, tmp_path: Path) -> None:
    scenes = make_scenes(n=12)
    orders = {}
    for name, options in {"0": {}, "1": {"seed": 1}, "kept": {"keep_order": True}}.items():
        shard_set, _ = pack(scenes, tmp_path / name, workers=1, samples_per_shard=5, **options)  # type: ignore[arg-type]
        orders[name] = [shard_set.key(i) for i in range(len(shard_set))]
        assert [shard.num_samples for shard in shard_set.shards] == [5, 5, 2]
    assert orders["kept"] == sorted(orders["0"]) == sorted(orders["1"])
    assert len({tuple(order) for order in orders.values()}) == 3


def test_the_index_states_what_the_pixels_add_up_to(make_scenes: MakeScenes, out: Path) -> None:
    scenes = make_scenes(n=7)
    shard_set, _ = pack(scenes, out, workers=2, samples_per_shard=2)
    samples = by_key(shard_set).values()
    masks = np.stack([pixels(mask) for _, mask in samples])
    images = np.stack([pixels(image) for image, _ in samples]).astype(np.float64)
    assert list(shard_set.class_pixels) == np.bincount(masks.ravel(), minlength=6).tolist()
    assert list(shard_set.class_images) == [int((masks == label).any((1, 2)).sum()) for label in range(6)]
    assert np.allclose(shard_set.channel_mean, images.mean((0, 1, 2)), atol=0.05)
    assert np.allclose(shard_set.channel_std, images.std((0, 1, 2)), atol=0.05)
    assert shard_set.classes == tuple(f"class {i}" for i in range(1, 6))
    index = json.loads((out / "training" / "index.json").read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    assert index["label_rule"] == {"other": 0, "first": 1, "last": 5}
    assert [s["url"] for s in index["shardlist"]] == [f"training-{i:06d}.tar" for i in range(4)]


def test_large_images_are_counted_exactly() -> None:
    counts = PixelCounts.zero(1)
    big = np.zeros((4201, 4100), np.uint8)  # an odd count above 2**24 is no float32
    big[:, 0] = 1
    image = np.empty((4201, 4100, 3), np.uint8)
    image[:] = 255, 254, 1
    image[5, 7] = 0, 1, 2
    counts.add_pair(image, big)
    assert counts.class_pixels.tolist() == [4201 * 4099, 4201]
    rest = 4201 * 4100 - 1
    assert counts.channel_sums.tolist() == [255 * rest, 254 * rest + 1, rest + 2]
    assert counts.channel_squares.tolist() == [255**2 * rest, 254**2 * rest + 1, rest + 4]


def test_what_is_there_is_not_replaced_unless_told(make_scenes: MakeScenes, out: Path) -> None:
    scenes = make_scenes(n=4)
    pack(scenes, out, workers=1, samples_per_shard=1)
    before = tree_bytes(out)
    with pytest.raises(UserError, match=r"already holds a shard set.*--overwrite"):
        pack(scenes, out, workers=1)
    assert tree_bytes(out) == before
    pack(scenes, out, workers=1, samples_per_shard=4, overwrite=True)
    assert sorted(p.name for p in (out / "training").iterdir()) == [
        "index.json",
        "training-000000.members.npy",
        "training-000000.tar",
    ]


def test_leftovers_of_a_killed_run_are_replaced_and_foreign_files_kept(make_scenes: MakeScenes, out: Path) -> None:
    folder = out / "training"
    folder.mkdir(parents=True)
    ours = [".training-000000.tar.17.partial", "training-000009.tar", "training-000009.members.npy"]
    for name in (*ours, "notes.txt", "other-000000.tar"):
        (folder / name).write_text("x")
    pack(make_scenes(n=2), out, workers=1)
    assert not any((folder / name).exists() for name in ours)
    assert (folder / "notes.txt").exists()
    assert (folder / "other-000000.tar").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        lambda path: path.write_bytes(path.read_bytes()[::-1]),
        lambda path: os.utime(path, ns=(1, 1)),
    ],
)
def test_a_file_that_changes_while_the_set_is_packed_is_noticed(
    make_scenes: MakeScenes, out: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    scenes = make_scenes(n=3)

    def list_then_change(scenes_dir: Path, split: str) -> tuple[list[Pair], list[Problem]]:
        found = find_pairs(scenes_dir, split)
        change(scenes / "images/training/training_0001.jpg")
        return found

    monkeypatch.setattr(packing, "find_pairs", list_then_change)
    with pytest.raises(UserError, match=r"training_0001\.jpg: changed file"):
        pack(scenes, out, ("training",), workers=1)
    assert not out.exists()


def test_all_problems_come_out_and_sound_shards_are_kept(make_scenes: MakeScenes, out: Path) -> None:
    scenes = make_scenes(n=6, splits=("training",))
    for number in (2, 3, 4):
        path = scenes / f"images/training/training_000{number}.jpg"
        path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(UserError) as caught:
        pack(scenes, out, ("training",), workers=2, samples_per_shard=2, keep_order=True)
    for words in (
        "1 of 3 shards are finished and kept",
        "3 problems",
        "training_0002",
        "training_0003",
        "training_0004",
    ):
        assert words in str(caught.value)
    assert sorted(p.name for p in (out / "training").glob("training*")) == [
        "training-000000.members.npy",
        "training-000000.tar",
    ]


def test_a_refusal_leaves_no_folder_that_was_not_there(make_scenes: MakeScenes, tmp_path: Path) -> None:
    """Folders that packing has made go with it, those that were there stay."""
    scenes = make_scenes(n=1, splits=("training",))
    (scenes / "images/training/training_0000.jpg").write_bytes(b"no image")
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="0 of 1 shards"):
        pack(scenes, tmp_path / "a" / "b" / "c", ("training",), workers=1)
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples_per_shard": 0}, "--samples-per-shard is 0"),
        ({"short_side": 0}, "--short-side is 0"),
        ({"quality": 101}, "--quality is 101"),
        ({"shard_size": 0}, "--shard-size is 0"),
        ({"shard_size": 1, "samples_per_shard": 1}, "--samples-per-shard is 1 and --shard-size 1; one of them"),
        ({"part": (0, 2)}, "--part is 0/2"),
        ({"part": (3, 2)}, "--part is 3/2"),
        ({"workers": 0}, "--workers is 0"),
        ({"max_pixels": 0}, "--max-pixels is 0"),
        ({"splits": ()}, "the splits are none"),
        ({"splits": ("training", "training")}, "each once"),
    ],
)
def test_options_out_of_range_are_refused(
    make_scenes: MakeScenes, out: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        pack(make_scenes(n=1), out, **options)  # type: ignore[arg-type]


def test_shards_are_not_written_among_the_scenes(make_scenes: MakeScenes) -> None:
    scenes = make_scenes(n=1)
    with pytest.raises(UserError, match="lies within the scenes' images"):
        pack(scenes, scenes / "images", workers=1)


# --- the command ---------------------------------------------------------------------------------------------


def test_the_command_packs_and_says_what_it_did(make_scenes: MakeScenes, out: Path) -> None:
    scenes = make_scenes(n=3)
    save_oriented(scenes / "images/training/training_0002.jpg", smooth(WIDTH, HEIGHT), 6)
    done = run("create", scenes, out, "--split", "training", "--samples-per-shard", 2, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for words in ("training", "1 x turned upright by its orientation tag: training_0002", "3 samples in"):
        assert words in done.stdout
    assert len(ShardSet.open(out, "training")) == 3


def test_the_command_exits_2_with_one_message(make_scenes: MakeScenes, out: Path) -> None:
    scenes = make_scenes(n=3)
    (scenes / "annotations/training/training_0001.png").unlink()
    done = run("create", scenes, out)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "images/training/training_0001.jpg: image without mask" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


@pytest.mark.real_data
def test_the_real_scenes_are_packed_byte_for_byte(shared_data: Path, out: Path) -> None:
    scenes = shared_data / "ade20k"
    for shard_set, expected in zip(pack(scenes, out), (11, 21), strict=True):
        assert len(shard_set) == expected
        assert len(shard_set.classes) == 150
        assert shard_set.colours[0] == (120, 120, 120)
        assert not shard_set.created_by["conversions"]
        for key, (image, mask) in by_key(shard_set).items():
            assert image == (scenes / "images" / shard_set.split / f"{key}.jpg").read_bytes()
            assert mask == (scenes / "annotations" / shard_set.split / f"{key}.png").read_bytes()
