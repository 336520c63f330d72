"""The address of a model file with its hash in, a checked local copy out; only what was named is fetched."""

import os
import re
from pathlib import Path

from fcn_dist.addresses import shown_url
from fcn_dist.errors import UserError
from fcn_dist.files import default_cache_dir, replacing, sha256

SCHEMES = ("https", "http", "s3", "gs")  # and no other: fsspec also knows some that wrap others or run commands
DIGEST = re.compile("[0-9a-fA-F]{64}")
HASH = re.compile(rf"sha256=({DIGEST.pattern})")


def local_copy(location: str | Path, digest: str | None = None) -> Path:
    """The path of a model file: its own, or that of a copy in the cache of this machine if `location` is a URL.

    A URL needs the SHA-256 of the file, as `digest` or at its end, `https://host/model.safetensors#sha256=...`; a path
    may have it. Raises UserError without it, if the file does not have it, or if the URL cannot be fetched.
    """
    text = os.fspath(location)
    if digest is not None and not DIGEST.fullmatch(digest):
        raise UserError(f"the SHA-256 that {shown_url(text)} must have is {digest!r}; 64 hexadecimal digits are needed")
    if not re.match(r"[A-Za-z][A-Za-z0-9+._-]*:", text) or Path(text).exists():
        if digest and Path(text).is_file() and (found := sha256(Path(text))) != digest.lower():
            raise UserError(f"{text} has SHA-256 {found}, and {digest} is needed; get the file again")
        return Path(text)
    url, _, fragment = text.partition("#")
    shown = shown_url(url)
    if url.partition("://")[0] not in SCHEMES or "::" in url:
        schemes = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(f"{shown} is no address that models are fetched from; one of {schemes} is needed")
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
    copy = default_cache_dir() / "models" / f"{wanted}.safetensors"
    if not (copy.is_file() and sha256(copy) == wanted):
        _fetch(url, wanted, copy)
    return copy


def _fetch(url: str, wanted: str, copy: Path) -> None:
    import fsspec

    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as partial:
            store, path = fsspec.core.url_to_fs(url)
            store.get_file(path, str(partial))
            if (found := sha256(partial)) != wanted:
                raise UserError(
                    f"{shown_url(url)} has SHA-256 {found}, and {wanted} is needed; it is not the file that was meant; "
                    "ask whoever gave you the address"
                )
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{shown_url(url)} cannot be read: {error}; pip install 'fcn-dist[{url.partition(':')[0]}]'"
        ) from error
    except Exception as error:  # each store's client raises kinds of its own
        # What it says may hold the address with what shown_url leaves out.
        reason = f"HTTP status {error.status}" if hasattr(error, "status") else type(error).__name__
        raise UserError(
            f"{shown_url(url)} cannot be fetched ({reason}); check the address, the network and the credentials for it"
        ) from error
