"""Checkpoints made of files that a test has written itself."""

from pathlib import Path
from zipfile import is_zipfile

from fcn_dist.checkpoints.commit import WrittenFile, commit
from fcn_dist.checkpoints.records import records_sha256
from fcn_dist.checkpoints.store import CheckpointState
from fcn_dist.files import sha256


def commit_folder(folder: Path, state: CheckpointState) -> Path:
    """Commit a prepared folder with all that is in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return commit(folder, state, {path.relative_to(folder).as_posix(): _written(path) for path in paths})


def _written(path: Path) -> WrittenFile:
    records = records_sha256(path) if is_zipfile(path) else None
    return WrittenFile(path.stat().st_size, sha256(path), records)
