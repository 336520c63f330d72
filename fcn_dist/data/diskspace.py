"""A folder and what is to be written there in; a UserError with both figures out where the disk has no room."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from fcn_dist.errors import UserError


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError unless `needed` more bytes fit on the disk of `folder`."""
    if shutil.disk_usage(folder).free < needed:
        raise _full(folder, needed)


@contextmanager
def writing(folder: Path, needed: int | None) -> Iterator[None]:
    """Turn what goes wrong with writing the `needed` bytes (None: nobody knows) into a UserError.

    Only for what touches `folder` alone: a network's errors are OSErrors, too.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(folder, needed) from error
        raise UserError(f"{folder} cannot be written ({error}); choose a folder that this account can write") from error


def write_all(file: FileIO, block: bytes, folder: Path, needed: int | None) -> None:
    """Write the whole of `block`; the rest as `writing`."""
    view = memoryview(block)
    while view:
        # A disk that has just become full takes a part without an error.
        with writing(folder, needed):
            view = view[file.write(view) :]


def _full(folder: Path, needed: int | None) -> UserError:
    need = "an unknown number of bytes more is" if needed is None else f"{needed:,} bytes more are"
    return UserError(
        f"the disk of {folder} is full: {need} needed, {shutil.disk_usage(folder).free:,} are free; free some and run "
        "the command again, which goes on from here, or choose a folder on another disk"
    )
