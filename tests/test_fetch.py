"""A file is fetched whole from a server that fails in every way it can, or one message says why not."""

import re
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path
from random import Random
from unittest.mock import ANY

import pytest
from loopback import Reply, Site, chunked, drop, file, status

from fcn_dist.data.download.fetch import LONGEST_RETRY_AFTER, LONGEST_WAIT, MAX_TRIES, fetch, is_fetched
from fcn_dist.errors import UserError

pytestmark = pytest.mark.timeout(60)
DATA = Random(0).randbytes(5000)
OTHER = Random(1).randbytes(5000)
HALF = 2000
REST = f"bytes={HALF}-"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def waits_of(url: str, path: Path, size: int | None = None, max_size: int = 10**6) -> list[float]:
    """Fetch; the seconds that it would have slept each time."""
    waits: list[float] = []
    fetch(url, path, size, max_size, waits.append)
    return waits


def refusal(url: str, path: Path, size: int | None = None, max_size: int = 10**6) -> str:
    """The message with which fetching fails without another try."""
    with pytest.raises(UserError) as caught:
        fetch(url, path, size, max_size, lambda seconds: pytest.fail("waited"))
    return str(caught.value)


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"this is no HTTP\r\n\r\n")


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    drop(handler.connection)


def wrong_range(handler: BaseHTTPRequestHandler) -> None:
    """Other bytes than those asked for, told so."""
    size = len(DATA)
    status(206, {"Content-Range": f"bytes 0-{size - 1}/{size}", "Content-Length": str(size)})(handler)
    handler.wfile.write(DATA)


def without_end(handler: BaseHTTPRequestHandler) -> None:
    """HTTP of old: where the connection ends, the file does."""
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nETag: "v1"\r\n\r\n' + DATA[:HALF])


# What a server does before it serves well, and the ranges that it is asked for in all.
PASSING: dict[str, tuple[list[Reply], list[str | None]]] = {
    "half, with the right length": ([file(DATA, until=HALF)], [None, REST]),
    "a bit each time": (
        [file(DATA, until=HALF + n) for n in range(3)],
        [None, REST, f"bytes={HALF + 1}-", f"bytes={HALF + 2}-"],
    ),
    "half, dated": ([file(DATA, etag=None, last_modified=formatdate(0), until=HALF)], [None, REST]),
    "half, neither dated nor tagged": ([file(DATA, etag=None, until=HALF), file(DATA, etag=None)], [None, REST]),
    "a connection that is reset": ([file(DATA, until=HALF, then=drop)], [None, ANY]),
    "nothing at all": ([hang_up], [None, None]),
    "no HTTP": ([no_http], [None, None]),
    "503 twice": ([status(503), status(503)], [None, None, None]),
    "429 and 500": ([status(429, {"Retry-After": "soon"}), status(500)], [None, None, None]),
    "half, then 503": ([file(DATA, until=HALF), status(503)], [None, REST, REST]),
    "half, then no ranges": ([file(DATA, until=HALF), file(DATA, ranges=False)], [None, REST]),
    "half of another version": ([file(OTHER, etag='"v0"', until=HALF)], [None, REST]),
    "half of another version, from one that ignores If-Range": (
        [file(OTHER, etag='"v0"', until=HALF), file(DATA, conditional=False)],
        [None, REST, None],
    ),
    "a wrong range": ([file(DATA, until=HALF), wrong_range], [None, REST, None]),
    "more than there is now": (
        [file(OTHER + OTHER, until=6000), status(416, {"Content-Range": f"bytes */{len(DATA)}"})],
        [None, "bytes=6000-", None],
    ),
    "more than there is now, of unknown size": (
        [chunked(OTHER + OTHER, 6000), status(416, {"Content-Range": f"bytes */{len(DATA)}"})],
        [None, "bytes=6000-", None],
    ),
    "chunks, all of them": ([chunked(DATA)], [None]),
    "chunks, half of them": ([chunked(DATA, HALF)], [None, REST]),
    "chunks, all but the end": ([chunked(DATA, len(DATA))], [None, f"bytes={len(DATA)}-"]),
}


@pytest.mark.parametrize("trouble", PASSING)
def test_what_passes_is_waited_for_and_gone_on_from(site: Site, path: Path, trouble: str) -> None:
    before, ranges = PASSING[trouble]
    site.script = [*before, file(DATA)]
    waits = waits_of(site.url, path)
    assert path.read_bytes() == DATA and is_fetched(site.url, path)
    assert site.ranges == ranges
    assert len(waits) == len(ranges) - 1 and all(0 < seconds < 3 for seconds in waits)
    assert waits_of(site.url, path) == [] and len(site.requests) == len(ranges), "what is whole is not asked for"


def test_the_rest_is_asked_for_of_the_same_version_alone(site: Site, tmp_path: Path) -> None:
    date = formatdate(0, usegmt=True)
    for name, etag, condition in (("strong", '"v1"', '"v1"'), ("weak", 'W/"v1"', date)):
        site.requests.clear()
        site.script = [file(DATA, etag=etag, last_modified=date, until=HALF), file(DATA, etag=etag, last_modified=date)]
        waits_of(site.url, tmp_path / name)
        assert site.ranges == [None, REST] and site.requests[1]["if-range"] == condition


def test_a_server_that_states_no_size_is_held_to_the_one_given(site: Site, path: Path) -> None:
    site.script = [without_end, file(DATA)]
    assert len(waits_of(site.url, path, len(DATA))) == 1
    assert path.read_bytes() == DATA and site.ranges == [None, REST]


def test_it_waits_as_long_as_the_server_asks_within_a_bound(site: Site, path: Path) -> None:
    site.script = [
        status(503, {"Retry-After": "100"}),
        status(429, {"Retry-After": "86400"}),
        status(503, {"Retry-After": formatdate(time.time() + 200, usegmt=True)}),
        status(503, {"Retry-After": formatdate(time.time() - 200, usegmt=True)}),
        file(DATA),
    ]
    waits = waits_of(site.url, path)
    assert waits[:2] == [100.0, LONGEST_RETRY_AFTER]
    assert 100 < waits[2] <= 200 and 0 < waits[3] <= LONGEST_WAIT


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (status(503), ["HTTP status 503", "0 bytes are here"]),
        (file(DATA, until=HALF, ranges=False), ["ended after 2,000 of 5,000 bytes", "2,000 of 5,000 bytes are here"]),
        (chunked(DATA, 0), ["IncompleteRead"]),
        (hang_up, ["ConnectionResetError"]),
    ],
)
def test_trouble_without_end_ends(site: Site, path: Path, reply: Reply, words: list[str]) -> None:
    site.script = [reply]
    waits: list[float] = []
    with pytest.raises(UserError) as caught:
        fetch(site.url, path, None, 10**6, waits.append)
    assert all(word in str(caught.value) for word in [site.url, f"{MAX_TRIES} tries", *words]), caught.value
    brought_something = path.exists() and path.stat().st_size > 0
    assert len(site.requests) == len(waits) + 1 == MAX_TRIES + brought_something
    # Twice as long each time, with a jitter of a half.
    assert all(earlier < 2.01 * later for earlier, later in pairwise(waits)) and waits[-1] > 8 * waits[0]
    assert len(set(waits)) == len(waits)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (status(404), ["HTTP status 404", "check the address"]),
        (status(403), ["HTTP status 403"]),
        (status(416, {"Content-Range": "bytes */5"}), ["HTTP status 416"]),
        (status(204), ["HTTP status 204"]),
        (wrong_range, ["HTTP status 206"]),
        (status(302, {"Location": "file:///etc/passwd"}), ["redirects to 'file:///etc/passwd'"]),
        (status(301, {"Location": "ftp://127.0.0.1/scenes.zip"}), ["redirects to 'ftp://"]),
        (status(307, {"Location": "http://["}), ["redirects to 'http://['"]),
        (status(302, {"Location": "/again.zip"}), ["more than 10 times"]),
        (status(302), ["more than 10 times"]),
        (file(b"<html>log in</html>", kind="text/html; charset=utf-8"), ["is a web page"]),
        (status(200, {"Content-Encoding": "gzip"}), ["'gzip'"]),
    ],
)
def test_what_no_other_try_mends_is_told_at_once(site: Site, path: Path, reply: Reply, words: list[str]) -> None:
    site.script = [reply]
    message = refusal(site.url, path)
    assert all(word in message for word in [site.url, *words]), message
    assert not path.exists()


def test_redirects_within_http_are_followed(site: Site, path: Path) -> None:
    site.script = [status(301, {"Location": "/a%20b.zip?x=1"}), status(308, {"Location": site.url}), file(DATA)]
    assert waits_of(site.url, path) == [] and path.read_bytes() == DATA
    assert site.paths == ["/scenes.zip", "/a%20b.zip?x=1", "/scenes.zip"]


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://host/a.zip", "data:text/plain,x", "scenes.zip", "", "http://", "http:///a"),
        *("http://[", "http://host:port/a", "http://host/a b", "http://host/ä", "http://host/a\r\nX: y"),
        "HTTP://user:word@host/a",
    ],
)
def test_an_address_that_is_none_is_refused(path: Path, url: str) -> None:
    message = refusal(url, path)
    assert repr(url) in message and re.search("is no address|write them as %XX", message)


@pytest.mark.parametrize("served", [file, chunked])
def test_a_file_of_another_size_is_refused(site: Site, path: Path, served: Callable[[bytes], Reply]) -> None:
    site.script = [served(DATA)]
    assert "4,999 are needed; correct --size" in refusal(site.url, path, 4999)
    assert "at most 4,999 may come; raise --max-size" in refusal(site.url, path, None, 4999)
    assert not path.exists()
    site.script = [served(DATA), file(DATA)]
    site.requests.clear()
    with pytest.raises(UserError, match="gives 5,000 bytes; 5,001 are needed"):
        waits_of(site.url, path, 5001)


def test_what_replaces_nothing_does_not_cost_the_part_that_is_here(site: Site, path: Path) -> None:
    site.script = [file(DATA, until=HALF), status(404)]
    with pytest.raises(UserError):
        waits_of(site.url, path)
    for reply in (file(OTHER * 2, kind="text/html", ranges=False), file(OTHER * 2, ranges=False), status(410)):
        site.script = [reply]
        refusal(site.url, path, len(DATA))
        assert path.read_bytes() == DATA[:HALF]


def leave_half_of_other(site: Site, path: Path) -> None:
    site.script = [file(OTHER, until=HALF), status(404)]
    with pytest.raises(UserError):
        waits_of(site.url, path)
    site.script = [file(DATA)]
    site.requests.clear()


def test_a_part_of_another_address_is_not_gone_on_from(site: Site, path: Path) -> None:
    leave_half_of_other(site, path)
    waits_of(f"{site.url}?other", path)
    assert site.ranges == [None] and path.read_bytes() == DATA


@pytest.mark.parametrize("note", ["", "{", "[1]", '{"url": 3}', "\0\xff"])
def test_a_part_whose_note_is_damaged_is_begun_anew(site: Site, path: Path, note: str) -> None:
    leave_half_of_other(site, path)
    path.with_name("file.origin.json").write_text(note, encoding="latin1")
    waits_of(site.url, path)
    assert site.ranges == [None] and path.read_bytes() == DATA


def test_silence_is_trouble(site: Site, path: Path) -> None:
    over = threading.Event()
    site.script = [file(DATA, until=HALF, then=lambda connection: over.wait()), file(DATA)]
    waits: list[float] = []
    fetch(site.url, path, None, 10**6, waits.append, timeout=0.2)
    over.set()
    assert site.ranges == [None, REST] and len(waits) == 1 and path.read_bytes() == DATA
