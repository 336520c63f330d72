"""Which checkpoints of a run are kept: the newest, those at a long interval, and the best by a score."""

import secrets
import shutil
from pathlib import Path

from fcn_dist.checkpoints.store import checkpoints_dir, committed, read_state, step_of
from fcn_dist.config import CheckpointConfig
from fcn_dist.files import obstacle_in

REMOVED = ".removed.partial"


def retain(run_dir: Path, newest: Path, config: CheckpointConfig) -> list[Path]:
    """Remove the checkpoints that no rule keeps, oldest first, and return them. `newest` was committed just now.

    It stays, and so do checkpoints of later steps: those were damaged when the run continued from before them, and
    must not crowd out whole ones.
    """
    folders = [folder for folder in committed(run_dir) if step_of(folder) <= step_of(newest)]
    kept = set(folders[: config.keep])
    kept |= {folder for folder in folders if config.keep_every and step_of(folder) % config.keep_every == 0}
    scores = {folder: score for folder in folders if (score := score_of(folder, config.best_by)) is not None}
    kept |= set(sorted(scores, key=lambda folder: (-scores[folder], -step_of(folder)))[: config.keep_best])
    removed = [folder for folder in reversed(folders) if folder not in kept]
    for folder in removed:
        # At once for whoever reads it, and with a name by which the next start finds what a crash leaves.
        folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{REMOVED}"))
    for going in checkpoints_dir(run_dir).glob(f".step-*{REMOVED}"):  # with what could not be removed before
        shutil.rmtree(going)
    return removed


def score_of(folder: Path, name: str) -> float | None:
    """A score of the benchmark's own that was measured at a checkpoint's very step; None if none was.

    Raises OSError if the checkpoint may be whole and cannot be read.
    """
    try:
        scores = read_state(folder).scores
    except (OSError, KeyError, TypeError, ValueError) as error:
        if obstacle_in(error):
            raise
        return None  # a damaged manifest scores nothing
    if not scores or scores["step"] != step_of(folder):
        return None
    return float(scores["official"][name])
