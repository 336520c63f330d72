"""The address of a zipped scenes folder in; a scenes folder that is whole and checked out."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fcn_dist.data.diskspace import writing
from fcn_dist.data.download.extract import DEFAULT_MAX_SIZE, BadZip, extract
from fcn_dist.data.download.fetch import Wait, fetch, forget, is_fetched
from fcn_dist.data.flocks import is_at, try_lock, unlock_and_close
from fcn_dist.data.scenes.class_info import OBJECT_INFO_NAME, read_classes
from fcn_dist.data.scenes.listing import IMAGE_DIR, MASK_DIR, Problem, find_pairs
from fcn_dist.errors import UserError, named
from fcn_dist.files import sync

DEFAULT_URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
# As projects that fetch this very address publish it (GluonCV, Segmenter). SHA-1 still serves here: two files can be
# made to have one digest, but none is known to have been made for a digest that was there first.
DEFAULT_CHECKSUM = "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"
ALGORITHMS = ("md5", "sha1", "sha256", "sha512")
_LOCK, _ZIP, _SCENES = "lock", "scenes.zip", "scenes"


@dataclass(frozen=True)
class SceneCounts:
    """What a checked scenes folder holds."""

    classes: int
    pairs: dict[str, int]  # by split
    downloaded: bool  # False: it was there already


@dataclass(frozen=True)
class Checksum:
    """A file's digest as it must be."""

    algorithm: str
    digest: str  # hexadecimal

    @classmethod
    def parse(cls, text: str) -> "Checksum":
        """From ALGORITHM:HEX; raises UserError if that is none."""
        algorithm, _, digest = text.strip().lower().partition(":")
        length = 2 * hashlib.new(algorithm).digest_size if algorithm in ALGORITHMS else None
        if len(digest) != length or set(digest) - set("0123456789abcdef"):
            raise UserError(
                f"--hash is {text!r}; ALGORITHM:HEX is needed, such as sha256 and its 64 hexadecimal digits; the "
                f"algorithm is one of {', '.join(ALGORITHMS)}"
            )
        return cls(algorithm, digest)

    def check(self, path: Path, url: str) -> None:
        """Raise BadZip if the file at `path` has another."""
        with path.open("rb") as file:
            found = hashlib.file_digest(file, self.algorithm).hexdigest()
        if found != self.digest:
            raise BadZip(
                f"{url} gave a file with {self.algorithm} {found}; {self.digest} is needed; the file was removed; "
                f"download it again, or, if it is the one that you want, give --hash {self.algorithm}:{found}"
            )


def download(
    out: Path | str,
    url: str = DEFAULT_URL,
    *,
    checksum: str | None = None,
    size: int | None = None,
    max_size: int = DEFAULT_MAX_SIZE,
    keep_zip: bool = False,
    wait: Wait = time.sleep,
) -> SceneCounts:
    """Fetch the zip at `url`, and make `out` the scenes folder in it; nothing is fetched if `out` is one already.

    `checksum` (ALGORITHM:HEX) and `size` (bytes) are those of the zip; the default address has a known checksum.
    Neither the zip nor what is in it may exceed `max_size` bytes. With `keep_zip` the zip stays at OUT.zip. A call that
    is killed leaves `.OUT.download` beside `out`, from which the next one goes on. `wait` sleeps between tries.

    Raises UserError for what is wrong with the address, the zip, its scenes, the options or the disk.
    """
    if checksum is None and url == DEFAULT_URL:
        checksum = DEFAULT_CHECKSUM
    required = None if checksum is None else Checksum.parse(checksum)
    for option, value in (("size", size), ("max-size", max_size)):
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; at least 1 is needed")
    # Links in the way are followed now, so that what is renamed to `place` is on its own disk.
    place = Path(out).resolve()
    work_dir = place.parent / f".{place.name}.download"
    zip_path = work_dir / _ZIP
    if _is_filled(place) and not work_dir.exists():
        return _existing(place)  # which may lie on a disk that nothing can be written to
    with _only_run(work_dir, place):
        kept_path = place.parent / f"{place.name}.zip"
        if keep_zip and kept_path.exists():
            raise UserError(f"{kept_path} exists; --keep-zip needs that name; move it away, or leave out --keep-zip")
        shutil.rmtree(work_dir / _SCENES, ignore_errors=True)  # of a run that was killed
        if _is_filled(place):
            counts = _existing(place)
        else:
            _check_replaceable(place)
            fetch(url, zip_path, size, max_size, wait)
            counts = _unpack(zip_path, url, place, required, max_size)
        with writing(place.parent, None):
            if keep_zip and is_fetched(url, zip_path):
                zip_path.replace(kept_path)
            forget(zip_path)
    return counts


def check_scenes(scenes_dir: Path) -> SceneCounts:
    """Read the classes and pair the files of all splits; raises UserError if a file has no partner."""
    classes = read_classes(scenes_dir)
    folders = [path for kind in (IMAGE_DIR, MASK_DIR) for path in (scenes_dir / kind).glob("[!.]*") if path.is_dir()]
    if not folders:
        raise UserError(f"{scenes_dir} has no split; {IMAGE_DIR}/SPLIT/*.jpg and {MASK_DIR}/SPLIT/*.png are needed")
    pairs: dict[str, int] = {}
    problems: list[Problem] = []
    for split in sorted({path.name for path in folders}):
        found, more = find_pairs(scenes_dir, split)
        pairs[split] = len(found)
        problems += more
    if problems:
        shown = named([f"{p.path.relative_to(scenes_dir)}: {p.kind}: {p.detail}" for p in sorted(problems)])
        raise UserError(f"{scenes_dir} has {len(problems)} files that make no pair ({shown}); restore these")
    return SceneCounts(len(classes), pairs, downloaded=True)


def _is_filled(place: Path) -> bool:
    try:
        return place.exists() and not (place.is_dir() and not any(place.iterdir()))
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error}); choose another folder, or make it readable") from error


def _existing(place: Path) -> SceneCounts:
    try:
        return replace(check_scenes(place), downloaded=False)
    except (UserError, OSError) as error:
        raise UserError(
            f"{place} exists and is no whole scenes folder ({error}); a new or empty folder is needed; choose another "
            "one, or remove it"
        ) from error


def _check_replaceable(place: Path) -> None:
    if place.is_mount() or place == Path.cwd():
        raise UserError(
            f"{place} is the current folder or the top of a disk, which the finished folder cannot take the place of; "
            f"a folder in it is needed, such as {place / 'scenes'}"
        )


@contextmanager
def _only_run(work_dir: Path, place: Path) -> Iterator[None]:
    """Hold `work_dir` for this process alone; a kill lets go of it."""
    lock_path = work_dir / _LOCK
    while True:
        with writing(place.parent, None):
            work_dir.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # a run that has just ended took the folder away
        try:
            with writing(work_dir, None):
                is_ours = try_lock(descriptor)
            if not is_ours:
                raise UserError(
                    f"another run is downloading into {place}; only one may; wait for it to end, or choose another "
                    "folder"
                )
            if is_at(descriptor, lock_path):  # else a run that has just ended took the file away
                try:
                    yield
                finally:
                    _remove_if_empty(work_dir)
                return
        finally:
            unlock_and_close(descriptor)


def _remove_if_empty(work_dir: Path) -> None:
    with suppress(OSError):  # the folder may be another run's by the end
        if [path.name for path in work_dir.iterdir()] == [_LOCK]:
            (work_dir / _LOCK).unlink()
            work_dir.rmdir()


def _unpack(zip_path: Path, url: str, place: Path, required: Checksum | None, max_size: int) -> SceneCounts:
    unpacked_dir = zip_path.parent / _SCENES
    try:
        if required is not None:
            required.check(zip_path, url)
        extract(zip_path, unpacked_dir, max_size, url)
        scenes_dir = _find_scenes(unpacked_dir, url)
        try:
            counts = check_scenes(scenes_dir)
        except UserError as error:
            told = str(error).replace(str(scenes_dir), scenes_dir.name)
            raise BadZip(f"{url} holds no whole scenes folder: {told}; give another address with --url") from error
        with writing(place.parent, None):
            os.sync()  # once, instead of once a file
            scenes_dir.replace(place)
            sync(place.parent)
    except BadZip:
        forget(zip_path)
        raise
    finally:
        shutil.rmtree(unpacked_dir, ignore_errors=True)
    return counts


def _find_scenes(unpacked_dir: Path, url: str) -> Path:
    """The folder with images, annotations and classes: the zip's top, or a folder there."""
    tops = sorted(path for path in unpacked_dir.iterdir() if path.is_dir())
    scenes = [
        path
        for path in (unpacked_dir, *tops)
        if (path / IMAGE_DIR).is_dir() and (path / MASK_DIR).is_dir() and any(path.glob("objectInfo*.txt"))
    ]
    if len(scenes) != 1:
        found = named([path.name for path in scenes or tops]) or "no folder"
        raise BadZip(
            f"{url} holds {len(scenes)} scenes folders (at its top: {found}); one with {IMAGE_DIR}, {MASK_DIR} and "
            f"{OBJECT_INFO_NAME} is needed; give another address with --url"
        )
    return scenes[0]
