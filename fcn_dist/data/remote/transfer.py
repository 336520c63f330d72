"""One attempt to get bytes of a remote file through fsspec; what goes wrong is raised as it came.

A transfer leaves nothing behind, neither a connection nor a thread, so that the process may be forked afterwards.
"""

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fcn_dist.addresses import store_class

BLOCK = 16 * 2**20  # bytes a request: long beside a round trip, short beside what a dropped connection costs
HTTP_BLOCK = 2**20  # bytes handed on at a time; over HTTP, all come by one request
HTTP_BUFFER = 2**16  # bytes read at a time; what lies in the client's buffers when a connection is dropped is lost
SILENCE_TIMEOUT = 60.0  # seconds in which not one byte comes


@contextmanager
def opened(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of `url` and its path in it, for the time of one transfer."""
    # fsspec would keep the file system, its connections and its event loop for the next call. A process that is
    # forked later then closes, when it collects its garbage, connections in an epoll set that it shares with its
    # parent: the parent hangs on its next read. So nothing lives on here.
    import fsspec
    from fsspec.asyn import sync

    if not store_class(url.partition("://")[0]).async_impl:
        yield fsspec.core.url_to_fs(url, skip_instance_cache=True)
        return
    with _event_loop() as loop:
        fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, loop=loop)
        try:
            yield fs, path
        finally:
            # The first name is s3fs' and fsspec's own, the second gcsfs'.
            session = getattr(fs, "set_session", None) or getattr(fs, "_set_session", None)
            if session is not None:
                sync(loop, sync(loop, session).close)


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="remote file", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        # Clients look up names and credentials in threads of the loop's own.
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def blocks(fs: Any, path: str, offset: int, size: int, exact: bool) -> Iterator[bytes]:
    """Bytes [offset, size) in order; fewer if the file ends before.

    If it is `exact` that the file has `size` bytes, a short block is gone on from; else it is taken for the end, for
    some clients complain aloud of being asked for what is behind it.
    """
    if "https" in fs.protocol:
        yield from _http_blocks(fs, path, offset, size)
        return
    while offset < size:
        block = read_range(fs, path, offset, min(offset + BLOCK, size))
        if block:
            yield block
        offset += len(block)
        if not block or (not exact and len(block) < BLOCK):
            return


def read_range(fs: Any, path: str, start: int, end: int) -> bytes:
    """Bytes [start, end) or the first of them; none at the end of the file."""
    try:
        block = bytes(fs.cat_file(path, start=start, end=end))  # by name: s3fs has them in another order
    except Exception as error:
        if status_of(error) == 416:
            return b""
        raise
    if len(block) > end - start:
        raise OSError(f"{len(block)} bytes came where {end - start} were asked for")
    return block


def _http_blocks(fs: Any, url: str, offset: int, size: int) -> Iterator[bytes]:
    # Not by fsspec's own ways of reading over HTTP: they take a whole file into memory where the server ignores the
    # range, or take its start for the range that was asked for.
    from fsspec.asyn import sync

    response, position = sync(fs.loop, _ask, fs, url, offset)
    try:
        while position < size:
            block = sync(fs.loop, _receive, response, min(HTTP_BLOCK, size - position))
            if not block:
                return
            position += len(block)
            if position > offset:
                yield block[max(0, len(block) - (position - offset)) :]
    finally:
        fs.loop.call_soon_threadsafe(response.close)


async def _ask(fs: Any, url: str, offset: int) -> tuple[Any, int]:
    """The server's answer, and where in the file its body begins; not everyone heeds the offset."""
    import aiohttp

    # A tar that was compressed for the way would have other offsets.
    headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    session = await fs.set_session()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_TIMEOUT, sock_read=SILENCE_TIMEOUT)
    options = {**fs.kwargs, "headers": headers, "timeout": timeout, "read_bufsize": HTTP_BUFFER}
    response = await session.get(fs.encode_url(url), **options)
    if not response.ok:
        response.close()
        response.raise_for_status()
    if response.status != 206:
        return response, 0
    start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if not start or int(start[1]) > offset:
        response.close()
        raise OSError(f"another part of the file came than the one from {offset} on")
    return response, int(start[1])


async def _receive(response: Any, most: int) -> bytes:
    """The next bytes, `most` of them if they come; none at the end."""
    parts, size = [], 0
    try:
        while size < most and (part := await response.content.read(min(HTTP_BUFFER, most - size))):
            parts.append(part)
            size += len(part)
    except Exception:
        # What came before a connection was dropped need not come again; the next call raises.
        if not parts:
            raise
    return b"".join(parts)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, gcsfs, botocore or requests carries."""
    response = getattr(error, "response", None)
    if response is None:
        response = getattr(error.__cause__, "response", None)  # s3fs raises OSErrors from botocore's
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for found in (getattr(error, "status", None), getattr(error, "code", None), response):
        status = getattr(found, "status_code", found)
        if isinstance(status, int):
            return status
    return None
