"""A model file and what the training engine recorded with its weights in, how the two agree out."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_dist.checkpoints.consolidate import Weights
from fcn_dist.checkpoints.store import PROBE_NAME, PROBE_SCORES, Checkpoint
from fcn_dist.deploy.modelfile import read_model_file
from fcn_dist.errors import UserError
from fcn_dist.model.columns import takes_columns
from fcn_dist.model.fcn import torch_dtype

# Largest difference of any score, as a share of the largest score, by the coarsest arithmetic on either side. Weights
# and code are the same there, so what is left is the order of additions and the rounding after each of some twenty
# layers. Seen on a CPU: nothing between runs; against float64 2e-6 in float32, 1e-3 in float16, 1e-2 in bfloat16. Two
# kinds of device err independently, hence twice to four times that. TF32 has the mantissa of float16.
TOLERANCES = {"float32": 1e-4, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}

OUTPUTS_AT_ONCE = 128


@dataclass(frozen=True)
class Agreement:
    """How the written file's scores compare with those the engine recorded."""

    arithmetic: str  # what the comparison ran in, such as "bfloat16 on cpu"
    scores: int
    difference: float  # largest, as a share of the largest score
    tolerance: float


def compare(path: Path, checkpoint: Checkpoint, weights: Weights, dtype: str) -> Agreement:
    """Read the file as a user would, and score the probe image in the arithmetic of the engine that recorded it."""
    image, expected, recorded_on = read_probe(checkpoint, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = read_model_file(path)
    precision = checkpoint.state.precision
    autocast = checkpoint.state.deepspeed.get("torch_autocast") or {}
    arithmetic = str(autocast.get("dtype", "bfloat16")) if autocast.get("enabled") else precision
    # The masters, or their averages, rounded to the engine's precision are what the engine computed with, to the bit.
    if device.type == "cpu" and not takes_columns("cpu", torch_dtype(precision)):
        model.fc6 = _InParts(model.fc6, torch_dtype(precision))  # type: ignore[assignment]
    model.to(device, torch_dtype(precision))
    mixed = torch.autocast(device.type, torch_dtype(arithmetic)) if autocast.get("enabled") else nullcontext()
    with torch.inference_mode(), mixed:
        scores = model(image.to(device), coarse=True).float().cpu()
    if scores.shape != expected.shape:
        raise UserError(
            f"{checkpoint.dir / PROBE_NAME} holds scores {tuple(expected.shape)}, and the model gives "
            f"{tuple(scores.shape)}; restore the checkpoint from a copy, or convert another step"
        )
    if arithmetic == "float32" and (device.type, recorded_on) != ("cpu", "cpu"):
        arithmetic = "tf32"  # what a GPU's convolutions may round float32 to
    largest = float(expected.abs().max())
    difference = float((scores - expected).abs().max()) / (largest or 1.0)
    tolerance = max(TOLERANCES[arithmetic], TOLERANCES[dtype])
    return Agreement(f"{arithmetic} on {device.type}", scores.numel(), difference, tolerance)


class _InParts(nn.Module):
    """A convolution, rounded and computed some outputs at a time: fc6's weights, 0.4 GB of the file, stay mapped."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        assert layer.bias is not None and isinstance(layer.padding, tuple)
        self._padding, self._dtype = layer.padding, dtype
        # No parameters: the network around it is rounded at once.
        weights, biases = (torch.split(whole, OUTPUTS_AT_ONCE) for whole in (layer.weight, layer.bias))
        self._parts = list(zip(weights, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        rounded = ((weight.to(self._dtype), bias.to(self._dtype)) for weight, bias in self._parts)
        return torch.cat([F.conv2d(x, weight, bias, padding=self._padding) for weight, bias in rounded], dim=1)


def read_probe(checkpoint: Checkpoint, weights: Weights) -> tuple[Tensor, Tensor, str]:
    """The image, its scores by the engine with these weights, and the kind of device it ran on ("" if not recorded)."""
    with open_probe(checkpoint) as probe:
        device = (probe.metadata() or {}).get("device", "")
        return probe.get_tensor("image"), probe.get_tensor(PROBE_SCORES[weights]), device


@contextmanager
def open_probe(checkpoint: Checkpoint) -> Iterator[Any]:
    """Its file, open."""
    path = checkpoint.dir / PROBE_NAME
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); without the scores it holds, a conversion cannot be checked; restore "
            "the checkpoint from a copy, or convert another step"
        ) from error
