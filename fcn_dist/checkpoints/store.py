"""Checkpoints on disk: a folder written by all ranks in, a committed checkpoint out. Knows files, not engines.

checkpoints/
    step-00000500/          exists only once whole
        deepspeed/...       DeepSpeed's own files
        probe.safetensors   an image and the scores the training engine gave it
        manifest.json       every file with size and SHA-256, and what the checkpoint is
    latest                  the name of the newest, replaced atomically
    .step-00001000.partial/ being written, or left by a crash; no reader looks at it
"""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fcn_dist.errors import UserError
from fcn_dist.files import sha256, sync, write_text

MANIFEST_NAME = "manifest.json"
DEEPSPEED_TAG = "deepspeed"
PROBE_NAME = "probe.safetensors"
LATEST_NAME = "latest"
STEP_NAME = re.compile(r"step-\d{8,}")  # and not a copy that someone keeps beside it
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint is, besides its files."""

    step: int  # global batches trained
    position: int  # next position of the sample stream
    world_size: int
    zero_stage: int
    precision: str  # of the engine's weights: "float32", "bfloat16" or "float16"
    model: dict[str, Any]  # ModelDescription
    recipe: dict[str, Any]
    deepspeed: dict[str, Any]  # the resolved DeepSpeed configuration
    index_sha256: str  # of the training split's index.json
    scores: dict[str, Any] | None  # the last evaluation before this step, if any


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    dir: Path
    state: CheckpointState


@dataclass(frozen=True)
class Damage:
    """Why a checkpoint was passed over."""

    dir: Path
    reason: str


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def step_name(step: int) -> str:
    """`step-00001234`."""
    return f"step-{step:08d}"


def partial_dir(run_dir: Path, step: int) -> Path:
    """Where the ranks write before the commit."""
    return checkpoints_dir(run_dir) / f".{step_name(step)}.partial"


def prepare(run_dir: Path, step: int) -> Path:
    """An empty folder for the ranks to write to; what a crash left there is removed. One rank calls this."""
    folder = partial_dir(run_dir, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(run_dir: Path, state: CheckpointState) -> Path:
    """Make the partial folder of `state.step` the newest checkpoint. One rank calls this, after all have written.

    The manifest goes in last, everything is flushed, and the folder is renamed before `latest` points to it.
    """
    folder = partial_dir(run_dir, state.step)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    # Through JSON first, so that the digest is of what a reader will find: a tuple is then a list.
    manifest = json.loads(json.dumps({"format_version": FORMAT_VERSION, "state": asdict(state), "files": files}))
    write_text(folder / MANIFEST_NAME, json.dumps({**manifest, "digest": _digest(manifest)}, indent=1))
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(path)
    target = checkpoints_dir(run_dir) / step_name(state.step)
    if target.exists():
        # The same step saved again, after resuming from an older one: what is there would block the rename.
        shutil.rmtree(target)
    folder.rename(target)
    sync(target.parent)
    write_text(target.parent / LATEST_NAME, target.name + "\n")
    return target


def retain(run_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `latest`, oldest first.

    What is newer than `latest` was damaged when the run continued from before it: it must not crowd out whole ones.
    """
    folder = checkpoints_dir(run_dir)
    latest = _step(folder / (folder / LATEST_NAME).read_text().strip())
    committed = [one for one in _committed(run_dir) if _step(one) <= latest]
    for old in reversed(committed[keep:]):
        shutil.rmtree(old)


def open_checkpoint(run_dir: Path, step: int | None = None) -> tuple[Checkpoint, list[Damage]]:
    """The newest whole checkpoint of a run (or that of `step`), and the newer ones passed over for their damage.

    Every file's size and SHA-256 is compared. Raises UserError if there is none, or none is whole.
    """
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}; give the folder that launch/train.py wrote with --output")
    folders = _committed(run_dir)
    if step is not None:
        steps = [folder.name for folder in folders]
        folders = [folder for folder in folders if folder.name == step_name(step)]
        if not folders:
            raise UserError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(steps) or 'none'}")
    damages: list[Damage] = []
    for folder in folders:
        try:
            return Checkpoint(folder, _read_whole(folder)), damages
        except (OSError, KeyError, TypeError, ValueError) as error:
            damages.append(Damage(folder, str(error)))
    if not damages:
        raise UserError(f"{run_dir} has no checkpoint yet; train with checkpoint.every, or to the last step")
    reasons = "; ".join(f"{damage.dir.name}: {damage.reason}" for damage in damages)
    raise UserError(f"{run_dir} has no whole checkpoint ({reasons}); restore one from a copy")


def newest(run_dir: Path) -> Path | None:
    """The folder of the newest committed checkpoint, not read; None if there is none."""
    return next(iter(_committed(run_dir)), None)


def _committed(run_dir: Path) -> list[Path]:
    """Folders of committed checkpoints, newest first."""
    folders = (path for path in checkpoints_dir(run_dir).glob("step-*") if STEP_NAME.fullmatch(path.name))
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content but for the digest itself."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_whole(folder: Path) -> CheckpointState:
    """The state of a checkpoint whose files are all as its manifest says; any error names what is not."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {manifest['format_version']}, {FORMAT_VERSION} is needed")
    if manifest["digest"] != _digest(manifest):
        raise ValueError(f"{MANIFEST_NAME} differs from its own digest")
    for name, record in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != record["size"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes, {record['size']} are needed")
        if sha256(path) != record["sha256"]:
            raise ValueError(f"{name} differs from its SHA-256 in the manifest")
    return CheckpointState(**manifest["state"])
