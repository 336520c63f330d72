"""The run folder: run.json once, metrics.jsonl line by line."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fcn_dist
from fcn_dist.errors import UserError
from fcn_dist.files import naming, write_text

RUN_NAME = "run.json"
METRICS_NAME = "metrics.jsonl"
LOCK_NAME = ".lock"
TRAINING_SPLIT = "training"

Listener = Callable[[dict[str, Any]], None]  # takes in a line of the journal


@dataclass(frozen=True)
class RunRecord:
    """What run.json says of a run."""

    recipe: dict[str, Any]
    deepspeed: dict[str, Any]  # as resolved
    model: dict[str, Any]  # ModelDescription
    shards: str
    index_sha256: dict[str, str]  # by split
    world_size: int
    steps: int
    global_batch: int
    command: str
    folder: str  # that it was given in
    versions: dict[str, str]
    git: dict[str, Any]
    machine: dict[str, Any]


def refuse_foreign_folder(run_dir: Path) -> None:
    """Raise UserError if `run_dir` is there and holds something else than a run."""
    if not run_dir.exists() or (run_dir / RUN_NAME).exists():
        return
    if not run_dir.is_dir() or {path.name for path in run_dir.iterdir()} - {LOCK_NAME}:
        raise UserError(f"{run_dir} exists and is no run; a new or empty folder is needed; give another --output")


def write_run_record(run_dir: Path, record: RunRecord) -> None:
    """Write run.json."""
    write_text(run_dir / RUN_NAME, json.dumps(vars(record), indent=2) + "\n")


def read_run_record(run_dir: Path) -> RunRecord:
    """Read run.json; raises UserError if there is none, or it is none."""
    path = run_dir / RUN_NAME
    try:
        return RunRecord(**json.loads(path.read_text()))
    except OSError as error:
        raise UserError(
            f"{run_dir} is no run folder: {RUN_NAME} cannot be read ({error.strerror}); give the folder that "
            "launch/train.py wrote with --output"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no run record ({error}); restore it from a copy") from error


def environment() -> dict[str, dict[str, Any]]:
    """Versions, git state and machine, for run.json."""
    names = ("torch", "deepspeed", "webdataset", "numpy")
    return {
        "versions": {
            "fcn_dist": fcn_dist.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
        "git": _git_state(),
        "machine": {"host": platform.node(), "cores": os.cpu_count(), "system": platform.platform()},
    }


def command_line() -> str:
    """The command that started this process, as a shell would take it."""
    return shlex.join(sys.argv)


class Journal:
    """metrics.jsonl: one JSON object a line, each with `event`, `step` and `time` (seconds since 1970)."""

    def __init__(self, run_dir: Path, first_step: int, listeners: Sequence[Listener] = ()) -> None:
        """Continue the file after `first_step`: later lines belong to steps that are trained again.

        `listeners` are told every line, those that are kept first.
        """
        self.path, self._listeners = run_dir / METRICS_NAME, listeners
        lines = list(read_journal(run_dir))
        whole = self.path.read_bytes().count(b"\n") if self.path.exists() else 0
        self.left_out = whole - len(lines)  # lines that cannot be read
        kept = [(line, found) for line, found in lines if found["step"] <= first_step]
        write_text(self.path, "".join(line for line, _ in kept))
        for _, found in kept:
            self._tell(found)

    def write(self, event: str, step: int, **figures: Any) -> None:
        """Append one line. NaN and infinities, which JSON does not have, are written as null."""
        record = {"event": event, "step": step, "time": round(time.time(), 3), **_finite(figures)}
        line = json.dumps(record, allow_nan=False)
        with naming(self.path), self.path.open("a") as file:
            file.write(line + "\n")
        self._tell(record)

    def _tell(self, record: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener(record)


def read_journal(run_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl, as they are and what they say; those that a crash has damaged are left out."""
    path = run_dir / METRICS_NAME
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if (found := parse_line(line)) is not None:
                yield line, found


def parse_line(line: str) -> dict[str, Any] | None:
    """What a line of the journal says; None if it is none: cut off by a kill, or not what was written."""
    try:
        found = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    event, step, seconds = (found.get(key) for key in ("event", "step", "time"))
    whole = isinstance(event, str) and isinstance(step, int) and isinstance(seconds, (int, float))
    return found if whole else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _git_state() -> dict[str, Any]:
    """Commit of the code's checkout and whether it was changed; empty for an installed package."""
    folder = Path(fcn_dist.__file__).parent
    commands = {"commit": ["rev-parse", "HEAD"], "changes": ["status", "--porcelain", "--untracked-files=no"]}
    state: dict[str, Any] = {}
    for name, arguments in commands.items():
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        if done.returncode:
            return {}
        state[name] = done.stdout.strip()
    return {"commit": state["commit"], "clean": not state["changes"]}
