"""Where a model file lies in, the path of a checked local copy out; only what was named is fetched."""

import os
import re
from pathlib import Path

from fcn_dist.addresses import MACHINE_SCHEMES, check_url, is_url, shown_url
from fcn_dist.errors import UserError, named
from fcn_dist.files import default_cache_dir, replacing, sha256

FILE_NAME = "model.safetensors"  # that a folder is looked through for first
DIGEST = re.compile("[0-9a-fA-F]{64}")
HASH = re.compile(rf"sha256=({DIGEST.pattern})")


def local_copy(location: str | Path, digest: str | None = None) -> Path:
    """The path of a model file: its own, that of the one in a folder, or, if `location` is a URL that fsspec knows,
    that of a copy in the cache of this machine.

    A URL needs the SHA-256 of the file, as `digest` or at its end, `https://host/model.safetensors#sha256=...`; a path
    may have it. Raises UserError without it, if the file does not have it, if the URL cannot be fetched, or if a folder
    has no model file or several and none is named model.safetensors.
    """
    text = os.fspath(location)
    if not text:
        raise UserError("the model's name is empty; a model file, a folder with one, or an address is needed")
    if digest is not None and not DIGEST.fullmatch(digest):
        raise UserError(f"the SHA-256 that {shown_url(text)} must have is {digest!r}; 64 hexadecimal digits are needed")
    if not is_url(text) or Path(text).exists():
        path = _in_folder(Path(text)) if Path(text).is_dir() else Path(text)
        if digest and path.is_file() and (found := sha256(path)) != digest.lower():
            raise UserError(f"{path} has SHA-256 {found}, and {digest} is needed; get the file again")
        return path
    url, _, fragment = text.partition("#")
    check_url(url, of_machine=True)
    wanted = _stated(shown_url(url), fragment, digest)
    copy = default_cache_dir() / "models" / f"{wanted}.safetensors"
    if not (copy.is_file() and sha256(copy) == wanted):
        _fetch(url, wanted, copy)
    return copy


def _in_folder(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if folder / FILE_NAME in found:
        return folder / FILE_NAME
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"folder {folder} has {named([path.name for path in found])}; one model file, or one named {FILE_NAME}, is "
            "needed; name the file"
        )
    raise UserError(
        f"folder {folder} has no model file (.safetensors); one is needed; of a run, launch/convert.py makes it"
    )


def _stated(shown: str, fragment: str, digest: str | None) -> str:
    """The hash that the file at an address must have."""
    stated = HASH.fullmatch(fragment)
    if fragment and not stated:
        raise UserError(f"{shown} ends in #{fragment}; #sha256= and 64 hexadecimal digits are needed")
    wanted = (stated[1] if stated else digest or "").lower()
    if not wanted:
        raise UserError(
            f"the SHA-256 of {shown} is not stated; a file from elsewhere is taken only if it is the one "
            "that was meant; add #sha256= and its 64 hexadecimal digits to the address, or give --sha256"
        )
    if digest and digest.lower() != wanted:
        raise UserError(f"{shown} is stated to have two hashes, {wanted} and {digest}; leave one out")
    return wanted


def _fetch(url: str, wanted: str, copy: Path) -> None:
    import fsspec

    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as partial:
            store, path = fsspec.core.url_to_fs(url)
            if url.partition(":")[0] in MACHINE_SCHEMES and not store.isfile(path):
                raise UserError(f"{shown_url(url)} is no file; the address of a model file is needed; check it")
            store.get_file(path, str(partial))
            if (found := sha256(partial)) != wanted:
                raise UserError(
                    f"{shown_url(url)} has SHA-256 {found}, and {wanted} is needed; it is not the file that was meant; "
                    "ask whoever gave you the address"
                )
    except UserError:
        raise
    except Exception as error:  # each store's client raises kinds of its own
        # What it says may hold the address with what shown_url leaves out.
        reason = f"HTTP status {error.status}" if hasattr(error, "status") else type(error).__name__
        raise UserError(
            f"{shown_url(url)} cannot be fetched ({reason}); check the address, the network and the credentials for it"
        ) from error
