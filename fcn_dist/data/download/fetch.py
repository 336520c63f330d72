"""An address in; its whole file out, in as many tries as it takes, each from where the last one ended."""

import json
import random
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from fcn_dist.data.diskspace import check_space, write_all, writing
from fcn_dist.data.download.rangerequest import Answer, Changed, Origin, Trouble, ask, check_url
from fcn_dist.errors import UserError
from fcn_dist.files import sync, write_text
from fcn_dist.progress import transfer_progress

TIMEOUT = 60.0  # seconds without a byte
MAX_TRIES = 8  # in a row that bring nothing new
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
LONGEST_RETRY_AFTER = 300.0  # however long a server asks for
_BLOCK = 2**18

Wait = Callable[[float], None]
Show = Callable[[int, int | None], None]  # bytes here, bytes of the whole


class _Partial:
    """The part of a file that is here and, in a file beside it, which version of which file it is a part of."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        self.origin = self._read_origin()
        self.have = path.stat().st_size if self.origin and path.exists() else 0

    def _read_origin(self) -> Origin | None:
        try:
            origin = Origin(**json.loads(_origin_path(self.path).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return origin if origin.url == self.url else None

    @property
    def whole(self) -> bool:
        """Whether all is here; never where the server does not say how much that is."""
        return self.origin is not None and self.origin.size == self.have

    def restart(self, origin: Origin) -> None:
        """Begin anew with another version."""
        # Emptied before it is renamed a part of this version: killed in between, an empty file is a part of any.
        self.path.write_bytes(b"")
        sync(self.path)
        self.have = 0
        self.adopt(origin)

    def adopt(self, origin: Origin) -> None:
        """What is here is a part of `origin`."""
        if origin != self.origin:
            write_text(_origin_path(self.path), json.dumps(asdict(origin)) + "\n")
            self.origin = origin

    def forget(self) -> None:
        """What is here is a part of nothing."""
        forget(self.path)
        self.origin, self.have = None, 0


def _origin_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.origin.json")


def forget(path: Path) -> None:
    """Remove what `fetch` has written."""
    _origin_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def is_fetched(url: str, path: Path) -> bool:
    """Whether `path` is the whole file of `url`, as far as its server has said."""
    return _Partial(path, url).whole


def fetch(
    url: str, path: Path, size: int | None, max_size: int, wait: Wait = time.sleep, timeout: float = TIMEOUT
) -> None:
    """Fetch `url` into `path`, from where an earlier call has ended, were it killed.

    It must have `size` bytes, and at most `max_size` if that is None. `wait` sleeps between tries. Raises UserError for
    an address without a file, another size, a disk that is full, and after MAX_TRIES tries that brought nothing new.
    """
    check_url(url)
    partial = _Partial(path, url)
    farthest, tries = partial.have, 0
    with transfer_progress() as progress:
        task = progress.add_task("downloading", completed=partial.have, total=size)

        def show(have: int, whole: int | None) -> None:
            progress.update(task, completed=have, total=whole, description="downloading")

        while not partial.whole:
            try:
                _fetch_rest(partial, size, max_size, timeout, show)
            except Trouble as trouble:
                if isinstance(trouble, Changed):
                    partial.forget()
                # A server that always begins anew brings nothing new before it comes farther than ever.
                tries = 0 if partial.have > farthest else tries + 1
                farthest = max(farthest, partial.have)
                if tries == MAX_TRIES:
                    raise _given_up(partial, trouble) from trouble
                seconds = _pause(tries, trouble.retry_after)
                progress.update(task, description=f"{trouble}; next try in {seconds:.0f} s")
                wait(seconds)
    try:
        _check_size(url, partial.have, size, max_size)
    except UserError:
        partial.forget()
        raise


def _fetch_rest(partial: _Partial, size: int | None, max_size: int, timeout: float, show: Show) -> None:
    answer = ask(partial.url, partial.have, partial.origin, timeout)
    with closing(answer.response):
        if answer.origin.size is not None:
            # Before anything here is replaced.
            _check_size(partial.url, answer.origin.size, size, max_size)
        needed = None if answer.origin.size is None else answer.origin.size - answer.start
        with writing(partial.path.parent, needed):
            if answer.start == 0:
                partial.restart(answer.origin)
            else:
                partial.adopt(answer.origin)
        _receive(partial, answer, size, max_size, show)


def _receive(partial: _Partial, answer: Answer, size: int | None, max_size: int, show: Show) -> None:
    folder, whole = partial.path.parent, answer.origin.size
    if whole is not None:
        check_space(folder, whole - partial.have)
    # One more than may come, where nobody says how many do: too many are seen, and an endless body ends.
    end = (max_size if size is None else size) + 1 if whole is None else whole
    with partial.path.open("ab", buffering=0) as file:
        while partial.have < end and (block := answer.read(min(_BLOCK, end - partial.have))):
            write_all(file, block, folder, None if whole is None else whole - partial.have)
            partial.have += len(block)
            show(partial.have, whole)
    wanted = size if whole is None else whole
    if wanted is not None and partial.have < wanted:
        raise Trouble(f"the connection ended after {partial.have:,} of {wanted:,} bytes")
    if whole is None:
        partial.adopt(replace(answer.origin, size=partial.have))


def _check_size(url: str, found: int, size: int | None, max_size: int) -> None:
    if size is not None and found != size:
        raise UserError(f"{url} gives {found:,} bytes; {size:,} are needed; correct --size or the address")
    if found > max_size:
        raise UserError(f"{url} gives {found:,} bytes or more; at most {max_size:,} may come; raise --max-size")


def _pause(tries: int, retry_after: float | None) -> float:
    # Jitter, so that the nodes of a cluster that failed together do not all come back together.
    seconds = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** max(tries - 1, 0)) * random.uniform(0.5, 1)
    return max(seconds, min(retry_after or 0.0, LONGEST_RETRY_AFTER))


def _given_up(partial: _Partial, trouble: Trouble) -> UserError:
    of_whole = f" of {partial.origin.size:,}" if partial.origin and partial.origin.size is not None else ""
    return UserError(
        f"{partial.url} cannot be fetched: {MAX_TRIES} tries in a row brought nothing new, the last for {trouble}; "
        f"{partial.have:,}{of_whole} bytes are here and kept; run the command again later to go on from there, or "
        "give another address with --url"
    )
