"""Bytes from S3 and other stores, and what a read leaves behind: nothing."""

import gc
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import BUCKET, serving_s3

from fcn_dist.data.remote import transfer
from fcn_dist.data.remote.urls import Retries, read_blocks, read_start
from fcn_dist.errors import UserError

pytestmark = pytest.mark.timeout(60)

DATA = Random(0).randbytes(3_500_000)
AT_ONCE = Retries(tries=4, first=0)


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with serving_s3() as client:
        yield client


def read(url: str, size: int = len(DATA), retries: Retries = AT_ONCE) -> bytes:
    return b"".join(read_blocks(url, size, retries))


def test_s3_objects_are_read_in_ranges(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BLOCK", 1_000_000)
    s3.put_object(Bucket=BUCKET, Key="a.tar", Body=DATA)
    s3.put_object(Bucket=BUCKET, Key="empty", Body=b"")
    url = f"s3://{BUCKET}/a.tar"
    assert [len(block) for block in read_blocks(url, len(DATA))] == [1_000_000] * 3 + [500_000]
    assert read(url) == DATA
    assert read(url, len(DATA) + 10) == DATA
    assert read_start(url, len(DATA)) == DATA
    assert read_start(f"s3://{BUCKET}/empty", 10) == b""
    assert read_start(url, 100) == DATA[:100]


@pytest.mark.parametrize("address", [f"{BUCKET}/none.tar", "no-such-bucket/a.tar"])
def test_an_s3_object_that_is_not_there_is_named_at_once(s3: Any, address: str) -> None:
    with pytest.raises(UserError, match=rf"s3://{address} cannot be read .*check the address"):
        read(f"s3://{address}", retries=Retries(sleep=_no_wait))


def _no_wait(seconds: float) -> None:
    raise AssertionError("tried again")


def test_a_store_that_is_read_without_an_event_loop_is_read_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BLOCK", 1_000_000)
    fsspec.register_implementation("plain-store", PlainStore, clobber=True)
    fsspec.filesystem("plain-store").pipe_file("plain-store://a.tar", DATA)
    assert read("plain-store://a.tar") == DATA
    assert read("plain-store://a.tar", len(DATA) + 1) == DATA
    assert read_start("plain-store://a.tar", len(DATA)) == DATA
    PlainStore.asked.clear()
    assert read_start("plain-store://a.tar", 9 * len(DATA)) == DATA
    assert PlainStore.asked == [0, 1_000_000, 2_000_000, 3_000_000], "what ends short is not asked for more"
    PlainStore.most = 300_000
    assert read("plain-store://a.tar") == DATA, "but what is known to be longer is"
    with pytest.raises(UserError, match=r"plain-store://b\.tar cannot be read \(no such file\)"):
        read("plain-store://b.tar")


class PlainStore(MemoryFileSystem):  # type: ignore[misc]
    protocol = "plain-store"
    store: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[list[int]] = []
    most = 10**9  # bytes it gives at a time

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        self.asked.append(start)
        return bytes(super().cat_file(path, start=start, end=min(end, start + self.most)))


def read_and_collect(url: str, size: int) -> None:
    gc.collect()
    assert len(read(url, size)) == size


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_read_leaves_nothing_to_a_process_that_is_forked_later(s3: Any, tmp_path: Path, scheme: str) -> None:
    if scheme == "s3":
        s3.put_object(Bucket=BUCKET, Key="kept", Body=DATA)
        _check_fork(f"s3://{BUCKET}/kept")
        return
    (tmp_path / "kept").write_bytes(DATA)
    handler = partial(KeepAlive, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        _check_fork(f"http://127.0.0.1:{server.server_port}/kept")
        server.shutdown()
        thread.join()


class KeepAlive(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _check_fork(url: str) -> None:
    gc.collect()
    before = _own_threads()
    sockets = _client_sockets(url)
    assert read(url) == DATA
    assert _own_threads() == before
    assert _client_sockets(url) == sockets
    child = get_context("fork").Process(target=read_and_collect, args=(url, len(DATA)))
    child.start()
    child.join(30)
    child.kill()
    assert child.exitcode == 0
    assert read(url) == DATA


def _own_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "process_request" not in thread.name}


def _client_sockets(url: str) -> int:
    """Descriptors of this process that are connected to the server; what the server itself holds is not counted."""
    port = int((os.environ["AWS_ENDPOINT_URL"] if url.startswith("s3") else url).split(":")[2].split("/")[0])
    count = 0
    for name in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(name.name))) as connection:
                count += connection.family != socket.AF_UNIX and connection.getpeername()[1] == port
        except OSError:
            continue
    return count
