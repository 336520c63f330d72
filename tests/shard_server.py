"""A real HTTP server on loopback over a folder: ranges, counts of what was asked, and faults on demand."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class ShardServer:
    """What the server does, and what it was asked."""

    folder: Path
    url: str = ""
    bodies: Counter[str] = field(default_factory=Counter)  # answers with a body, by file name
    sent: Counter[str] = field(default_factory=Counter)  # bytes, by file name
    busy: Counter[str] = field(default_factory=Counter)  # how often still to answer 503, by file name
    cut: Counter[str] = field(default_factory=Counter)  # how often still to drop the connection half-way
    wrong: Counter[str] = field(default_factory=Counter)  # how often still to flip a byte
    lock: threading.Lock = field(default_factory=threading.Lock)

    def due(self, faults: Counter[str], name: str) -> bool:
        """Whether this answer is to have the fault; counts it down."""
        with self.lock:
            faults[name] -= 1
            return faults[name] >= 0

    def whole_reads(self, name: str) -> float:
        """How many times the file has left the server."""
        size = next(path.stat().st_size for path in self.folder.rglob(name))
        return self.sent[name] / size


@contextmanager
def serving_folder(folder: Path) -> Iterator[ShardServer]:
    """Serve `folder` on a free port of 127.0.0.1."""
    server = ShardServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = folder / unquote(self.path.lstrip("/"))
            if not path.is_file():
                self.send_error(404)
                return
            if server.due(server.busy, path.name):
                self.send_error(503)
                return
            data = path.read_bytes()
            if server.due(server.wrong, path.name):
                data = data[:100] + bytes([data[100] ^ 1]) + data[101:]
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first = int(asked[1]) if asked else 0
            last = min(len(data), int(asked[2]) + 1) if asked and asked[2] else len(data)
            body = data[first:last]
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if server.due(server.cut, path.name):
                body = body[: len(body) // 2]
                self.close_connection = True
            with server.lock:
                server.bodies[path.name] += 1
                server.sent[path.name] += len(body)
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
