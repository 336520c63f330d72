"""A split's folder while it is being packed: whose it is, what earlier runs have left in it, what it shall become."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fcn_dist.data.flocks import is_at, unlock_and_close
from fcn_dist.data.packing.plan import Part
from fcn_dist.data.packing.receipts import WORK_DIR, read_receipt, receipt_path
from fcn_dist.data.shard import INDEX_NAME
from fcn_dist.errors import UserError
from fcn_dist.files import write_text

PLAN_NAME = "plan.json"
# Where a file system has no locks, nothing guards against a mistake, but nothing else is lost.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def claimed(split_dir: Path, plan: dict[str, Any], part: Part | None, overwrite: bool) -> Iterator[None]:
    """Make the folder, and hold it against other runs; runs of other parts may be at work there as well.

    `plan` is what it shall become. Raises UserError if another run has the folder, or as `refuse_finished`.
    """
    work_dir = split_dir / WORK_DIR
    refuse_finished(split_dir, plan, overwrite)
    with ExitStack() as locks:
        locks.enter_context(_locked(work_dir / "lock", shared=part is not None, who="another run"))
        if part:
            own = work_dir / f"part-{part.number}-of-{part.total}.lock"
            locks.enter_context(_locked(own, shared=False, who="another run of this part"))
        try:
            refuse_finished(split_dir, plan, overwrite)  # another run may just have come to its end
        except UserError:
            close_work(split_dir)
            raise
        # The first to go: a folder with an index is a whole shard set.
        (split_dir / INDEX_NAME).unlink(missing_ok=True)
        yield


def refuse_finished(split_dir: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Raise UserError if the folder holds a shard set that is not to be overwritten.

    One that was planned just so, and whose plan is still there, is a run that was ended at its last steps.
    """
    if (split_dir / INDEX_NAME).exists() and not overwrite:
        with suppress(UserError):  # of a plan that cannot be read
            if read_plan(split_dir) == plan:
                return
        raise UserError(f"{split_dir} already holds a shard set; choose another folder, or replace it with --overwrite")


@contextmanager
def _locked(path: Path, shared: bool, who: str) -> Iterator[None]:
    """Hold a lock file, which ends with this process however that ends."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another run has just finished, and removed the folder
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise UserError(
                    f"{path.parent.parent} is being packed by {who}; one at a time is needed; wait for its end, or "
                    "choose another folder"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(descriptor)
                    raise
            if is_at(descriptor, path):
                break
            os.close(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):
            unlock_and_close(descriptor)


def write_plan(split_dir: Path, plan: dict[str, Any]) -> None:
    """Note what the split shall become."""
    write_text(split_dir / WORK_DIR / PLAN_NAME, json.dumps(plan) + "\n", flush=False)


def read_plan(split_dir: Path) -> dict[str, Any] | None:
    """What was noted, or None if nothing was."""
    path = split_dir / WORK_DIR / PLAN_NAME
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the same create command again to restore it") from error


def remove_leftovers(split_dir: Path, num_shards: int, part: Part | None) -> None:
    """Remove what a run was writing when it ended, and shards without a receipt or with no place in the plan."""
    name, notes = re.escape(split_dir.name), f"{re.escape(INDEX_NAME)}|{re.escape(PLAN_NAME)}"
    numbered = re.compile(rf"\.?{name}-(\d{{6,}})\.(?:tar|members\.npy|json)(\..+\.partial)?")
    other = re.compile(rf"\.(?:{notes})\..+\.partial")
    for folder in (split_dir / WORK_DIR, split_dir):  # receipts before what they vouch for
        for path in folder.iterdir() if folder.is_dir() else ():
            if match := numbered.fullmatch(path.name):
                number, is_partial = int(match[1]), match[2] is not None
                vouched = receipt_path(split_dir / f"{split_dir.name}-{match[1]}.tar").exists()
                stale = (is_partial or number >= num_shards or not vouched) and (part is None or part.has(number))
            else:
                stale = part is None and other.fullmatch(path.name) is not None
            if stale:
                path.unlink(missing_ok=True)


def close_work(split_dir: Path) -> None:
    """Remove what packing has noted, which nothing needs once there is an index."""
    shutil.rmtree(split_dir / WORK_DIR, ignore_errors=True)


def remove_if_empty(split_dir: Path, made: list[Path]) -> None:
    """Undo the making of a folder in which no shard was finished; `made` are the folders that were not there before."""
    work_dir = split_dir / WORK_DIR
    if any(read_receipt(split_dir / f"{path.stem}.tar") for path in work_dir.glob(f"{split_dir.name}-*.json")):
        return
    close_work(split_dir)
    for folder in made:
        with suppress(OSError):  # something else is there
            folder.rmdir()
