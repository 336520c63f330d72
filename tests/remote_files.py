"""Files on a loopback server, the cache they are fetched into, and processes that fetch them."""

import fcntl
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

from loopback import Site, file

from fcn_dist.data.remote.cache import NodeCache, RemoteFile
from fcn_dist.data.remote.urls import Retries

SIZE = 1_200_000  # of every file here
LIMIT = 5 * SIZE
FORK = get_context("fork")


def empty_cache(folder: Path) -> NodeCache:
    """A cache for five files."""
    return NodeCache(folder / "cache", LIMIT, Retries(tries=3, first=0))


def content(name: str, size: int = SIZE) -> bytes:
    return Random(name).randbytes(size)


def remote(site: Site, name: str, size: int = SIZE) -> RemoteFile:
    url = f"{site.url.rpartition('/')[0]}/{name}"
    return RemoteFile(url, size, hashlib.sha256(content(name, size)).hexdigest())


def by_name(handler: BaseHTTPRequestHandler) -> None:
    """The reply of a server that has whatever is asked for."""
    file(content(handler.path.removeprefix("/")))(handler)


def read(cache: NodeCache, file: RemoteFile) -> bytes:
    with cache.open(file) as copy:
        return copy.read()


def kept(cache: NodeCache) -> dict[str, int]:
    """The sizes of all files of the cache but its lock."""
    return {
        path.name: path.stat().st_size for path in cache.dir.rglob("*") if path.is_file() and path != cache.dir / "lock"
    }


@contextmanager
def processes(*targets: Callable[[], object]) -> Iterator[list[BaseProcess]]:
    """One forked process a target; their failures fail the test, and none is left."""
    children: list[BaseProcess] = [FORK.Process(target=target) for target in targets]
    try:
        for child in children:
            child.start()
        yield children
        for child in children:
            child.join(40)
            assert child.exitcode is not None
        # A test that kills a process means to.
        assert {child.exitcode for child in children} <= {0, -signal.SIGKILL}
    finally:
        for child in children:
            child.kill()
            child.join()


@contextmanager
def locked(path: Path, size: int = 0) -> Iterator[None]:
    """A file that somebody has locked and does nothing with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as held:
        held.truncate(size)
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def broken_off(site: Site, cache: NodeCache, name: str) -> None:
    """Kill a process in the middle of downloading `name`; its partial file stays."""
    half_way, over = threading.Event(), threading.Event()

    def until_killed(_: object) -> None:
        half_way.set()
        over.wait(30)

    script, site.script = site.script, [file(content(name), until=SIZE // 2, then=until_killed)]
    try:
        with processes(lambda: cache.fetch(remote(site, name))) as (child,):
            assert half_way.wait(30)
            child.kill()
    finally:
        over.set()
        site.script = script
    assert kept(cache)[remote(site, name).sha256 + ".partial"] == SIZE
