"""A real HTTP server on loopback that follows a script: it drops, halves, replaces and refuses as it is told."""

import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = Callable[[BaseHTTPRequestHandler], None]


class Site:
    """Answers the n-th request with the n-th reply of `script`, and with the last one from then on."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/scenes.zip"
        self.script: list[Reply] = []
        self.requests: list[dict[str, str]] = []  # headers, in lower case
        self.paths: list[str] = []

    @property
    def ranges(self) -> list[str | None]:
        """The Range header of each request."""
        return [headers.get("range") for headers in self.requests]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        number = len(self.requests)
        self.paths.append(handler.path)
        self.requests.append({name.lower(): value for name, value in handler.headers.items()})
        self.script[min(number, len(self.script) - 1)](handler)
        handler.close_connection = True


@contextmanager
def serving() -> Iterator[Site]:
    """A site on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.answer(self)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site = Site(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def file(
    data: bytes,
    *,
    etag: str | None = '"v1"',
    last_modified: str | None = None,
    until: int | None = None,
    ranges: bool = True,
    conditional: bool = True,
    kind: str = "application/zip",
    then: Callable[[socket.socket], object] = lambda _: None,
) -> Reply:
    """`data`, or the range asked for; ends before byte `until`, and does `then` before it closes.

    A server not `ranges` ignores Range, one not `conditional` ignores If-Range.
    """

    def reply(handler: BaseHTTPRequestHandler) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        condition = handler.headers.get("If-Range")
        fits = not conditional or condition in (None, etag, last_modified)
        start = int(asked[1]) if asked and ranges and fits else 0
        if start >= len(data) > 0:
            return status(416, {"Content-Range": f"bytes */{len(data)}"})(handler)
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for name, value in (("ETag", etag), ("Last-Modified", last_modified), ("Content-Type", kind)):
            if value is not None:
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        handler.wfile.write(data[start:until])
        handler.wfile.flush()
        then(handler.connection)
        return None

    return reply


def drop(connection: socket.socket) -> None:
    """End a connection at once: the peer meets a reset, not an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def status(code: int, headers: dict[str, str] | None = None) -> Reply:
    """No file."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()

    return reply


def chunked(data: bytes, until: int | None = None) -> Reply:
    """`data` without a length stated, and without the last chunk if it ends at `until`."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.send_header("ETag", '"v1"')
        handler.end_headers()
        sent = data[:until]
        for start in range(0, len(sent), 1000):
            block = sent[start : start + 1000]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
        if until is None:
            handler.wfile.write(b"0\r\n\r\n")

    return reply
