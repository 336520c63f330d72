"""Ours and the plain way from images to labels and scores, with one network, and what each costs.

Shapes: B images, H x W pixels, C outputs, h x w coarse cells. The plain way upsamples to full size, takes the softmax
and the argmax there, and hands int64 labels over: what a script does that is written in a few lines, with convolutions
of torch alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from training_steps import resident

from fcn_dist.config import ModelConfig
from fcn_dist.labels import LabelRule
from fcn_dist.model.devices import keep_freed_memory, multiplies
from fcn_dist.model.fcn import FCN
from fcn_dist.model.inference import for_inference
from fcn_dist.model.upsampling import argmax_upsampled
from fcn_dist.scoring.metrics import ConfusionMatrix

CLASSES = 150
# Sizes of SceneParse150's images: 0.24 megapixels on average, and wider than high more often than not.
MEAN_PIXELS, SPREAD = 0.24e6, 0.35
LEAST, MOST = 0.06e6, 0.7e6
SHAPES = (4 / 3, 4 / 3, 3 / 2, 3 / 2, 1.0, 3 / 4)  # width over height

Labels = NDArray[Any]
ToLabels = Callable[[Tensor, tuple[int, int], int], Labels]  # of coarse scores, image size and stride


@dataclass(frozen=True)
class Scene:
    """An image and its annotation."""

    image: Tensor  # (H, W, 3) uint8, RGB
    truth: NDArray[np.uint8]  # (H, W), raw labels


def ours(coarse_1Chw: Tensor, size: tuple[int, int], stride: int) -> Labels:
    """As `Predictor.predict` and `evaluate` make labels of coarse scores."""
    table = np.frombuffer(LabelRule(coarse_1Chw.shape[1]).label_table, np.uint8)
    labels: Labels = table[argmax_upsampled(coarse_1Chw, size, stride)[0].cpu().numpy()]
    return labels


def plain(coarse_1Chw: Tensor, size: tuple[int, int], stride: int) -> Labels:
    """All scores at full size, softmax, argmax."""
    full = F.interpolate(coarse_1Chw, scale_factor=stride, mode="bilinear", align_corners=False)
    probabilities = torch.softmax(full[:, :, : size[0], : size[1]], dim=1)
    labels: Labels = probabilities.argmax(dim=1)[0].cpu().numpy() + 1
    return labels


WAYS: dict[str, ToLabels] = {"ours": ours, "plain": plain}


@torch.inference_mode()
def label(
    way: str, scenes: str | None, count: int, device: str, scored: bool, after: bool, warmup: int, width: float
) -> dict[str, Any]:
    """Images a second from pixels to labels, counted into a confusion matrix if `scored`.

    With `after`, the coarse scores are there already and only what follows them is measured.
    """
    place = torch.device(device)
    found = read_scenes(Path(scenes), count) if scenes else draw_scenes(count)
    torch.manual_seed(0)
    before = resident("VmRSS")
    model = FCN(CLASSES, ModelConfig(width=width)).eval()
    for score in (model.score_fr, model.score_pool4, model.score_pool3):
        assert score is not None
        torch.nn.init.kaiming_normal_(score.weight)  # or all scores would be the same
    # Prediction takes the precision that suits the device, evaluation float32 unless it is asked.
    fast = way == "ours" and not scored and multiplies(place, torch.bfloat16)
    model.to(place, torch.bfloat16 if fast else torch.float32)
    if way == "ours":
        keep_freed_memory()
        model = for_inference(model)
    else:
        model.fc6.by_columns = model.fc7.by_columns = False
    to_labels, matrix = WAYS[way], ConfusionMatrix(CLASSES)

    def forward(scene: Scene) -> Tensor:
        coarse: Tensor = model(scene.image.unsqueeze(0).to(place), coarse=True)
        return coarse

    ready = [forward(scene) for scene in found] if after else []
    forwards = followings = cpu = 0.0
    pixels = 0
    for number in range(-warmup, len(found)):
        scene = found[number % len(found)]
        synchronise(place)
        began, cpu_began = perf_counter(), process_time()
        coarse = ready[number] if after else forward(scene)
        synchronise(place)
        forwarded = perf_counter()
        labels = to_labels(coarse, (scene.image.shape[0], scene.image.shape[1]), model.stride)
        if scored:
            matrix.update(scene.truth, labels)
        if number < 0:
            continue
        forwards += forwarded - began
        followings += perf_counter() - forwarded
        cpu += process_time() - cpu_began
        pixels += labels.size
    seconds = followings if after else forwards + followings
    on_gpu = place.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - before
    return {
        "images/s": len(found) / seconds,
        "forward ms": 1e3 * forwards / len(found),
        "following ms": 1e3 * followings / len(found),
        "CPU ms": 1e3 * cpu / len(found),
        "megapixels": pixels / len(found) / 1e6,
        "peak GB": memory / 1e9,
    }


def draw_scenes(count: int) -> list[Scene]:
    """Seeded smooth images of sizes like SceneParse150's, with labels in blocks."""
    rng = np.random.default_rng(0)
    areas = rng.lognormal(-(SPREAD**2) / 2, SPREAD, count) * MEAN_PIXELS
    scenes = []
    for pixels, shape in zip(np.clip(areas, LEAST, MOST), rng.choice(SHAPES, count), strict=True):
        height = round(float(np.sqrt(pixels / shape)))
        width = round(height * float(shape))
        coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 9, 12)))
        image = F.interpolate(coarse, (height, width), mode="bilinear")[0].to(torch.uint8).permute(1, 2, 0)
        blocks = rng.integers(0, CLASSES + 1, (9, 12), np.uint8)
        truth = np.kron(blocks, np.ones((height // 9 + 1, width // 12 + 1), np.uint8))[:height, :width]
        scenes.append(Scene(image.contiguous(), truth))
    return scenes


def read_scenes(folder: Path, count: int) -> list[Scene]:
    """The first `count` validation scenes of a folder."""
    from fcn_dist.deploy.imagefiles import read_rgb

    scenes = []
    for path in sorted((folder / "images" / "validation").glob("*.jpg"))[:count]:
        image = torch.from_numpy(read_rgb(path).copy())
        # What is annotated does not change how long it takes to count it.
        truth = np.full(image.shape[:2], 1, np.uint8)
        scenes.append(Scene(image, truth))
    return scenes


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
