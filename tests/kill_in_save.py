"""launch/train.py, but one rank kills itself at a named phase of a save.

    deepspeed tests/kill_in_save.py PHASE RANK SAVE [arguments of launch/train.py]

SAVE counts the saves of this process from 1. The launcher puts --local_rank=N first.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fcn_dist.checkpoints import commit, retention
from fcn_dist.commands.entry import run_script
from fcn_dist.training import keeper, writing

saves = 0


def die(*_: object) -> None:
    """What the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(action: Callable[..., Any], due: Callable[..., bool]) -> Callable[..., Any]:
    """`action`, or the end if `due` says so of its arguments."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if saves == save and due(*arguments):
            die()
        return action(*arguments, **options)

    return wrapped


def always(*_: object) -> bool:
    """Any time."""
    return True


def count_saves(action: Callable[..., Any]) -> Callable[..., Any]:
    """`action`, which begins each save."""

    def counted(of: keeper.Keeper, *arguments: Any) -> Any:
        global saves
        of.finish()  # what is still being written belongs to the save before, however slow the disk is
        saves += 1
        return action(of, *arguments)

    return counted


def named(name: str) -> Callable[..., bool]:
    """Whether the first argument is a path of that name."""
    return lambda path, *_: bool(path.name == name)


PHASES: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "taking copies": (keeper, "take_state", always),
    "in a file": (writing._Hashing, "write", lambda file, _: file.size > 0),
    "between files": (
        writing,
        "write_file",
        lambda path, _: path.parent.name == "deepspeed" and any(path.parent.iterdir()),
    ),
    "all written": (keeper.Keeper, "_gathered", always),
    "before the manifest": (commit, "write_text", named("manifest.json")),
    "before the rename": (Path, "rename", always),
    "before latest": (commit, "write_text", named("latest")),
    "before old ones go": (keeper, "retain", always),
}


def arm(phase: str) -> None:
    """Let the phase kill this process."""
    if phase == "while old ones go":
        retention.shutil.rmtree = half_removed  # type: ignore[attr-defined]
        return
    owner, name, due = PHASES[phase]
    setattr(owner, name, before(getattr(owner, name), due))


def half_removed(folder: Path, **_: object) -> None:
    """Remove one file of a folder, and die."""
    if saves == save and folder.name.endswith(retention.REMOVED):
        next(path for path in folder.rglob("*") if path.is_file()).unlink()
        die()
    remove(folder, ignore_errors=True)


remove = shutil.rmtree
launcher_options = [argument for argument in sys.argv[1:] if argument.startswith("--local_rank")]
phase, rank, save_number, *arguments = [argument for argument in sys.argv[1:] if argument not in launcher_options]
save = int(save_number)
keeper.Keeper.save = count_saves(keeper.Keeper.save)  # type: ignore[method-assign]
if os.environ["RANK"] == rank:
    arm(phase)
sys.argv = [sys.argv[0], *arguments]

if __name__ == "__main__":
    sys.exit(run_script("train"))
