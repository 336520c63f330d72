"""A run's committed checkpoint, as one rank without ZeRO in float32 writes it, made without DeepSpeed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from committing import commit_folder
from safetensors.torch import save_file
from tiny_models import DESCRIPTION, tiny_network

from fcn_dist.checkpoints.commit import prepare
from fcn_dist.checkpoints.store import CheckpointState
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import FCN

STATE = CheckpointState(
    step=1,
    position=8,
    world_size=1,
    zero_stage=0,
    precision="float32",
    model=json.loads(json.dumps(DESCRIPTION.as_dict())),
    recipe={},
    deepspeed={},
    index_sha256="0" * 64,
    scores={"mean_iou": 0.25},
)
IMAGE = torch.randint(0, 256, (1, 33, 47, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
Edit = Callable[[dict[str, Any]], Any]


def save_run(
    run_dir: Path,
    step: int = 1,
    seed: int = 0,
    bias: float = 0.5,
    edit_probe: Edit = dict,
    state: CheckpointState = STATE,
    averaged: FCN | None = None,
    description: ModelDescription = DESCRIPTION,
) -> FCN:
    """Commit one; returns its network.

    `averaged` is the network with its averaged weights, if it has any.
    """
    model = tiny_network(description, seed=seed)
    model.get_parameter("fc7.bias").data[3] = bias
    folder = prepare(run_dir, step)
    content = {
        "module": model.state_dict(),
        "parameter_groups": [[name for name, _ in model.named_parameters()]],
        "optimizer": {
            "state": {
                n: {"exp_avg": torch.rand_like(p), **({"ema": mean.data} if averaged else {})}
                for n, (p, mean) in enumerate(zip(model.parameters(), (averaged or model).parameters(), strict=True))
            },
        },
        "buffer_names": [],
        "global_steps": step,
        "global_samples": step,
        "skipped_steps": 0,
        "frozen_param_fragments": None,
        "dp_world_size": 1,
        "ds_version": "0.19.8",
    }
    torch.save(content, folder / "deepspeed" / "mp_rank_00_model_states.pt")
    with torch.inference_mode():
        probe = {"image": IMAGE, "scores": model(IMAGE, coarse=True).contiguous()}
        if averaged:
            probe["averaged_scores"] = averaged(IMAGE, coarse=True).contiguous()
    if changed := edit_probe(probe):
        save_file(changed, folder / "probe.safetensors", {"device": "cpu"})
    commit_folder(folder, replace(state, step=step, model=json.loads(json.dumps(description.as_dict()))))
    return model
