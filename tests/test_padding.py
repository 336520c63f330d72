"""Padding end to end: scenes smaller than the crop, from files through shards, loader, augmentation and loss.

What is expected is counted in the annotation files; where a scene lies in its crop is read off the colours.
"""

import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from colour_scenes import Pixels, scene_of, write_colour_scenes
from launching import run_ranks
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from test_evaluate import network
from test_model import tiny
from torch.nn import functional as F

from fcn_dist.config import DataConfig
from fcn_dist.data.loader import Batch, build_loader
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.deploy.modelfile import write_model_file
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.model.views import Views
from fcn_dist.ranks import BatchPlan
from fcn_dist.scoring.evaluate import evaluate
from fcn_dist.training.augment import to_device

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

CROP = (41, 57)
LARGE_CROP = (160, 190)  # in which any scene has room at twice its size
# Smaller than CROP in both directions, in height alone, in width alone.
SIZES = ((33, 21), (5, 7), (40, 56), (23, 91), (75, 31), (1, 19), (41, 17))
GLOBAL_BATCH, SEED = 8, 6
EVALUATE = Path(__file__).resolve().parents[1] / "launch" / "evaluate.py"


class Packed(NamedTuple):
    scenes: Path
    shards: Path
    training: ShardSet
    validation: ShardSet


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    root = tmp_path_factory.mktemp("padding")
    splits = ("training", "validation")
    scenes = write_colour_scenes(root / "scenes", len(SIZES), splits, sizes=SIZES)
    training, validation = pack(scenes, root / "shards", splits, samples_per_shard=3, workers=1)
    return Packed(scenes, root / "shards", training, validation)


def annotation(packed: Packed, scene: int, split: str = "training") -> Pixels:
    """Raw labels, as the file has them."""
    labels = cv2.imread(str(packed.scenes / "annotations" / split / f"{split}_{scene:02d}.png"), cv2.IMREAD_UNCHANGED)
    assert labels is not None
    return np.asarray(labels, np.uint8)


def load(shard_set: ShardSet, ranks: int = 1, accumulation: int = 1, **options: object) -> list[Batch]:
    """All ranks' batches of three steps."""
    config = DataConfig(**{"crop": CROP, "workers": 0, **options})  # type: ignore[arg-type]
    plan = BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // ranks // accumulation, accumulation, ranks)
    stream = SampleStream(shard_set, SEED)
    return [b for rank in range(ranks) for b in build_loader(shard_set, stream, plan, config, rank, range(3))]


def mean_colour(packed: Packed) -> Pixels:
    """Of all pixels of the training images."""
    paths = sorted((packed.scenes / "images" / "training").glob("*.jpg"))
    pixels = np.concatenate([np.asarray(cv2.imread(str(path))).reshape(-1, 3) for path in paths])
    return np.asarray(np.rint(pixels.mean(axis=0)), np.uint8)[::-1]


def box_of(image: Pixels, fill: Pixels) -> tuple[slice, slice]:
    """The smallest rectangle that holds all pixels of another colour than `fill`."""
    rows, columns = np.nonzero((image != fill).any(-1))
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


def outside(box: tuple[slice, slice], size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.ones(size, bool)
    mask[box] = False
    return mask


@pytest.mark.parametrize("score_other", [False, True])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0)])
def test_outside_the_image_all_is_ignored_and_of_the_mean_colour(
    packed: Packed, scale: tuple[float, float], score_other: bool
) -> None:
    """In the image, targets are a part of the annotation or of its mirror image, resized by the nearest pixel."""
    fill, shift, whole, padded = mean_colour(packed), 0 if score_other else 1, 0, 0
    for batch in load(packed.training, scale=scale, score_other=score_other, workers=2):
        for image, target in zip(batch.images.numpy(), batch.targets.numpy(), strict=True):
            box = box_of(image, fill)
            padding = outside(box, CROP)
            assert (target[padding] == IGNORE_LABEL).all() and (image[padding] == fill).all()
            padded += bool(padding.any())
            mask = annotation(packed, scene_of(image, ~padding))
            if scale != (1.0, 1.0):
                height, width = target[box].shape
                if height == CROP[0] or width == CROP[1]:  # a part, of a size that pixels do not tell
                    continue
                mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
            raw = np.where(target[box] == IGNORE_LABEL, 0, target[box] + shift)
            windows = sliding_window_view(mask, raw.shape)
            assert any((windows == one).all((2, 3)).any() for one in (raw, raw[:, ::-1]))
            whole += windows.shape[:2] == (1, 1)
    assert whole > 5 and padded > 15


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (2, 4)])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("score_other", [False, True])
def test_the_labelled_pixels_of_a_global_batch_are_those_of_the_annotation_files(
    packed: Packed, factor: int, ranks: int, accumulation: int, score_other: bool
) -> None:
    """At twice its size, each pixel of an annotation stands for four."""
    batches = load(
        packed.training, ranks, accumulation, crop=LARGE_CROP, scale=(factor, factor), score_other=score_other
    )
    fill = mean_colour(packed)
    found, wanted = [0] * 3, [0] * 3
    for batch in batches:
        step = batch.positions[0] // GLOBAL_BATCH
        found[step] += batch.labelled
        for image in batch.images.numpy():
            mask = annotation(packed, scene_of(image, ~outside(box_of(image, fill), LARGE_CROP)))
            wanted[step] += factor**2 * (mask.size if score_other else int(np.count_nonzero(mask)))
    assert found == wanted


@pytest.mark.parametrize("geometry", ["same", "reference"])
@pytest.mark.parametrize("score_other", [False, True])
def test_loss_and_gradient_are_those_of_the_image_s_own_pixels(
    packed: Packed, geometry: str, score_other: bool
) -> None:
    """By torch's cross-entropy of full-size scores that are cut out of the crop; colours jittered, some mirrored."""
    fill = mean_colour(packed)
    model = tiny(4 + score_other, geometry=geometry)
    config = DataConfig(crop=CROP, scale=(0.5, 2.0), jitter=0.4, score_other=score_other)
    (batch, *_) = load(packed.training, scale=config.scale, score_other=score_other)
    images, targets = to_device(batch, config, SEED, torch.device("cpu"))
    boxes = [box_of(image, fill) for image in batch.images.numpy()]
    for image, box in zip(images.numpy(), boxes, strict=True):
        assert len(np.unique(image[outside(box, CROP)], axis=0)) <= 1  # jittered, the mean colour is one still

    loss = summed_cross_entropy(model(images, coarse=True), targets, model.stride, model.offset)
    found = torch.autograd.grad(loss, list(model.parameters()))
    own = torch.zeros(())
    for scores, target, (rows, columns) in zip(model(images), targets.long(), boxes, strict=True):
        inside, labels = scores[None, :, rows, columns], target[None, rows, columns]
        own = own + F.cross_entropy(inside, labels, ignore_index=IGNORE_LABEL, reduction="sum")
    wanted = torch.autograd.grad(own, list(model.parameters()))
    torch.testing.assert_close(loss, own)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def labels_in_files(packed: Packed) -> list[int]:
    """Pixels of each raw label in the validation annotations."""
    masks = [annotation(packed, scene, "validation") for scene in range(len(SIZES))]
    counts: list[int] = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=5).tolist()
    return counts


VIEWS = {
    "plain": Views(),
    "flip": Views(flip=True),
    "scales": Views(scales=(0.5, 1.0, 1.7), flip=True),
    "window": Views(window=128),  # larger than any scene
    "small window": Views(scales=(1.0, 1.5), window=32, overlap=0.4),
}


@pytest.mark.parametrize("geometry", ["same", "reference"])
@pytest.mark.parametrize("views", VIEWS)
def test_evaluation_counts_each_annotated_pixel_once_however_it_looks(
    packed: Packed, views: str, geometry: str
) -> None:
    model = tiny(4, geometry=geometry)
    matrix = evaluate(model, packed.validation, views=VIEWS[views]).confusion
    assert matrix.sum(axis=1).tolist() == labels_in_files(packed)
    assert matrix[:, 0].sum() == 0  # "other" is no output


def test_evaluation_counts_each_annotated_pixel_once_on_any_ranks(packed: Packed, tmp_path: Path) -> None:
    """Seven scenes on three ranks: two of them go without one in the last round."""
    model, shard_set = network(4), packed.validation
    description = ModelDescription(model.config, model.preprocessing, shard_set.classes, shard_set.colours, False)
    write_model_file(tmp_path / "m.safetensors", model.state_dict(), description, {})
    out = tmp_path / "scores.json"
    command = ["--model", str(tmp_path / "m.safetensors"), "--shards", str(packed.shards), "--json", str(out)]
    run_ranks(EVALUATE, [*command, "--flip", "--scales", "0.7", "1.3"], 3, tmp_path, 120)
    assert np.sum(json.loads(out.read_text())["confusion"], axis=1).tolist() == labels_in_files(packed)
