"""Batches: the same for every position whatever the ranks, workers, cuts and shards; and damage is named."""

import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from colour_scenes import Pixels, away_from_edges, labels_of, scene_of, scene_sizes, write_colour_scenes
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_dist.config import DataConfig
from fcn_dist.data.loader import Batch, build_loader, build_scene_loader
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.errors import UserError
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.ranks import BatchPlan, Rank

# Three workers on a small machine are meant.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

COUNT = 13
SEED = 4
CROP = (40, 56)
GLOBAL_BATCH = 6
STEPS = range(0, 7)  # 42 positions: three epochs and a part


class Packed(NamedTuple):
    scenes: Path
    sets: dict[int, ShardSet]  # by samples a shard


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    root = tmp_path_factory.mktemp("loader")
    scenes = write_colour_scenes(root / "scenes", COUNT)
    sets = {}
    for size in (1, 4, 100):
        (sets[size],) = pack(scenes, root / f"shards{size}", ["training"], samples_per_shard=size, workers=1)
    return Packed(scenes, sets)


def load(
    shard_set: ShardSet,
    world_size: int = 1,
    accumulation: int = 1,
    workers: int = 0,
    steps: range = STEPS,
    score_other: bool = True,
    scale: tuple[float, float] = (0.6, 1.6),
    window: int | None = None,
    lanes: int = 1,
) -> list[list[Batch]]:
    """Every rank's batches."""
    plan = BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // world_size // accumulation, accumulation, world_size, lanes)
    config = DataConfig(crop=CROP, scale=scale, score_other=score_other, workers=workers)
    stream = SampleStream(shard_set, SEED, window=window, lanes=lanes)
    return [list(build_loader(shard_set, stream, plan, config, rank, steps)) for rank in range(world_size)]


def by_position(ranks: list[list[Batch]], steps: range | None = None) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Images and targets of all positions, or of those of `steps`."""
    found = {}
    for batch in (batch for batches in ranks for batch in batches):
        for row, position in enumerate(batch.positions):
            assert position not in found
            if steps is None or position // GLOBAL_BATCH in steps:
                found[position] = (batch.images[row], batch.targets[row])
    return found


def assert_same(
    one: dict[int, tuple[torch.Tensor, torch.Tensor]], other: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    assert one.keys() == other.keys()
    for position, (image, target) in one.items():
        assert torch.equal(image, other[position][0]) and torch.equal(target, other[position][1])


@pytest.fixture(scope="module")
def reference(packed: Packed) -> list[Batch]:
    """One rank, one shard, loaded in this process."""
    return load(packed.sets[100])[0]


def test_a_batch_is_two_byte_tensors_of_the_crop_s_size(reference: list[Batch]) -> None:
    assert len(reference) == len(STEPS)
    for step, batch in enumerate(reference):
        assert batch.images.shape == (GLOBAL_BATCH, *CROP, 3) and batch.images.dtype == torch.uint8
        assert batch.targets.shape == (GLOBAL_BATCH, *CROP) and batch.targets.dtype == torch.uint8
        assert batch.positions == tuple(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        assert batch.labelled == sum(int(v) != IGNORE_LABEL for v in batch.targets.flatten())


@pytest.mark.parametrize(
    ("world_size", "accumulation", "workers", "samples_per_shard"),
    [(1, 1, 1, 1), (1, 6, 3, 4), (2, 1, 3, 1), (2, 3, 0, 4), (3, 2, 1, 100), (3, 1, 3, 4), (6, 1, 0, 1)],
)
def test_a_position_is_the_same_bytes_on_any_ranks_workers_cuts_and_shards(
    packed: Packed,
    reference: list[Batch],
    world_size: int,
    accumulation: int,
    workers: int,
    samples_per_shard: int,
) -> None:
    ranks = load(packed.sets[samples_per_shard], world_size, accumulation, workers)
    assert_same(by_position(ranks), by_position([reference]))
    assert [len(batches) for batches in ranks] == [len(STEPS) * accumulation] * world_size
    for rank, batches in enumerate(ranks):
        # In the order of the steps, whichever worker was quickest.
        starts = [batch.positions[0] for batch in batches]
        assert starts == sorted(starts)
        assert all((start % GLOBAL_BATCH) // (GLOBAL_BATCH // world_size) == rank for start in starts)


@given(
    st.sampled_from([1, 4, 100]),
    st.sampled_from([(None, 1), (1, 1), (2, 1), (3, 2), (None, 2), (6, 6), (None, 3)]),
    st.sampled_from([(r, a) for r in (1, 2, 3, 6) for a in (1, 2, 3, 6) if GLOBAL_BATCH % (r * a) == 0]),
    st.integers(0, 5),
)
@settings(max_examples=40)
def test_any_cut_of_any_window_and_lanes_gives_the_same_bytes_from_any_step(
    packed: Packed, samples_per_shard: int, locality: tuple[int | None, int], cut: tuple[int, int], first: int
) -> None:
    (window, lanes), (world_size, accumulation) = locality, cut
    steps = range(first, first + 2)
    shard_set = packed.sets[samples_per_shard]
    found = by_position(load(shard_set, world_size, accumulation, steps=steps, window=window, lanes=lanes))
    assert_same(found, by_position(load(shard_set, steps=range(7), window=window, lanes=lanes), steps))


@pytest.mark.parametrize("workers", [0, 3])
def test_resuming_in_the_middle_of_an_epoch_goes_on_exactly_where_it_stopped(
    packed: Packed, reference: list[Batch], workers: int
) -> None:
    resumed = load(packed.sets[4], workers=workers, steps=range(3, STEPS.stop))[0]
    assert_same(by_position([resumed]), by_position([reference[3:]]))


def test_no_steps_are_no_batches(packed: Packed) -> None:
    assert load(packed.sets[4], workers=2, steps=range(5, 5)) == [[]]


def test_each_scene_is_trained_once_an_epoch_by_what_its_pixels_say(reference: list[Batch]) -> None:
    found = []
    for image, target in by_position([reference]).values():
        inside = target.numpy() != IGNORE_LABEL
        found.append(scene_of(image.numpy(), inside))
    for epoch in range(3):
        assert sorted(found[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))
    assert found[:COUNT] != found[COUNT : 2 * COUNT]


def test_an_epoch_s_samples_are_augmented_anew(reference: list[Batch]) -> None:
    pairs = by_position([reference])
    crops: dict[int, list[bytes]] = {}
    for image, target in pairs.values():
        crops.setdefault(scene_of(image.numpy(), target.numpy() != IGNORE_LABEL), []).append(image.numpy().tobytes())
    assert sum(len(set(images)) == len(images) for images in crops.values()) >= COUNT - 1


@pytest.mark.parametrize("score_other", [False, True])
def test_targets_are_what_the_colours_say_and_padding_is_ignored(packed: Packed, score_other: bool) -> None:
    fill = torch.tensor(packed.sets[100].channel_mean).round().to(torch.uint8).numpy()
    compared = padded = 0
    for image, target in by_position(load(packed.sets[100], score_other=score_other)).values():
        pixels, targets = image.numpy(), target.numpy()
        is_padding = (pixels == fill).all(-1)
        assert (targets[is_padding] == IGNORE_LABEL).all()
        labels: Pixels = labels_of(pixels)
        expected = labels if score_other else np.where(labels == 0, IGNORE_LABEL, labels - 1).astype(np.uint8)
        marked = np.where(is_padding, 99, targets).astype(np.uint8)
        sure = away_from_edges(marked, 3) & ~is_padding
        assert (targets[sure] == expected[sure]).all()
        compared, padded = compared + int(sure.sum()), padded + int(is_padding.sum())
    assert compared > 20_000 and padded > 5_000


def test_a_scene_smaller_than_the_crop_is_shown_whole_and_the_rest_is_ignored(packed: Packed) -> None:
    sizes = scene_sizes(COUNT)
    for image, target in by_position(load(packed.sets[100], scale=(1.0, 1.0))).values():
        inside = target.numpy() != IGNORE_LABEL
        height, width = sizes[scene_of(image.numpy(), inside)]
        assert inside.sum() == min(height, CROP[0]) * min(width, CROP[1])


def test_padding_is_no_class_even_where_all_255_are_taken(tmp_path: Path) -> None:
    # Label 255 is then a class of its own, and only its target tells it from IGNORE_LABEL.
    scenes = write_colour_scenes(tmp_path / "scenes", 4, num_classes=255)
    (shard_set,) = pack(scenes, tmp_path / "shards", ["training"], workers=1)
    for _, target in by_position(load(shard_set, score_other=False, steps=range(2))).values():
        assert set(target.flatten().tolist()) <= {0, 1, 2, 3, IGNORE_LABEL}


# ---- damage


@pytest.fixture
def damaged(packed: Packed, tmp_path: Path) -> tuple[ShardSet, str, str]:
    """A copy of a set of several shards with one byte of one image flipped; the shard's name and the key."""
    folder = tmp_path / "training"
    shutil.copytree(packed.sets[4].dir, folder)
    path = sorted(folder.glob("*.tar"))[1]
    with tarfile.open(path) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".jpg"))
    data = bytearray(path.read_bytes())
    data[member.offset_data + member.size // 2] ^= 0x10
    path.write_bytes(data)
    return ShardSet.open(folder), path.name, member.name.removesuffix(".jpg")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_flipped_byte_stops_training_with_the_shard_and_the_key(
    damaged: tuple[ShardSet, str, str], workers: int
) -> None:
    shard_set, shard, key = damaged
    with pytest.raises(UserError) as caught:
        load(shard_set, workers=workers)
    assert shard in str(caught.value) and repr(key) in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_byte_stops_evaluation_with_the_shard_and_the_key(
    damaged: tuple[ShardSet, str, str], workers: int
) -> None:
    shard_set, shard, key = damaged
    with pytest.raises(UserError) as caught:
        list(build_scene_loader(shard_set, Rank(), workers))
    assert shard in str(caught.value) and repr(key) in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_gone_is_named(packed: Packed, tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "training"
    shutil.copytree(packed.sets[4].dir, folder)
    path = sorted(folder.glob("*.tar"))[2]
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        load(ShardSet.open(folder), workers=workers)


# ---- evaluation


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 0), (2, 1), (3, 2), (COUNT + 4, 1)])
def test_evaluation_sees_every_scene_once_over_all_ranks(packed: Packed, world_size: int, workers: int) -> None:
    shares = [
        [scene.key for scene in build_scene_loader(packed.sets[4], Rank(rank, world_size), workers)]
        for rank in range(world_size)
    ]
    assert Counter(key for share in shares for key in share) == {f"training_{n:02d}": 1 for n in range(COUNT)}
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_evaluation_sees_scenes_at_their_own_size_with_their_raw_labels(packed: Packed) -> None:
    for key, image, labels, number in build_scene_loader(packed.sets[4], Rank(), 0):
        assert key == packed.sets[4].key(number)
        annotation = cv2.imread(str(packed.scenes / "annotations" / "training" / f"{key}.png"), cv2.IMREAD_UNCHANGED)
        picture = cv2.imread(str(packed.scenes / "images" / "training" / f"{key}.jpg"), cv2.IMREAD_COLOR)
        assert annotation is not None and picture is not None
        assert (labels.numpy() == annotation).all()
        assert image.shape == (1, *annotation.shape, 3)
        assert (image[0].numpy() == picture[..., ::-1]).all()
