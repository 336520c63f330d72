"""Evaluation: a network and a shard set in, scores out; every sample exactly once on any number of ranks."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fcn_dist.data.loader import Scene, build_scene_loader
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import EarlyEnd, UserError
from fcn_dist.model.fcn import FCN
from fcn_dist.model.upsampling import argmax_upsampled
from fcn_dist.model.views import Views, label_views
from fcn_dist.ranks import Rank
from fcn_dist.scoring.agreement import raise_together
from fcn_dist.scoring.metrics import ConfusionMatrix, Matrix, Scores, score

# What a rank without a sample left feeds the network: any image will do, its answer is dropped.
SPARE_IMAGE_SIZE = 32


def evaluate(
    model: FCN,
    shard_set: ShardSet,
    *,
    forward: Callable[..., Tensor] | None = None,
    rank: Rank | None = None,
    workers: int = 0,
    views: Views = Views(),  # noqa: B008 - frozen
    limit: int | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Scores:
    """Score `model` on every sample, or the first `limit` of the set, at its annotation's own resolution.

    With `views`, labels are those of several looks at each image, whose number may differ between ranks: not under
    ZeRO-3, where each takes part in all of them. `forward` is called in place of the model itself, for engines that
    wrap it. With `rank` of more than one process, torch.distributed must be initialised; all ranks return the same
    scores. `advance` is told of finished samples.

    Raises UserError, on all ranks alike, if the set's classes do not fit the network's outputs, or a sample is damaged:
    a score of fewer samples would be another score. EarlyEnd, likewise, if a loader process was killed.
    """
    rank = rank or Rank()
    forward = forward or model
    score_other = scores_other(model, shard_set)
    label_table = np.frombuffer(shard_set.label_rule(score_other).label_table, np.uint8)
    device = model.score_fr.weight.device
    matrix = ConfusionMatrix(len(shard_set.classes))
    scenes = np.zeros((scored(shard_set, limit), 2), np.int64)  # right and labelled pixels
    failures: list[UserError | EarlyEnd] = []
    with looking_only(model):
        for scene in rounds(shard_set, rank, workers, failures, limit):
            if scene is None:
                forward(spare_image(device), coarse=True)
                continue
            size = (scene.labels.shape[0], scene.labels.shape[1])
            outputs = best_outputs(model, forward, scene.image.to(device), size, views)
            scenes[scene.number] = matrix.update(scene.labels.numpy(), label_table[outputs.cpu().numpy()])
            advance(1)
    raise_together(failures[0] if failures else None, rank)
    counts, scenes = (sum_over_ranks(of_this_rank, rank, device) for of_this_rank in (matrix.counts, scenes))
    matrix.counts = counts
    return score(matrix, shard_set.classes, shard_set.split, scenes, len(shard_set), score_other)


@contextmanager
def looking_only(model: FCN) -> Iterator[None]:
    """`model` without dropout and gradients in the block, and after it in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: ZeRO-3 gathers weights into tensors that the next training step uses again.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def spare_image(device: torch.device) -> Tensor:
    """What a rank without a scene feeds the network where all ranks have to compute equally often."""
    return torch.zeros(1, SPARE_IMAGE_SIZE, SPARE_IMAGE_SIZE, 3, dtype=torch.uint8, device=device)


def scored(shard_set: ShardSet, limit: int | None) -> int:
    """How many samples are."""
    return len(shard_set) if limit is None else min(limit, len(shard_set))


def best_outputs(
    model: FCN, forward: Callable[..., Tensor], image_1HW3: Tensor, size: tuple[int, int], views: Views
) -> Tensor:
    """The output that wins at each pixel, (H, W) uint8."""
    if views.plain:
        return argmax_upsampled(forward(image_1HW3, coarse=True), size, model.stride, model.offset)[0]
    return label_views(partial(forward, coarse=True), image_1HW3, views, model.stride, model.offset)[0]


def rounds(
    shard_set: ShardSet, rank: Rank, workers: int, failures: list[UserError | EarlyEnd], limit: int | None = None
) -> Iterator[Scene | None]:
    """This rank's scenes, of the set's first `limit`, then None until every rank has had equally many.

    Under ZeRO-3 each forward gathers weights from all ranks: a rank that stopped early would leave the others
    waiting for ever. So an error of the loader is put into `failures`, and the rounds go on.
    """
    count, samples = 0, scored(shard_set, limit)
    try:
        for scene in build_scene_loader(shard_set, rank, workers, limit):
            yield scene
            count += 1
    except (UserError, EarlyEnd) as error:
        failures.append(error)
    for _ in range(count, math.ceil(samples / rank.world_size)):
        yield None


def scores_other(model: FCN, shard_set: ShardSet) -> bool:
    """Whether "other" is an output of `model`, which its number of outputs tells; UserError if it fits neither."""
    classes = len(shard_set.classes)
    if model.num_outputs not in (classes, classes + 1):
        raise UserError(
            f"the network has {model.num_outputs} outputs, but {shard_set.location} has {classes} classes; {classes} "
            f"outputs (or {classes + 1}, with label 0 as a class) are needed; give the shard set it was trained on"
        )
    return model.num_outputs == classes + 1


def check_classes(classes: tuple[str, ...], shard_set: ShardSet) -> None:
    """Raise UserError unless `classes`, those of a trained network, are the shard set's."""
    if classes == shard_set.classes:
        return
    if len(classes) != len(shard_set.classes):
        found = f"{len(classes)} classes, but {shard_set.location} has {len(shard_set.classes)}"
    else:
        pairs = zip(classes, shard_set.classes, strict=True)
        label, (ours, theirs) = next((i, p) for i, p in enumerate(pairs, start=1) if p[0] != p[1])
        found = f"class {label} {ours!r}, but in {shard_set.location} it is {theirs!r}"
    raise UserError(f"the network was trained on {found}; the same classes are needed; give the shard set it fits")


def sum_over_ranks(counts: Matrix, rank: Rank, device: torch.device) -> Matrix:
    """Of integers, so it is exact."""
    if rank.world_size == 1:
        return counts
    summed = torch.from_numpy(counts).to(device)
    dist.all_reduce(summed)
    found: Matrix = summed.cpu().numpy()
    return found
