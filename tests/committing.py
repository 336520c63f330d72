"""Checkpoints made of files that a test has written itself."""

from pathlib import Path

from fcn_dist.checkpoints.commit import WrittenFile, commit
from fcn_dist.checkpoints.store import CheckpointState
from fcn_dist.files import sha256


def commit_folder(folder: Path, state: CheckpointState) -> Path:
    """Commit a prepared folder with all that is in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): WrittenFile(path.stat().st_size, sha256(path)) for path in paths}
    return commit(folder, state, files)
