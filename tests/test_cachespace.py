"""The room of the node cache: never more than its limit, and what goes when there is too little."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from loopback import Site
from remote_files import LIMIT, SIZE, broken_off, by_name, content, empty_cache, kept, locked, processes, read, remote

import fcn_dist.data.remote.cache
from fcn_dist.data.flocks import Patience
from fcn_dist.data.remote.cache import NodeCache, RemoteFile
from fcn_dist.errors import UserError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return empty_cache(tmp_path)


def age(cache: NodeCache, *files: RemoteFile) -> None:
    """Make the copies look as if they had been used long ago, the first before the others."""
    for number, copy in enumerate(files):
        os.utime(cache.path(copy), (1e9 + number, 1e9 + number))


def test_the_copy_used_longest_ago_goes_first(site: Site, cache: NodeCache) -> None:
    site.script = [by_name]
    files = [remote(site, f"{number}.tar") for number in range(7)]
    for wanted in files[:5]:
        cache.fetch(wanted)
    age(cache, *files[:5])
    cache.fetch(files[0])  # used again
    cache.fetch(files[5])
    cache.fetch(files[6])
    assert set(kept(cache)) == {files[number].sha256 for number in (0, 3, 4, 5, 6)}
    assert sum(kept(cache).values()) == LIMIT


def test_each_job_keeps_its_own_limit_when_it_adds_a_file(site: Site, cache: NodeCache) -> None:
    site.script = [by_name]
    files = [remote(site, f"{number}.tar") for number in range(6)]
    for wanted in files[:5]:
        cache.fetch(wanted)
    age(cache, *files[:5])
    replace(cache, limit=2 * SIZE).fetch(files[4])  # is there: nothing need go
    assert len(kept(cache)) == 5
    replace(cache, limit=2 * SIZE).fetch(files[5])
    assert set(kept(cache)) == {files[4].sha256, files[5].sha256}


def test_a_file_larger_than_the_limit_is_refused_before_anything_goes(site: Site, cache: NodeCache) -> None:
    site.script = [by_name]
    cache.fetch(remote(site, "a.tar"))
    with pytest.raises(UserError, match=r"/b\.tar has 1\.2 MB, and the cache .* may hold 1 MB; .*raise it"):
        replace(cache, limit=1_000_000).fetch(remote(site, "b.tar"))
    assert len(kept(cache)) == 1 and len(site.requests) == 1


def test_a_reader_reads_on_when_its_copy_goes(site: Site, cache: NodeCache) -> None:
    site.script = [by_name]
    one = replace(cache, limit=SIZE)
    with one.open(remote(site, "a.tar")) as copy:
        start = copy.read(1000)
        one.fetch(remote(site, "b.tar"))
        assert not one.path(remote(site, "a.tar")).exists()
        assert start + copy.read() == content("a.tar")
    assert read(one, remote(site, "a.tar")) == content("a.tar")
    assert len(site.requests) == 3


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_processes_that_push_each_other_out_stay_within_the_limit(site: Site, cache: NodeCache, slots: int) -> None:
    limited = replace(cache, limit=slots * SIZE)
    totals = cache.dir.with_name("totals")
    allocate = os.posix_fallocate

    def watched(descriptor: int, offset: int, length: int) -> None:
        # The moment at which the cache grows; what lies there is added up without the cache's own help.
        allocate(descriptor, offset, length)
        with totals.open("a") as log:
            log.write(f"{sum(kept(limited).values())}\n")

    def fetch_all(seed: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "posix_fallocate", watched)
            names = [f"{number}.tar" for number in range(8)] * 2
            Random(seed).shuffle(names)
            for name in names:
                assert read(limited, remote(site, name)) == content(name)

    site.script = [by_name]
    with processes(*[lambda seed=seed: fetch_all(seed) for seed in range(4)]):
        pass
    found = [int(line) for line in totals.read_text().split()]
    assert len(found) == len(site.requests) >= 8
    assert max(found) == limited.limit
    assert all(size == SIZE and not name.endswith(".partial") for name, size in kept(limited).items())


def test_other_files_in_the_folder_are_neither_counted_nor_removed(site: Site, cache: NodeCache) -> None:
    site.script = [by_name]
    others = [cache.dir / name for name in ("mine.tar", "ab/mine.tar", f"ab/{'0' * 64}.tar", f"xy/{'0' * 64}")]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(SIZE))
    for name in ("a.tar", "b.tar"):
        replace(cache, limit=SIZE).fetch(remote(site, name))
    assert all(path.exists() for path in others)


def test_what_a_killed_process_leaves_goes_before_any_copy(site: Site, cache: NodeCache) -> None:
    site.script = [by_name]
    small = replace(cache, limit=2 * SIZE)
    small.fetch(remote(site, "b.tar"))
    broken_off(site, small, "a.tar")
    small.fetch(remote(site, "c.tar"))
    assert kept(cache) == {remote(site, name).sha256: SIZE for name in ("b.tar", "c.tar")}


def full_disk(monkeypatch: pytest.MonkeyPatch, fits: Callable[[], bool]) -> None:
    allocate = os.posix_fallocate

    def allocate_if_it_fits(descriptor: int, offset: int, length: int) -> None:
        if not fits():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", allocate_if_it_fits)


def test_a_disk_that_others_fill_makes_copies_go(site: Site, cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    site.script = [by_name]
    files = [remote(site, f"{number}.tar") for number in range(4)]
    for wanted in files[:3]:
        cache.fetch(wanted)
    age(cache, *files[:3])
    full_disk(monkeypatch, lambda: sum(kept(cache).values()) <= SIZE)
    assert read(cache, files[3]) == content("3.tar")
    assert set(kept(cache)) == {files[2].sha256, files[3].sha256}


def test_a_full_disk_is_told_with_both_figures(site: Site, cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    site.script = [by_name]
    cache.fetch(remote(site, "a.tar"))
    full_disk(monkeypatch, lambda: False)
    with pytest.raises(UserError, match=r"is full: 1\.2 MB are needed, .* are free .*FCN_DIST_CACHE") as caught:
        cache.fetch(remote(site, "b.tar"))
    assert str(cache.dir) in str(caught.value)
    assert kept(cache) == {} and len(site.requests) == 1


def test_downloads_that_leave_no_room_and_do_nothing_are_told(site: Site, cache: NodeCache) -> None:
    site.script = [by_name]
    others = [cache.dir / "ab" / (digits * 32 + ".partial") for digits in ("ab", "ac")]

    class BesideAnother(Patience):
        """That another waits for room as well is no progress."""

        def wait(self, state: object) -> bool:
            os.utime(others[1])
            return super().wait(state)

    copy = cache.fetch(remote(site, "a.tar"))
    with pytest.MonkeyPatch.context() as patch, locked(others[0], LIMIT - SIZE + 1), locked(others[1]):
        patch.setattr(fcn_dist.data.remote.cache, "Patience", BesideAnother)
        with pytest.raises(UserError, match=r"no room for .*b\.tar .*1 downloads of other processes that make no"):
            replace(cache, patience=0.2).fetch(remote(site, "b.tar"))
    assert copy.exists(), "a copy goes only where that makes room"
    assert read(cache, remote(site, "b.tar")) == content("b.tar")
