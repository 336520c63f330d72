"""A model file and what the training engine recorded with its weights in, how the two agree out."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from fcn_dist.model.columns import convolve_in_parts, takes_columns
from fcn_dist.model.devices import multiplies
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
    """Read the file as a user would, and score the probe image as the engine did that recorded its scores.

    That is in the engine's arithmetic; or, on a device that emulates it, in float32, whose own rounding is nothing
    beside the engine's, and in the engine's only if that is not near enough.
    """
    image, expected, recorded_on = read_probe(checkpoint, weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = checkpoint.state.precision
    autocast = checkpoint.state.deepspeed.get("torch_autocast") or {}
    arithmetic = str(autocast.get("dtype", "bfloat16")) if autocast.get("enabled") else precision
    emulated = not multiplies(device, torch_dtype(arithmetic)) and not autocast.get("enabled")
    # What a GPU's convolutions may round float32 to is TF32.
    known_as = "tf32" if arithmetic == "float32" and (device.type, recorded_on) != ("cpu", "cpu") else arithmetic
    tolerance = max(TOLERANCES[known_as], TOLERANCES[dtype])
    for computed_in in ("float32", arithmetic) if emulated else (arithmetic,):
        scores = _scores(path, image.to(device), precision, computed_in)
        if scores.shape != expected.shape:
            raise UserError(
                f"{checkpoint.dir / PROBE_NAME} holds scores {tuple(expected.shape)}, and the model gives "
                f"{tuple(scores.shape)}; restore the checkpoint from a copy, or convert another step"
            )
        difference = float((scores - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
        if difference <= tolerance:
            break
    ran_in = known_as if computed_in == arithmetic else f"{computed_in} with weights in {arithmetic}"
    return Agreement(f"{ran_in} on {device.type}", scores.numel(), difference, tolerance)


def _scores(path: Path, image: Tensor, precision: str, computed_in: str) -> Tensor:
    """Of the file's network. Rounded to `precision`, masters or their averages are what the engine computed with."""
    device, rounded = image.device, torch_dtype(precision)
    model, _ = read_model_file(path)
    if device.type == "cpu" and rounded != torch.float32:
        for name in ("fc6", "fc7"):
            setattr(model, name, _InParts(getattr(model, name), rounded))
    model.to(device, rounded)
    mixed: AbstractContextManager[object] = nullcontext()
    if computed_in == "float32":
        model.float()
    elif computed_in != precision:
        mixed = torch.autocast(device.type, torch_dtype(computed_in))
    with torch.inference_mode(), mixed:
        scores: Tensor = model(image, coarse=True)
    return scores.float().cpu()


class _InParts(nn.Module):
    """A convolution, rounded and computed some outputs at a time: fc6's weights, 0.4 GB of the file, stay mapped."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        assert layer.bias is not None
        self._padding, self._dtype = int(layer.padding[0]), dtype
        # No parameters: the network around it is rounded at once.
        self._weights = (layer.weight.data, layer.bias.data)

    def forward(self, x: Tensor) -> Tensor:
        def rounded(weights: Tensor) -> Tensor:
            return weights.to(self._dtype).to(x.dtype)

        if takes_columns(x.device.type, x.dtype):
            return convolve_in_parts(x, *self._weights, self._padding, rounded, OUTPUTS_AT_ONCE)
        parts = zip(*(torch.split(weights, OUTPUTS_AT_ONCE) for weights in self._weights), strict=True)
        return torch.cat([F.conv2d(x, rounded(w), rounded(b), padding=self._padding) for w, b in parts], dim=1)


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
