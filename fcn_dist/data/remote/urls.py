"""Remote files: a URL in, bytes out, and the retries.

Everything goes through fsspec. Credentials, endpoints and proxies are taken from where fsspec and the clients look for
them themselves (`~/.config/fsspec`, FSSPEC_S3_..., AWS_ENDPOINT_URL, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS);
nothing is passed on here.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fcn_dist.addresses import check_url, shown_url
from fcn_dist.data.remote.transfer import blocks, opened, status_of
from fcn_dist.errors import UserError


@dataclass(frozen=True)
class Retries:
    """How often and after which waits a read that brings nothing is tried again; waits double, with jitter."""

    tries: int = 8  # in a row without a new byte
    first: float = 0.5  # seconds
    longest: float = 30.0
    sleep: Callable[[float], object] = time.sleep

    def wait(self, failures: int) -> None:
        """Sleep after the `failures`-th failure in a row."""
        # Not the shared generator: processes that were forked together would all come back together.
        jitter = random.SystemRandom().uniform(0.5, 1)
        self.sleep(min(self.longest, self.first * 2.0 ** (failures - 1)) * jitter)


def read_start(url: str, size: int, retries: Retries = Retries()) -> bytes:
    """The first `size` bytes of a file, or all of a shorter one; errors as of `read_blocks`."""
    return b"".join(read_blocks(url, size, retries, exact=False))


def read_blocks(url: str, size: int, retries: Retries = Retries(), exact: bool = True) -> Iterator[bytes]:
    """The first `size` bytes of a file in order, in blocks; fewer bytes if the file ends before.

    `exact` says that the file has so many bytes, so that an early end is doubted.

    After each failure comes an empty block, so that the caller can show that it is still alive. Raises UserError
    after `retries.tries` failures in a row, and at once if the store says that it will not give the file.
    """
    check_url(url)
    offset = failures = 0
    while offset < size:
        try:
            with opened(url) as (fs, path):
                for block in blocks(fs, path, offset, size, exact):
                    yield block
                    offset += len(block)
                    failures = 0
            return
        except Exception as error:
            failures += 1
            _judge(url, error, failures, retries)
        yield b""
        retries.wait(failures)


def _judge(url: str, error: Exception, failures: int, retries: Retries) -> None:
    """Raise UserError unless it is worth trying again."""
    if _is_final(error):
        raise UserError(
            f"{shown_url(url)} cannot be read ({_reason(error, url)}); check the address and the credentials for it"
        ) from error
    if failures >= retries.tries:
        raise UserError(
            f"{shown_url(url)} could not be read in {failures} tries ({_reason(error, url)}); check the store and the "
            "network, then start again"
        ) from error


def _reason(error: Exception, url: str) -> str:
    # What clients say of a status holds the address with all that shown_url leaves out.
    status = status_of(error)
    if status is not None:
        return f"HTTP status {status}"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return str(error).replace(url, shown_url(url)) or type(error).__name__


def _is_final(error: Exception) -> bool:
    status = status_of(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    # ValueError: a malformed address, or a certificate that does not hold. botocore's errors are told by name, for it
    # is not always installed.
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError)
    return isinstance(error, kinds) or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")
