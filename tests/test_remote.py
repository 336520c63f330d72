"""Remote files read from a real server: what is refused, what is tried again, and what is taken at its word."""

import threading
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import pytest
from loopback import Site, chunked, drop, file, status

from fcn_dist.addresses import check_url, is_url, shown_url
from fcn_dist.data.remote import transfer
from fcn_dist.data.remote.urls import Retries, read_blocks, read_start
from fcn_dist.errors import UserError

pytestmark = pytest.mark.timeout(60)

DATA = Random(0).randbytes(3_500_000)  # several blocks
LOSS = 600_000  # more than what a client's own buffers hold when a connection is dropped, which may be lost
AT_ONCE = Retries(tries=4, first=0)


def read(url: str, size: int = len(DATA), retries: Retries = AT_ONCE) -> bytes:
    return b"".join(read_blocks(url, size, retries))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/set", True),
        ("s3://bucket/set", True),
        ("pipe:cat x", True),
        ("simplecache::s3://bucket/set", True),
        ("https:/host/set", True),  # what pathlib makes of it
        ("/data/set", False),
        ("data/set:2", False),
        ("./set:2", False),
        ("set", False),
        ("", False),
    ],
)
def test_a_url_begins_with_a_scheme(text: str, expected: bool) -> None:
    assert is_url(text) == expected


@pytest.mark.parametrize("form", ["pipe:{}", "pipe://{}", "PIPE:{}", "cmd:{}", "shell://{}", "exec:{}", "sh:{}"])
def test_a_url_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path: Path, form: str) -> None:
    url = form.format(f"touch {tmp_path / 'ran'}")
    for use in (check_url, lambda url: read_start(url, 100), read):
        with pytest.raises(UserError, match="would run a command, and is refused; https://, s3://, gs://"):
            use(url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("simplecache::http://host/a.tar", "no plain address"),
        ("http://host/a.zip::pipe://x", "no plain address"),
        ("zip://a.tar::http://host/a.zip", "no plain address"),
        ("reference://a", "no plain address"),
        ("dask://a", "no plain address"),
        ("file:///etc/passwd", "give files of this machine by path"),
        ("local:///etc/passwd", "give files of this machine by path"),
        ("memory://a.tar", "no plain address"),
        ("unheard-of://host/a.tar", "no address that fsspec knows"),
        ("https:/host/a.tar", "no address that fsspec knows"),
        ("https://", "no address that fsspec knows"),
        ("s3:", "no address that fsspec knows"),
    ],
)
def test_what_is_no_address_in_a_store_is_refused(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_url(url)
    assert "https://, s3://, gs:// or another store" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "change"),
    [
        ("s3://bucket/a.tar", r"pip install 'fcn-dist\[s3\]'"),
        ("gs://bucket/a.tar", r"pip install 'fcn-dist\[gs\]'"),
        ("webdav://host/a.tar", "what fsspec says"),
    ],
)
def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, url: str, change: str) -> None:
    def missing(scheme: str) -> None:
        raise ImportError("what fsspec says")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match=f"a client for .* is needed; {change}"):
        check_url(url)


def test_a_message_shows_no_secrets_of_an_address(site: Site) -> None:
    url = site.url.replace("//", "//someone:password@") + "?signature=secret#part"
    assert shown_url(url) == site.url
    assert shown_url("https://[half") == "https:..."
    for reply in (status(403), status(503), drop_at_once):
        site.script = [reply]
        with pytest.raises(UserError) as caught:
            read(url)
        assert site.url in str(caught.value)
        assert "password" not in str(caught.value) and "secret" not in str(caught.value)


def drop_at_once(handler: Any) -> None:
    drop(handler.connection)


def test_the_start_of_a_file_is_read_or_all_of_a_shorter_one(site: Site) -> None:
    site.script = [file(b"index"), status(503), file(b"index"), file(b""), file(b"index", ranges=False), file(DATA)]
    assert read_start(site.url, 100) == b"index"
    assert read_start(site.url, 5, AT_ONCE) == b"index"
    assert read_start(site.url, 5) == b""
    assert read_start(site.url, 5) == b"index"
    assert read_start(site.url, len(DATA) - 1) == DATA[:-1]
    assert len(site.requests) == 6


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("cuts", [[1], [2_500_000], [1_000_000, 1_000_001, 3_400_000], [0, 700_000]])
def test_a_dropped_connection_is_gone_on_from(site: Site, ranges: bool, cuts: list[int]) -> None:
    site.script = [*(file(DATA, until=cut, ranges=ranges) for cut in cuts), file(DATA, ranges=ranges)]
    assert read(site.url) == DATA
    assert len(site.requests) == len(cuts) + 1
    # What had come by the drop is not asked for again.
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0 for asked in site.ranges]
    assert starts == sorted(starts) and all(start <= cut for start, cut in zip(starts[1:], cuts, strict=True))
    assert starts[-1] >= cuts[-1] - LOSS


def test_a_reset_connection_is_tried_again(site: Site) -> None:
    site.script = [drop_at_once, file(DATA, until=1_700_000, then=drop), file(DATA)]
    assert read(site.url) == DATA


def test_any_number_of_drops_is_borne_as_long_as_bytes_come(site: Site) -> None:
    data = 3 * DATA
    cuts = range(2 * LOSS, len(data), 2 * LOSS)
    twice = Retries(tries=2, first=0)
    assert len(cuts) > twice.tries
    site.script = [*(file(data, until=cut) for cut in cuts), file(data)]
    assert read(site.url, len(data), twice) == data


def test_a_server_that_comes_back_is_waited_for_and_each_failure_shows(site: Site) -> None:
    waits: list[float] = []
    site.script = [status(503), status(429), status(500), status(503), file(DATA)]
    blocks = list(read_blocks(site.url, len(DATA), Retries(tries=5, first=1, longest=5, sleep=waits.append)))
    assert b"".join(blocks) == DATA
    assert blocks[:4] == [b""] * 4 and all(blocks[4:])
    for wait, longest in zip(waits, (1, 2, 4, 5), strict=True):
        assert longest / 2 <= wait <= longest


def test_a_server_that_stays_away_is_given_up(site: Site) -> None:
    site.script = [status(503)]
    with pytest.raises(UserError, match=r"scenes\.zip could not be read in 4 tries \(HTTP status 503\); check the"):
        read(site.url)
    assert len(site.requests) == 4
    with pytest.raises(UserError, match="in 4 tries"):
        read_start(site.url, 100, AT_ONCE)


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_file_that_will_not_be_given_is_not_asked_for_again(site: Site, code: int) -> None:
    site.script = [status(code)]
    with pytest.raises(UserError, match=rf"scenes\.zip cannot be read \(HTTP status {code}\); check the address"):
        read(site.url)
    assert len(site.requests) == 1


def test_a_silent_server_is_asked_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SILENCE_TIMEOUT", 0.2)
    done = threading.Event()

    def silent(handler: Any) -> None:
        done.wait(30)

    site.script = [silent, file(DATA, until=1_500_000, then=lambda _: done.wait(30)), file(DATA)]
    try:
        assert read(site.url) == DATA
    finally:
        done.set()


def test_a_body_without_a_length_that_breaks_off_is_gone_on_from(site: Site) -> None:
    site.script = [chunked(DATA, until=2_000_000), file(DATA)]
    assert read(site.url) == DATA


def test_another_part_than_the_one_asked_for_is_not_taken(site: Site) -> None:
    def wrong_part(handler: Any) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {len(DATA) - 5}-{len(DATA) - 1}/{len(DATA)}")
        handler.send_header("Content-Length", "5")
        handler.end_headers()
        handler.wfile.write(DATA[-5:])

    site.script = [file(DATA, until=1_500_000), wrong_part, file(DATA)]
    assert read(site.url) == DATA


def test_a_file_that_ends_early_or_late_gives_what_it_has_up_to_the_size(site: Site) -> None:
    site.script = [file(DATA)]
    assert read(site.url, len(DATA) + 10) == DATA
    assert read(site.url, 1_200_000) == DATA[:1_200_000]
    assert read(site.url, 0) == b""
