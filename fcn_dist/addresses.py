"""Addresses of files elsewhere: which are allowed, and how messages may show them."""

import os
import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from fcn_dist.errors import UserError

COMMAND_SCHEMES = {"pipe", "cmd", "command", "shell", "exec", "sh", "bash"}
# What fsspec knows besides stores: this machine's own files and memory, and wrappers around another file system.
MACHINE_SCHEMES = {"file", "local", "memory"}
LOCAL_SCHEMES = {*MACHINE_SCHEMES, "data", "asynclocal", "git", "pyscript"}
WRAPPERS = {"async_wrapper", "asyncwrapper", "blockcache", "cached", "dask", "dir", "filecache", "generic"}
WRAPPERS |= {"libarchive", "reference", "simplecache", "tar", "zip"}
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
ALLOWED = "https://, s3://, gs:// or another store that fsspec knows"


def shown_url(url: str) -> str:
    """`url` as messages show it: without user, password and query, which may be secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition(":")[0] + ":..."
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_url(text: str) -> bool:
    """Whether `text` begins with a scheme, allowed or not; a relative path with a colon needs `./` before it."""
    return re.match(r"[A-Za-z][A-Za-z0-9+._-]*:", text) is not None


def check_url(url: str, of_machine: bool = False) -> None:
    """Raise UserError unless `url` names a file in a store that can be read here, or, if `of_machine`, on this machine.

    What would run a command, what wraps or chains file systems, and what fsspec does not know is refused. A client
    that is not installed is named with the extra that brings it.
    """
    scheme = url.partition(":")[0]
    if scheme.lower() in COMMAND_SCHEMES:
        raise UserError(f"{shown_url(url)} would run a command, and is refused; {ALLOWED} is needed")
    refused = (LOCAL_SCHEMES | WRAPPERS) - (MACHINE_SCHEMES if of_machine else set())
    if "::" in url or scheme in refused:
        raise UserError(
            f"{shown_url(url)} is no plain address in a store; {ALLOWED} is needed; give files of this machine by path"
        )
    try:
        store_class(scheme)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        change = f"pip install 'fcn-dist[{extra}]'" if extra else str(error)
        raise UserError(f"{shown_url(url)} cannot be read: a client for {scheme}:// is needed; {change}") from error
    except ValueError:
        known = False
    else:
        known = re.match(r"[^:]*://.", url) is not None
    if not known:
        raise UserError(f"{shown_url(url)} is no address that fsspec knows; {ALLOWED} is needed")


def store_class(scheme: str) -> Any:
    """fsspec's class for a scheme; ValueError if there is none, ImportError if its client is not installed."""
    import fsspec

    # gcsfs reads this when it is imported. It would ask by gRPC what kind of bucket it meets, and what gRPC starts in a
    # process is not fit for a fork. Who has such buckets sets it otherwise.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    return fsspec.get_filesystem_class(scheme)
