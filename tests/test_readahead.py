"""Read-ahead: the next files are fetched before they are needed, not more of them, and the background ends."""

import gc
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from loopback import Site, serving, status
from remote_files import SIZE, by_name, content, kept, processes, remote

from fcn_dist.data.remote.cache import NodeCache, RemoteFile
from fcn_dist.data.remote.readahead import ReadAhead
from fcn_dist.data.remote.urls import Retries
from fcn_dist.errors import UserError

pytestmark = pytest.mark.timeout(60)

AT_ONCE = Retries(tries=2, first=0)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as site:
        site.script = [by_name]
        yield site


@dataclass(frozen=True)
class WatchedCache(NodeCache):
    """Tells each fetch once it is over."""

    fetched: "queue.Queue[str]" = field(default_factory=queue.Queue)

    def fetch(self, file: RemoteFile) -> Path:
        try:
            return super().fetch(file)
        finally:
            self.fetched.put(file.url.rpartition("/")[2])

    def next(self) -> str:
        return self.fetched.get(timeout=30)


@pytest.fixture
def cache(tmp_path: Path) -> WatchedCache:
    return WatchedCache(tmp_path / "cache", 100 * SIZE, AT_ONCE)


class Uses:
    """`3.tar`, or the third name, is first used at position 30, and so on without end."""

    def __init__(self, site: Site, names: Iterator[str] | None = None) -> None:
        self.site = site
        self.names = names or (f"{number}.tar" for number in count())

    def __iter__(self) -> Iterator[tuple[int, RemoteFile]]:
        for number, name in enumerate(self.names):
            yield 10 * number, remote(self.site, name)


def background() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def ended() -> bool:
    for thread in background():
        thread.join(30)
    return not background()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert ended()


class Watched(threading.Condition):
    """Tells when the background waits for the consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.set()
        return super().wait(timeout)


def test_the_next_files_are_there_before_they_are_needed_and_no_more(site: Site, cache: WatchedCache) -> None:
    ahead = ReadAhead(cache, iter(Uses(site)), depth=2)
    changed = ahead._background._changed = Watched()
    assert not background(), "nothing runs before the consumer does"
    # The first file is the consumer's own affair, and so is what it passes in a leap.
    for position, numbers in ((0, [1, 2]), (9, []), (10, [3]), (35, [4, 5]), (99, [10, 11])):
        changed.waits.clear()
        ahead.advance(position)
        assert changed.waits.wait(30)
        assert [cache.next() for _ in numbers] == [f"{number}.tar" for number in numbers]
        assert cache.fetched.empty()
    assert set(kept(cache)) == {remote(site, f"{number}.tar").sha256 for number in (1, 2, 3, 4, 5, 10, 11)}


def test_what_the_consumer_has_passed_is_not_fetched(site: Site, cache: WatchedCache) -> None:
    ahead = ReadAhead(cache, iter(Uses(site)), depth=1)
    ahead.advance(70)
    assert cache.next() == "8.tar"
    assert site.paths == ["/8.tar"]


def test_a_file_that_is_used_again_soon_is_one_of_those_ahead(site: Site, cache: WatchedCache) -> None:
    names = iter(["0.tar", "1.tar", "1.tar", "1.tar", "2.tar", "3.tar"])
    ahead = ReadAhead(cache, iter(Uses(site, names)), depth=2)
    ahead.advance(0)
    assert [cache.next() for _ in range(4)] == ["1.tar"] * 3 + ["2.tar"]
    assert site.paths == ["/1.tar", "/2.tar"]
    ahead.advance(30)
    assert cache.next() == "3.tar"
    assert ended(), "after the last use"


def test_an_error_is_left_to_the_consumer_and_the_next_file_is_fetched(site: Site, cache: WatchedCache) -> None:
    site.script = [status(404), by_name]
    ahead = ReadAhead(cache, iter(Uses(site)), depth=2)
    ahead.advance(0)
    assert [cache.next(), cache.next()] == ["1.tar", "2.tar"]
    assert set(kept(cache)) == {remote(site, "2.tar").sha256}
    site.script = [status(404)]
    with pytest.raises(UserError, match=r"/1\.tar cannot be read"):
        cache.fetch(remote(site, "1.tar"))


def test_uses_that_fail_end_the_background_alone(site: Site, cache: WatchedCache) -> None:
    def uses() -> Iterator[tuple[int, RemoteFile]]:
        yield 10, remote(site, "a.tar")
        raise UserError("the consumer says so")

    ahead = ReadAhead(cache, uses(), depth=5)
    ahead.advance(0)
    assert cache.next() == "a.tar"
    assert ended()
    ahead.advance(10)


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_the_background_ends_with_the_consumer(site: Site, cache: WatchedCache, how: str) -> None:
    ahead = ReadAhead(cache, iter(Uses(site)), depth=1)
    ahead.advance(0)
    assert cache.next() == "1.tar"
    assert background()
    if how == "closed":
        ahead.close()
        assert ended()
    else:
        del ahead
        gc.collect()
        assert ended()


def test_one_made_before_a_fork_works_in_each_child(site: Site, cache: WatchedCache) -> None:
    ahead = ReadAhead(cache, iter(Uses(site)), depth=1)

    def consume(number: int) -> None:
        ahead.advance(10 * number)
        assert cache.next() == f"{number + 1}.tar"

    with processes(lambda: consume(0), lambda: consume(3)):
        pass
    assert sorted(site.paths) == ["/1.tar", "/4.tar"]
    assert not background()


def test_a_process_ends_although_a_file_is_being_fetched(site: Site, tmp_path: Path) -> None:
    asked, over = threading.Event(), threading.Event()

    def never(_: object) -> None:
        asked.set()
        over.wait(50)

    site.script = [never]
    script = tmp_path / "consumer.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from fcn_dist.data.remote.cache import NodeCache, RemoteFile\n"
        "from fcn_dist.data.remote.readahead import ReadAhead\n"
        f"file = RemoteFile({site.url!r}, 5, '0' * 64)\n"
        f"ahead = ReadAhead(NodeCache(Path({str(tmp_path / 'cache')!r}), 5), iter([(1, file)]), 1)\n"
        "ahead.advance(0)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        assert asked.wait(30)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said) == (0, b"")
    finally:
        over.set()
        process.kill()


def test_what_was_read_ahead_is_what_the_consumer_gets(site: Site, cache: WatchedCache) -> None:
    ahead = ReadAhead(cache, iter(Uses(site)), depth=1)
    ahead.advance(0)
    assert cache.next() == "1.tar"
    ahead.close()
    with cache.open(remote(site, "1.tar")) as copy:
        assert copy.read() == content("1.tar")
    assert site.paths == ["/1.tar"]
