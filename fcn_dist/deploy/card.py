"""The model card: what a network was trained on and how far, for those who get its file; a checkpoint in, JSON out."""

import json
from pathlib import Path, PurePath
from typing import Any

from fcn_dist.checkpoints.consolidate import Weights
from fcn_dist.checkpoints.store import Checkpoint
from fcn_dist.training.runfolder import RUN_NAME

UNKNOWN = "unknown"


def model_card(checkpoint: Checkpoint, weights: Weights) -> dict[str, Any]:
    """Data set, steps, scores, and the weights it began with and their licence; folders by their names alone.

    What is not recorded is "unknown", or null where it is a figure.
    """
    state = checkpoint.state
    began = state.model["config"]
    batch = state.recipe.get("train", {}).get("global_batch")
    return {
        "data_set": {"name": _data_set(checkpoint.dir.parents[1]), "index_sha256": state.index_sha256},
        "classes": len(state.model["classes"]),
        "steps": state.step,
        "images_trained": state.position,
        "global_batch": batch if batch else state.position // state.step if state.step else None,
        "weights": weights,
        "scores": state.scores,
        "began_with": {
            "weights": PurePath(began["weights"]).name,
            "licence": began.get("weights_licence") or UNKNOWN,
        }
        if began.get("weights")
        else None,
    }


def _data_set(run_dir: Path) -> str:
    """The shard set's name: of the last folder of its path or URL."""
    try:
        return PurePath(json.loads((run_dir / RUN_NAME).read_text())["shards"]).name or UNKNOWN
    except (OSError, ValueError, KeyError, TypeError):
        return UNKNOWN


def card_lines(card: dict[str, Any]) -> list[tuple[str, str]]:
    """For people: what, and what of it."""
    began, scores = card["began_with"], (card["scores"] or {}).get("official", {})
    figures = ", ".join(f"{name.replace('_', ' ')} {100 * value:.2f} %" for name, value in scores.items())
    split = f" on {card['scores']['num_samples']} {card['scores']['split']} samples" if figures else ""
    return [
        ("data set", f"{card['data_set']['name']}, {card['classes']} classes"),
        ("trained", f"{card['steps']:,} steps, {card['images_trained']:,} images; its {card['weights']} weights"),
        ("scores", f"{figures or 'none recorded'}{split}"),
        ("began with", f"{began['weights']}, licence {began['licence']}" if began else "random weights"),
    ]
