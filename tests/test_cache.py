"""The node cache: one download for all processes of a node, and nothing but whole and true bytes."""

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from loopback import Site, drop, file, status
from remote_files import FORK, SIZE, broken_off, by_name, content, empty_cache, kept, locked, processes, read, remote
from s3_server import BUCKET, serving_s3

from fcn_dist.data import flocks
from fcn_dist.data.flocks import Patience
from fcn_dist.data.remote.cache import NodeCache, RemoteFile
from fcn_dist.data.remote.urls import Retries
from fcn_dist.errors import UserError
from fcn_dist.files import default_cache_dir

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return empty_cache(tmp_path)


def test_a_file_is_fetched_once_and_lies_under_its_digest(site: Site, cache: NodeCache) -> None:
    site.script = [by_name]
    wanted = remote(site, "a.tar")
    path = cache.fetch(wanted)
    assert path == cache.dir / wanted.sha256[:2] / wanted.sha256
    assert path.read_bytes() == content("a.tar") == read(cache, wanted)
    elsewhere = replace(wanted, url="https://nowhere.invalid/val/a.tar")
    assert cache.fetch(elsewhere) == path
    assert len(site.requests) == 1
    assert kept(cache) == {wanted.sha256: SIZE}


def test_an_empty_file_is_a_file(site: Site, cache: NodeCache) -> None:
    site.script = [file(b"")]
    assert read(cache, remote(site, "empty", 0)) == b""


def drop_at_once(handler: BaseHTTPRequestHandler) -> None:
    drop(handler.connection)


def test_a_file_comes_through_drops_and_a_server_that_is_away(site: Site, cache: NodeCache) -> None:
    data = content("a.tar")
    site.script = [status(503), drop_at_once, file(data, until=1_000_000), file(data, until=1_100_000, ranges=False)]
    site.script += [status(503), file(data)]
    assert read(replace(cache, retries=Retries(tries=6, first=0)), remote(site, "a.tar")) == data


def test_a_file_is_fetched_from_s3(cache: NodeCache) -> None:
    with serving_s3() as client:
        client.put_object(Bucket=BUCKET, Key="training/a.tar", Body=content("a.tar"))
        client.put_object(Bucket=BUCKET, Key="training/b.tar", Body=content("a.tar"))
        wanted = RemoteFile(f"s3://{BUCKET}/training/a.tar", SIZE, hashlib.sha256(content("a.tar")).hexdigest())
        with processes(*[lambda: read(cache, wanted)] * 3):
            pass
        assert read(cache, wanted) == content("a.tar")
        other = replace(wanted, url=f"s3://{BUCKET}/training/b.tar", sha256=hashlib.sha256(b"").hexdigest())
        with pytest.raises(UserError, match=r"s3://scenes/training/b\.tar is refused"):
            cache.fetch(other)


@pytest.mark.parametrize("wrong", [content("b.tar"), content("a.tar")[:-1] + b"\0", content("a.tar")[:-1], b""])
def test_wrong_bytes_are_fetched_anew_once_and_then_refused(site: Site, cache: NodeCache, wrong: bytes) -> None:
    wanted = remote(site, "a.tar")
    site.script = [file(wrong), by_name]
    assert read(cache, wanted) == content("a.tar")
    assert len(site.requests) == 2

    cache.discard(wanted)
    site.script = [file(wrong)]
    with pytest.raises(UserError, match=r"/a\.tar is refused: 2 times its first (\d+) bytes had the SHA") as caught:
        cache.fetch(wanted)
    assert f"first {len(wrong)} bytes" in str(caught.value)
    assert hashlib.sha256(wrong).hexdigest() in str(caught.value) and wanted.sha256 in str(caught.value)
    assert len(site.requests) == 4
    assert kept(cache) == {}


def test_a_file_that_cannot_be_had_leaves_nothing(site: Site, cache: NodeCache) -> None:
    for reply, words in ((status(404), "HTTP status 404"), (status(503), "in 3 tries")):
        site.script = [reply]
        with pytest.raises(UserError, match=words):
            cache.fetch(remote(site, "a.tar"))
        assert kept(cache) == {}


@pytest.mark.parametrize(
    ("size", "digest"), [(-1, "0" * 64), (1, "../" * 21 + "0"), (1, "A" * 64), (1, "0" * 63), (1, "0" * 64 + "\n")]
)
def test_what_cannot_be_a_size_and_digest_is_no_file(size: int, digest: str) -> None:
    with pytest.raises(ValueError, match="no SHA-256 and size"):
        RemoteFile("https://host/a.tar", size, digest)


def test_many_processes_at_once_are_one_download(site: Site, cache: NodeCache) -> None:
    count = 6
    ready = FORK.Semaphore(0)
    wanted = remote(site, "a.tar")

    def when_all_wait(handler: BaseHTTPRequestHandler) -> None:
        for _ in range(count):
            assert ready.acquire(timeout=30)
        by_name(handler)

    def fetch() -> None:
        ready.release()
        assert read(cache, wanted) == content("a.tar")

    site.script = [by_name, when_all_wait]
    cache.fetch(remote(site, "first.tar"))  # this process has used the network before it forks
    with processes(*[fetch] * count):
        pass
    assert site.paths == ["/first.tar", "/a.tar"]
    assert wanted.sha256 in kept(cache)


def test_a_download_whose_process_is_killed_is_taken_over(site: Site, cache: NodeCache) -> None:
    site.script = [by_name]
    wanted = remote(site, "a.tar")
    broken_off(site, cache, "a.tar")
    assert read(cache, wanted) == content("a.tar")
    assert kept(cache) == {wanted.sha256: SIZE}


def test_who_waits_for_a_process_that_is_killed_takes_over(site: Site, cache: NodeCache) -> None:
    wanted = remote(site, "a.tar")
    half_way, waiting = threading.Event(), FORK.Event()

    def until_killed(_: object) -> None:
        half_way.set()
        waiting.wait(30)

    def wait_for_it() -> None:
        # Told from inside the wait, so that the download is under way and locked by another.
        class Told(Patience):
            def wait(self, state: object) -> bool:
                waiting.set()
                return super().wait(state)

        flocks.Patience = Told  # type: ignore[misc]
        assert read(cache, wanted) == content("a.tar")

    site.script = [file(content("a.tar"), until=SIZE // 2, then=until_killed), by_name]
    with processes(lambda: cache.fetch(wanted)) as (first,):
        assert half_way.wait(30)
        with processes(wait_for_it):
            assert waiting.wait(30)
            first.kill()
    assert kept(cache) == {wanted.sha256: SIZE}


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 5), lambda path: path.write_bytes(bytes(SIZE + 1))])
def test_a_copy_of_another_size_is_fetched_anew(site: Site, cache: NodeCache, damage: Callable[[Path], Any]) -> None:
    site.script = [by_name]
    damage(cache.fetch(remote(site, "a.tar")))
    assert read(cache, remote(site, "a.tar")) == content("a.tar")
    assert len(site.requests) == 2


def test_a_folder_that_cannot_be_made_is_named(site: Site, cache: NodeCache) -> None:
    cache.dir.parent.joinpath("file").write_text("")
    with pytest.raises(UserError, match=r"file/cache cannot be used .*choose one with FCN_DIST_CACHE"):
        replace(cache, dir=cache.dir.parent / "file" / "cache").fetch(remote(site, "a.tar"))


def test_a_download_that_only_fails_shows_that_it_is_alive(site: Site, cache: NodeCache) -> None:
    wanted = remote(site, "a.tar")
    partial = cache.path(wanted).with_suffix(".partial")
    seen: list[float] = []

    def look(handler: BaseHTTPRequestHandler) -> None:
        seen.append(partial.stat().st_mtime)
        os.utime(partial, (1, 1))
        status(503)(handler)

    site.script = [look, look, status(404)]
    with pytest.raises(UserError):
        cache.fetch(wanted)
    assert len(seen) == 2 and seen[1] > 1


def test_what_another_has_finished_between_look_and_claim_is_not_fetched_again(
    site: Site, cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.script = [by_name]
    wanted = remote(site, "a.tar")

    def claim(self: NodeCache, file: RemoteFile) -> int | None:
        monkeypatch.undo()
        cache.fetch(file)
        return self._claim(file)

    monkeypatch.setattr(NodeCache, "_claim", claim)
    assert read(cache, wanted) == content("a.tar")
    assert len(site.requests) == 1
    assert kept(cache) == {wanted.sha256: SIZE}


def test_a_lock_that_is_given_back_is_free_although_a_forked_process_has_its_descriptor(tmp_path: Path) -> None:
    over = FORK.Event()
    with ExitStack() as stack:
        with flocks.holding(tmp_path / "lock", 0.1):
            stack.enter_context(processes(lambda: over.wait(30)))
        with flocks.holding(tmp_path / "lock", 0.1):
            over.set()


@pytest.mark.parametrize("name", ["lock", "{0:.2}/{0}.partial"])
def test_a_holder_that_does_nothing_is_not_waited_for_without_end(site: Site, cache: NodeCache, name: str) -> None:
    site.script = [by_name]
    wanted = remote(site, "a.tar")
    path = cache.dir / name.format(wanted.sha256)
    with locked(path), pytest.raises(UserError, match=r"has been locked for 0\.1 s by a process that does nothing"):
        replace(cache, patience=0.1).fetch(wanted)
    assert read(cache, wanted) == content("a.tar")


def test_patience_lasts_as_long_as_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(flocks, "time", clock)
    patience = Patience(10)
    while clock.now < 100:
        assert patience.wait(int(clock.now / 9))
    since = clock.now
    while patience.wait("the same"):
        pass
    assert 10 <= clock.now - since <= 10 + 2 * flocks.POLL


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FCN_DIST_CACHE", raising=False)
    assert default_cache_dir() == Path("/home/someone/.cache/fcn-dist")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/fcn-dist")
    monkeypatch.setenv("FCN_DIST_CACHE", "/scratch/shards")
    assert default_cache_dir() == Path("/scratch/shards")
