"""What RUN/predictions holds of the last evaluation: its scores with the confusion matrix, and a few scenes to look at.

Which scenes they are is known only once all are scored, so those few are predicted again, spread over the ranks.

    RUN/predictions/evaluation.json             written last; names the pictures, whose folder has the step's name
    RUN/predictions/step-00000260/worst-1.jpg   the image as it was packed; -truth.png and -prediction.png are labels
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcn_dist.checkpoints.store import step_name
from fcn_dist.data.scenes.masks import encode_png
from fcn_dist.data.shard import Sample
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.transforms import decode
from fcn_dist.errors import UserError
from fcn_dist.files import replacing, write_text
from fcn_dist.model.fcn import FCN
from fcn_dist.model.views import Views
from fcn_dist.ranks import Rank
from fcn_dist.scoring.evaluate import best_outputs, looking_only, scores_other, spare_image
from fcn_dist.scoring.metrics import Matrix, Scores
from fcn_dist.training.collective import of_all_ranks

PREDICTIONS_DIR = "predictions"
EVALUATION_NAME = "evaluation.json"
BEST, MEDIAN, WORST = "best", "median", "worst"


@dataclass(frozen=True)
class Chosen:
    """One scene that is worth a look."""

    name: str  # such as "worst-2", the second worst
    index: int  # in the set
    right: int  # pixels, of those labelled
    labelled: int


def choose(scenes: Matrix, count: int) -> list[Chosen]:
    """Of (n, 2) right and labelled pixels, `count` scenes by the share of right ones: best, in the middle, worst.

    A third each, where there are more than so many; scenes without a labelled pixel are left out. Of equal ones the
    earlier in the set is the better.
    """
    labelled = np.flatnonzero(scenes[:, 1])
    accuracy = scenes[labelled, 0] / scenes[labelled, 1]
    order = labelled[np.argsort(-accuracy, kind="stable")].tolist()
    count = min(count, len(order))
    best, worst, middle = ceil((count - 1) / 3), ceil(count / 3), count // 3
    first = max(best, min((len(order) - middle) // 2, len(order) - worst - middle))
    groups = {
        BEST: order[:best],
        MEDIAN: order[first : first + middle],
        WORST: order[len(order) - worst :][::-1],
    }
    return [
        Chosen(f"{group}-{number}", index, *scenes[index].tolist())
        for group, indices in groups.items()
        for number, index in enumerate(indices, 1)
    ]


def predicted(
    model: FCN,
    forward: Callable[..., Tensor],
    shard_set: ShardSet,
    chosen: list[Chosen],
    rank: Rank,
    advance: Callable[[], None],
) -> dict[str, bytes]:
    """The labels predicted for each of `chosen`, as PNG, by name. All ranks call it, and have all of them then.

    Under ZeRO-3 a forward gathers weights from all ranks: so each rank computes equally often, whatever it can read.
    A scene that cannot be read now, though it could be when it was scored, is left out.
    """
    label_table = np.frombuffer(shard_set.label_rule(scores_other(model, shard_set)).label_table, np.uint8)
    device = model.score_fr.weight.device
    found: dict[str, bytes] = {}
    with looking_only(model):
        for number in range(rank.index, ceil(len(chosen) / rank.world_size) * rank.world_size, rank.world_size):
            sample = readable(shard_set, chosen[number].index) if number < len(chosen) else None
            if sample is None:
                forward(spare_image(device), coarse=True)
                continue
            image_1HW3 = torch.from_numpy(decode(sample)[0])[None].to(device)
            size = (image_1HW3.shape[1], image_1HW3.shape[2])
            outputs = best_outputs(model, forward, image_1HW3, size, Views())
            found[chosen[number].name] = encode_png(label_table[outputs.cpu().numpy()])
            advance()
    return {name: png for of_rank in of_all_ranks(found, rank) for name, png in of_rank.items()}


def readable(shard_set: ShardSet, index: int) -> Sample | None:
    """A sample as it is packed, if it is there and whole."""
    try:
        return shard_set.read(index)  # its checksums were compared, and it was decoded when it was scored
    except UserError:
        return None


def write_predictions(
    run_dir: Path,
    step: int,
    weights: str,
    scores: Scores,
    shard_set: ShardSet,
    chosen: list[Chosen],
    predictions: dict[str, bytes],
) -> None:
    """Put the evaluation of `step` in the place of the one before, whole at every moment. Rank 0 calls it."""
    folder = run_dir / PREDICTIONS_DIR / step_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    told = []
    for one in chosen:
        sample = readable(shard_set, one.index) if one.name in predictions else None
        if sample is None:
            continue
        files = {
            "image": (f"{one.name}.jpg", sample.image),
            "truth": (f"{one.name}-truth.png", sample.mask),
            "prediction": (f"{one.name}-prediction.png", predictions[one.name]),
        }
        for name, content in files.values():
            with replacing(folder / name, flush=False) as partial:
                partial.write_bytes(content)
        paths = {kind: f"{folder.name}/{name}" for kind, (name, _) in files.items()}
        told.append({"name": one.name, "key": sample.key, "right": one.right, "labelled": one.labelled, **paths})
    record: dict[str, Any] = {"step": step, "weights": weights, **scores.as_dict(), "scenes": told}
    write_text(folder.parent / EVALUATION_NAME, json.dumps(record) + "\n", flush=False)
    for older in folder.parent.glob("step-*"):
        if older != folder:
            shutil.rmtree(older, ignore_errors=True)
