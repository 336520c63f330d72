"""Run folders written by hand, as training leaves them; every name in them that a run may choose is hostile."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

# Markup, a formula, quotes and a colour of the charts' own; the last two occur nowhere.
CLASSES = (
    "<script>alert(1)</script>",
    "sky $x_1$",
    'road" onload="alert(2)',
    "tree & #00f0a0",
    "sea</style>",
    "nowhere 道路",
)
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200))
HOST = "node<img src=x onerror=alert(3)>"
FOLDER = "/data/<b>my</b> folder"
COMMAND = "launch/train.py --local_rank=0 --shards 'my shards' --output '<b>run</b>' --set log.layers=2"
PARAMETERS = (
    "features.0.weight",
    "features.0.bias",
    "features.2.weight",
    "features.5.weight",
    "fc6.weight",
    "score_fr.weight",
)
SIZE = (90, 120)


def record(**changed: Any) -> dict[str, Any]:
    """run.json."""
    return {
        "recipe": {
            "data": {"crop": [64, 64]},
            "model": {"frozen_stages": 0, "weights": None},
            "train": {"seed": 7},
            "log": {"layers": 2},
        },
        "deepspeed": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "zero": {"stage": 1}},
        "model": {
            "config": {"variant": "fcn8s", "backbone": "vgg16"},
            "classes": CLASSES,
            "colours": COLOURS,
        },
        "shards": "/data/my shards",
        "index_sha256": {"training": "a" * 64, "validation": "b" * 64},
        "world_size": 2,
        "steps": 40,
        "global_batch": 4,
        "command": COMMAND,
        "folder": FOLDER,
        "versions": {"fcn_dist": "0.1.0", "torch": "2.13.0"},
        "git": {"commit": "c" * 40, "clean": False},
        "machine": {"host": HOST, "cores": 2, "system": "Linux"},
        **changed,
    }


def start(step: int, world_size: int, command: str = COMMAND) -> dict[str, Any]:
    return {"event": "start", "step": step, "time": 1000.0 + step, "world_size": world_size, "command": command}


def trained(step: int, **changed: Any) -> dict[str, Any]:
    return {
        **{"event": "train", "step": step, "time": 1000.0 + step, "loss": 2.0 / step, "learning_rate": 0.01},
        **{"gradient_norm": 3.0, "images_per_second": 5.0, "data_wait": 0.25, "peak_memory": 2_500_000_000},
        **changed,
    }


def looked(step: int, share_of_head: float) -> dict[str, Any]:
    """The head's squared gradient is that share, in equal parts; the trunk's is in equal parts as well."""
    trunk = [name for name in PARAMETERS if name.startswith("features.")]
    squares = {
        name: (1 - share_of_head) / len(trunk) if name in trunk else share_of_head / (len(PARAMETERS) - len(trunk))
        for name in PARAMETERS
    }
    layers = {name: {"gradient": {"norm": square**0.5}, "weight": {"norm": 1.0}} for name, square in squares.items()}
    return {"event": "layers", "step": step, "time": 1000.0 + step, "layers": layers}


def evaluated(step: int, mean_iou: float | None, accuracy: float | None) -> dict[str, Any]:
    scores = {"official": {"mean_iou": mean_iou, "pixel_accuracy": accuracy, "score": None}}
    return {"event": "evaluate", "step": step, "time": 1000.0 + step, "weights": "trained", **scores}


def journal() -> list[dict[str, Any]]:
    """40 steps, in two starts."""
    events: list[dict[str, Any]] = [start(0, 2)]
    for step in range(2, 41, 2):
        if step == 22:
            events.append(start(20, 3, COMMAND + " --resume"))
        events += [looked(step, 1 - step / 50), trained(step)]
        if step in (20, 40):
            events += [
                evaluated(step, step / 100, step / 50),
                {"event": "checkpoint", "step": step, "time": 1000.0 + step},
            ]
    events.append({"event": "straggler", "step": 40, "time": 1041.0})
    return events


def confusion() -> list[list[int]]:
    counts = np.zeros((len(CLASSES) + 1, len(CLASSES) + 1), int)
    counts[1, 1], counts[1, 2], counts[2, 2], counts[2, 3], counts[3, 3], counts[4, 1] = 600, 200, 900, 100, 50, 150
    counts[0, 1] = 5000  # truth "other": not scored
    return [[int(n) for n in row] for row in counts]


def write_run(folder: Path, events: list[dict[str, Any]] | None = None, scenes: int = 9, **changed: Any) -> Path:
    """A run folder; with `scenes` of 0 without an evaluation's pictures, with -1 without predictions at all."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record(**changed)))
    lines = journal() if events is None else events
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if scenes >= 0:
        _write_predictions(folder / "predictions", scenes)
    return folder


def _write_predictions(folder: Path, scenes: int) -> None:
    pictures = folder / "step-00000040"
    pictures.mkdir(parents=True)
    rng = np.random.default_rng(0)
    told: list[dict[str, Any]] = []
    for number in range(scenes):
        name = f"{('best', 'median', 'worst')[number // 3]}-{number % 3 + 1}"
        image = cv2.resize(rng.integers(0, 256, (4, 5, 3), np.uint8), SIZE[::-1])
        truth = cv2.resize(rng.integers(0, 5, (3, 4), np.uint8), SIZE[::-1], interpolation=cv2.INTER_NEAREST)
        prediction = np.where(rng.random(SIZE) < 0.1 * number, 1, truth).astype(np.uint8)
        files = {"image": f"{name}.jpg", "truth": f"{name}-truth.png", "prediction": f"{name}-prediction.png"}
        for kind, array in (("image", image), ("truth", truth), ("prediction", prediction)):
            cv2.imwrite(str(pictures / files[kind]), array)
        right = int(((truth == prediction) & (truth > 0)).sum())
        figures: dict[str, Any] = {"right": right, "labelled": int((truth > 0).sum())}
        paths = {kind: f"{pictures.name}/{file}" for kind, file in files.items()}
        told.append({"name": name, "key": f"scene <i>{number}</i>", **figures, **paths})
    counts = np.array(confusion())[1:]
    classes = []
    for label, name in enumerate(CLASSES, 1):
        truth_pixels, predicted = int(counts[label - 1].sum()), int(counts[:, label].sum())
        union = truth_pixels + predicted - int(counts[label - 1, label])
        right = int(counts[label - 1, label])
        ratios: dict[str, Any] = {
            "iou": right / union if union else None,
            "accuracy": right / truth_pixels if truth_pixels else None,
        }
        pixels: dict[str, Any] = {"truth_pixels": truth_pixels, "predicted_pixels": predicted}
        classes.append({"label": label, "name": name, **ratios, **pixels})
    scores = {"split": "validation", "num_samples": 12, "set_size": 12, "confusion": confusion(), "classes": classes}
    (folder / "evaluation.json").write_text(json.dumps({"step": 40, "weights": "averaged", **scores, "scenes": told}))
