"""The state of a live engine: what a rank writes of it into a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from fcn_dist.checkpoints.store import DEEPSPEED_TAG, PROBE_NAME, PROBE_SCORES
from fcn_dist.checkpoints.zero import GROUPS_KEY
from fcn_dist.training.average import WeightAverage
from fcn_dist.training.engine import Engine

PROBE_SIZE = (104, 104)  # pixels: more than 96, or fc6, 7 x 7 on every 32nd, has weights that meet nothing but padding


def probe_image() -> Tensor:
    """A fixed image, (1, H, W, 3) uint8, whose scores identify a network's weights."""
    pixels = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (1, 3, PROBE_SIZE[0] // 8, PROBE_SIZE[1] // 8), generator=pixels)
    smooth = torch.nn.functional.interpolate(coarse.float(), PROBE_SIZE, mode="bilinear")
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def take_state(engine: Engine, average: WeightAverage, folder: Path, is_first_rank: bool) -> dict[Path, Any]:
    """This rank's share of the engine's state: the files that it writes to `folder`, and what belongs into each.

    The contents are copies on the host. All ranks call it.
    """
    engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, client_state=_client_state(engine), save_latest=False)
    files: dict[Path, Any] = dict(engine.checkpoint_engine.files)
    image = probe_image()
    tensors = {"image": image, PROBE_SCORES["trained"]: _scores(engine, image)}
    if average.decay is not None:
        with average.in_use():
            tensors[PROBE_SCORES["averaged"]] = _scores(engine, image)
    if is_first_rank:
        files[folder / PROBE_NAME] = serialize(tensors, metadata={"device": engine.device.type})
    return files


def _scores(engine: Engine, image: Tensor) -> Tensor:
    """What the engine's weights give, on the host in float32."""
    engine.eval()
    # Under ZeRO-3 every rank takes part in a forward, and the weights it gathers are used again in training: no_grad,
    # not inference_mode.
    with torch.no_grad():
        scores: Tensor = engine(image.to(engine.device), coarse=True)
    engine.train()
    return scores.float().cpu().contiguous()


def _client_state(engine: Engine) -> dict[str, Any]:
    """What DeepSpeed's files leave out: under stage 0, which parameters are in which of the optimizer's groups."""
    if engine.zero_optimization():
        return {}
    in_16_bits = getattr(engine.optimizer, "fp16_groups", None)
    groups = in_16_bits or [options["params"] for options in engine.optimizer.param_groups]
    return {GROUPS_KEY: [[engine.param_names[parameter] for parameter in group] for group in groups]}
