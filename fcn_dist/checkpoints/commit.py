"""The commit of a checkpoint: a folder that no reader looks at in, a checkpoint out, at one instant."""

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fcn_dist.checkpoints.store import (
    DEEPSPEED_TAG,
    LATEST_NAME,
    MANIFEST_NAME,
    CheckpointState,
    checkpoints_dir,
    manifest_text,
    step_name,
)
from fcn_dist.files import sync, write_text


@dataclass(frozen=True)
class WrittenFile:
    """A file that is on disk, by the rank that wrote it."""

    size: int  # bytes
    sha256: str  # of what was to be written, not of what is read back
    records_sha256: str | None = None  # of the list in records.py, if torch wrote it


def prepare(run_dir: Path, step: int) -> Path:
    """An empty folder for the ranks to write to. One rank calls this.

    Its name is its own: a rank of an earlier try may still be writing to the folder of that one.
    """
    folder = checkpoints_dir(run_dir) / f".{step_name(step)}.{secrets.token_hex(4)}.partial"
    (folder / DEEPSPEED_TAG).mkdir(parents=True)
    return folder


def commit(folder: Path, state: CheckpointState, files: Mapping[str, WrittenFile]) -> Path:
    """Make the prepared `folder` a checkpoint, and `latest` its name. One rank calls this, after all have written.

    `files` are on disk already, under their paths in the folder. The manifest goes in last; then names are flushed, and
    the folder is renamed before `latest` points to it. Raises OSError if a file is not there in its size.
    """
    for name, file in files.items():
        found = (folder / name).stat().st_size
        if found != file.size:
            raise OSError(f"{folder / name} has {found} bytes, and {file.size} were written")
    write_text(folder / MANIFEST_NAME, manifest_text(state, {name: vars(file) for name, file in files.items()}))
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(path)
    target = folder.with_name(step_name(state.step))
    # The same step saved again, after continuing from an older one: what is there would block the rename.
    replaced = folder.with_suffix(".replaced.partial")
    if target.exists():
        target.rename(replaced)
    folder.rename(target)
    sync(target.parent)
    write_text(target.parent / LATEST_NAME, target.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def discard(folder: Path) -> None:
    """Give up a prepared folder."""
    shutil.rmtree(folder, ignore_errors=True)


def discard_all(run_dir: Path) -> None:
    """Remove what crashes have left. No one may be writing a checkpoint of the run."""
    for folder in checkpoints_dir(run_dir).glob(".step-*.partial"):
        discard(folder)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it takes no whole one's place; returns its new path."""
    aside = folder.with_name(f"damaged-{folder.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return folder.rename(aside)
