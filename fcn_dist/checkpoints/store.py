"""Checkpoints on disk, and how they are read: the newest whole one of a run, and why newer ones were passed over.

checkpoints/
    step-00000500/               exists only once whole
        deepspeed/...            DeepSpeed's own files
        probe.safetensors        an image and the scores the training engine gave it, with averaged weights, too
        manifest.json            every file with size and SHA-256, and what the checkpoint is
    latest                       the name of the newest, replaced atomically; no reader depends on it
    .step-00001000.1f2e.partial/ being written or removed, or left by a crash; no reader looks at it
    damaged-step-00000750/       passed over when the run was continued
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from fcn_dist.checkpoints.records import check_descriptions, records_sha256
from fcn_dist.errors import UserError
from fcn_dist.files import OBSTACLES, sha256

MANIFEST_NAME = "manifest.json"
DEEPSPEED_TAG = "deepspeed"
PROBE_NAME = "probe.safetensors"
PROBE_SCORES = {"trained": "scores", "averaged": "averaged_scores"}  # names of the tensors, by weights
LATEST_NAME = "latest"
STEP_NAME = re.compile(r"step-\d{8,}")  # and not a copy that someone keeps beside it
FORMAT_VERSION = 2
HASHING_THREADS = 8
# As often a checkpoint may be removed by its run while it is read, and a newer one is looked for.
TRIES = 20

Found = TypeVar("Found")


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


def step_of(folder: Path) -> int:
    """The step of a committed checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def committed(run_dir: Path) -> list[Path]:
    """Folders of committed checkpoints, newest first; damaged ones among them.

    Raises OSError if they cannot be looked for.
    """
    place = checkpoints_dir(run_dir)
    paths = place.iterdir() if place.is_dir() else ()  # glob would pass over what it may not read
    return sorted((path for path in paths if STEP_NAME.fullmatch(path.name)), key=step_of, reverse=True)


def open_checkpoint(run_dir: Path, step: int | None = None) -> tuple[Checkpoint, list[Damage]]:
    """The newest whole checkpoint of a run (or that of `step`), and the newer ones passed over for their damage.

    Every file's size and SHA-256 is compared. Raises UserError if there is none, or none is whole.
    """
    return while_removed(lambda: newest(run_dir, step, lambda folder: _check(folder, _problem)), run_dir)


class Removed(Exception):
    """A checkpoint was removed while it was read: its run keeps newer ones."""


@contextmanager
def of_checkpoint(folder: Path) -> Iterator[None]:
    """What goes wrong in the block is Removed if the checkpoint in `folder` is gone."""
    try:
        yield
    except Exception as error:
        if not folder.exists():
            raise Removed(folder) from error
        raise


@contextmanager
def telling_obstacles(folder: Path) -> Iterator[None]:
    """What keeps the block from reading files of `folder` that may be whole is a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in OBSTACLES:
            raise
        raise UserError(
            f"{error.filename or folder} cannot be read here ({error.strerror}), and may be whole; permissions and "
            "memory to read it are needed; see to that, and start again"
        ) from error


def while_removed(read: Callable[[], Found], run_dir: Path) -> Found:
    """What `read` finds, once no checkpoint was removed meanwhile."""
    for _ in range(TRIES):
        with suppress(Removed):
            return read()
    raise UserError(
        f"{run_dir} removed {TRIES} checkpoints while they were read; one that stays is needed; keep more of them "
        "(checkpoint.keep), or come back when the run has ended"
    )


def newest(run_dir: Path, step: int | None, read: Callable[[Path], Found]) -> tuple[Found, list[Damage]]:
    """What `read` finds in the newest checkpoint, or in that of `step`, and the newer ones passed over as damaged.

    Raises UserError if there is none, if none is whole, or if one cannot be read that may be whole. Removed, if one is
    removed meanwhile.
    """
    folders = _choose(run_dir, step)
    damages: list[Damage] = []
    for folder in folders:
        try:
            with of_checkpoint(folder), telling_obstacles(folder):
                return read(folder), damages
        except (OSError, KeyError, TypeError, ValueError) as error:
            damages.append(Damage(folder, str(error)))
    reasons = "; ".join(f"{damage.dir.name}: {damage.reason}" for damage in damages)
    raise UserError(f"{run_dir} has no whole checkpoint ({reasons}); restore one from a copy")


def _choose(run_dir: Path, step: int | None) -> list[Path]:
    """The committed checkpoints, newest first, or that of `step` alone. Raises UserError if there is none."""
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}; give the folder that launch/train.py wrote with --output")
    folders = committed(run_dir)
    if not folders:
        if run := next((path for path in run_dir.resolve().parents if committed(path)), None):
            raise UserError(f"{run_dir} is a part of a run; give the run itself, {run}, and choose with --step")
        raise UserError(f"{run_dir} has no checkpoint yet; train with checkpoint.every, or to the last step")
    if step is None:
        return folders
    chosen = [folder for folder in folders if folder.name == step_name(step)]
    if not chosen:
        steps = ", ".join(folder.name for folder in folders)
        raise UserError(f"{run_dir} has no checkpoint of step {step}; it has {steps}")
    return chosen


def open_described(folder: Path, name: str) -> Checkpoint:
    """The checkpoint in `folder` of which only the manifest and the file `name` are needed, and compared.

    Raises UserError if they are not there, or not as they were written.
    """
    try:
        with telling_obstacles(folder):
            manifest = _read_manifest(folder)
            problem = _problem(folder, name, manifest["files"][name])
        if problem:
            raise ValueError(problem)
        return Checkpoint(folder, CheckpointState(**manifest["state"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} is no checkpoint whose {MANIFEST_NAME} and {name} can be read ({error}); those that were saved "
            "with it are needed; restore them from a copy"
        ) from error


def manifest_text(state: CheckpointState, files: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands in manifest.json: `files` has size and SHA-256 by the path within the checkpoint."""
    # Through JSON first, so that the digest is of what a reader will find: a tuple is then a list.
    manifest = json.loads(json.dumps({"format_version": FORMAT_VERSION, "state": asdict(state), "files": files}))
    return json.dumps({**manifest, "digest": _digest(manifest)}, indent=1)


def read_state(folder: Path) -> CheckpointState:
    """What a checkpoint's manifest says it is; its files are not looked at.

    Raises OSError, KeyError, TypeError or ValueError if the manifest is not as it was written.
    """
    return CheckpointState(**_read_manifest(folder)["state"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST_NAME} is missing") from None
    except ValueError as error:
        raise ValueError(f"{MANIFEST_NAME} is no JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{MANIFEST_NAME} is nested too deeply to be one") from None
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {manifest['format_version']}, {FORMAT_VERSION} is needed")
    if manifest["digest"] != _digest(manifest):
        raise ValueError(f"{MANIFEST_NAME} differs from its own digest")
    return dict(manifest)


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content but for the digest itself."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_listed(folder: Path) -> Checkpoint:
    """A checkpoint whose files are there in their sizes, with the records that torch wrote: their storages may differ.

    Raises OSError, KeyError, TypeError or ValueError if something is not as it was written.
    """
    return _check(folder, _problem_of_list)


def _check(folder: Path, problem_of: Callable[[Path, str, Mapping[str, Any]], str]) -> Checkpoint:
    """A checkpoint none of whose files has a problem; any error names what is not as its manifest says."""
    manifest = _read_manifest(folder)
    records = manifest["files"].items()
    with ThreadPoolExecutor(min(HASHING_THREADS, len(records) or 1)) as pool:
        for problem in pool.map(lambda item: problem_of(folder, *item), records):
            if problem:
                raise ValueError(problem)
    state = CheckpointState(**manifest["state"])
    if folder.name != step_name(state.step):
        raise ValueError(f"its manifest is of step {state.step}")
    return Checkpoint(folder, state)


def _problem(folder: Path, name: str, record: Mapping[str, Any]) -> str:
    """What is wrong with a file; empty if nothing is."""
    if problem := _problem_of_size(folder, name, record):
        return problem
    return "" if sha256(folder / name) == record["sha256"] else f"{name} differs from its SHA-256 in the manifest"


def _problem_of_list(folder: Path, name: str, record: Mapping[str, Any]) -> str:
    """Likewise, but of what torch wrote only the list of its records, and those that are no storages."""
    if not record["records_sha256"]:
        return _problem(folder, name, record)
    if problem := _problem_of_size(folder, name, record):
        return problem
    if records_sha256(folder / name) != record["records_sha256"]:
        return f"the list of records in {name} differs from its SHA-256 in the manifest"
    check_descriptions(folder / name)
    return ""


def _problem_of_size(folder: Path, name: str, record: Mapping[str, Any]) -> str:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != record["size"]:
        return f"{name} has {path.stat().st_size} bytes, {record['size']} are needed"
    return ""
