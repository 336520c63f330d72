"""A zip file that nobody vouches for in; its files out, all of them under one folder."""

import re
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from fcn_dist.data.diskspace import check_space, write_all, writing
from fcn_dist.errors import UserError
from fcn_dist.progress import transfer_progress

DEFAULT_MAX_SIZE = 10**10  # bytes
MAX_MEMBERS = 1_000_000
MAX_NAME, MAX_PART = 1024, 255  # bytes; the second is what usual file systems allow
_BLOCK = 2**20
_ENCRYPTED = 0x1 | 0x40  # flag bits
# What zipfile raises over files that are damaged or made to do harm; OSError is of a seek to where no file goes on.
_DAMAGE = (BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError, OverflowError, OSError)


class BadZip(UserError):
    """The zip itself is at fault: nothing but another file helps."""


def extract(zip_path: Path, target_dir: Path, max_size: int = DEFAULT_MAX_SIZE, name: str | None = None) -> None:
    """Unpack all of `zip_path` into the new folder `target_dir`; `name` is what messages call the zip.

    All members are checked before one is written. Raises BadZip if it is no zip, a damaged one, or has a member that is
    no plain file or folder under `target_dir`; UserError above `max_size` unpacked bytes and for a full disk.
    """
    name = name or str(zip_path)
    try:
        with ZipFile(zip_path) as archive:
            members = archive.infolist()
            check_members(members, max_size, name)
            total = sum(member.file_size for member in members)
            check_space(target_dir.parent, total)
            with writing(target_dir.parent, total):
                target_dir.mkdir()
            with transfer_progress() as progress:
                task = progress.add_task("unpacking", total=total)
                for member in members:
                    _unpack(archive, member, target_dir, lambda n: progress.advance(task, n))
    except _DAMAGE as error:
        with zip_path.open("rb") as file:
            head = file.read(16)
        raise BadZip(
            f"{name} is no zip file, or a damaged one ({error}; it begins with {head!r}); a whole zip file is needed; "
            "download it again, or give another address"
        ) from error


def check_members(members: Sequence[ZipInfo], max_size: int, name: str) -> None:
    """Raise BadZip if a member may not be unpacked, UserError if all are too many or too large."""
    total = sum(member.file_size for member in members)
    if total > max_size:
        raise UserError(
            f"{name} unpacks to {total:,} bytes; at most {max_size:,} may come of it; raise --max-size if you trust it"
        )
    if len(members) > MAX_MEMBERS:
        raise BadZip(f"{name} has {len(members):,} members; at most {MAX_MEMBERS:,} may be; give another address")
    files: set[str] = set()
    folders: set[str] = set()
    for member in members:
        if fault := _fault(member):
            raise _refused(name, member, fault)
        path = member.orig_filename
        if path in files:
            raise _refused(name, member, "stands there twice")
        if not _is_folder(member):
            files.add(path)
        folders.update(path[: slash.start()] for slash in re.finditer("/", path))
    both = files & folders
    for member in members:
        if member.orig_filename in both:
            raise _refused(name, member, "is both a file and a folder")


def _is_folder(member: ZipInfo) -> bool:
    return member.orig_filename.endswith("/")  # ZipInfo.is_dir fails over an empty name


def _refused(name: str, member: ZipInfo, fault: str) -> BadZip:
    return BadZip(
        f"{name}: member {member.orig_filename[:100]!r} {fault}; plain files and folders with names within the zip's "
        "own folder are needed; nothing was unpacked; give another address"
    )


def _fault(member: ZipInfo) -> str:
    """Why a member may not be unpacked; empty if it may."""
    path = member.orig_filename.removesuffix("/")
    parts = path.split("/")
    mode = stat.S_IFMT(member.external_attr >> 16)  # 0 where the zip was not made on Unix
    if not path.isprintable() or "\\" in path:
        return "has a name with characters that no name may have"
    if path.startswith("/") or re.match("[A-Za-z]:", path):
        return "has an absolute name"
    if not {"", ".", ".."}.isdisjoint(parts):
        return "has a name that leads elsewhere"
    if len(path.encode()) > MAX_NAME or max(len(part.encode()) for part in parts) > MAX_PART:
        return f"has a name that is too long (at most {MAX_NAME} bytes, {MAX_PART} in each part)"
    if mode not in ((0, stat.S_IFREG, stat.S_IFDIR) if _is_folder(member) else (0, stat.S_IFREG)):
        return "is a link" if mode == stat.S_IFLNK else "is neither a file nor a folder"
    if member.flag_bits & _ENCRYPTED:
        return "is encrypted"
    # zipfile inflates what other methods have packed in one piece, however large.
    if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        return f"is packed by method {member.compress_type} (only stored and deflated ones can be read)"
    return ""


def _unpack(archive: ZipFile, member: ZipInfo, target_dir: Path, done: Callable[[int], None]) -> None:
    path = target_dir / member.orig_filename
    with writing(target_dir, None):
        (path if _is_folder(member) else path.parent).mkdir(parents=True, exist_ok=True)
    if _is_folder(member):
        return
    written = 0
    with archive.open(member) as source:
        # Exclusively: on a file system that takes two names for one, the second must not replace the first.
        with writing(target_dir, member.file_size):
            file = path.open("xb", buffering=0)
        with file:
            # Counted here, whatever the header says.
            while (block := source.read(_BLOCK)) and written + len(block) <= member.file_size:
                write_all(file, block, target_dir, member.file_size - written)
                written += len(block)
                done(len(block))
    if written != member.file_size:
        raise BadZipFile(f"{member.orig_filename!r} has another size than the {member.file_size} bytes stated")
