"""The server as a process of its own, and the requests that clients make to it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "serve.py"
TIME_LIMIT = 60.0
BOUNDARY = "the boundary"


@dataclass
class Answer:
    """Of the server."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def detail(self) -> str:
        """The message of a refusal."""
        detail: str = self.json["detail"]
        return detail


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.port}/"

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request on a connection of its own."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIME_LIMIT)
        try:
            connection.request(method, path, body, dict(headers or {}))
            return answer_of(connection.getresponse())
        finally:
            connection.close()

    def begin(self, body: bytes, length: int | None = None, more: str = "") -> socket.socket:
        """Send a request's head, which announces `length` bytes (those of the body by default), and a body."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=TIME_LIMIT)
        head = (
            f"POST /predict HTTP/1.1\r\nHost: localhost\r\n{more or f'Content-Length: {length or len(body)}'}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        return client

    def peak_memory(self) -> int:
        """The most bytes that the process has had in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024

    def stop(self, signum: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=TIME_LIMIT)
        return self.process.returncode, out, err


def answer_of(response: HTTPResponse) -> Answer:
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def answer_on(client: socket.socket) -> Answer:
    """What the server says on a connection from `begin`."""
    response = HTTPResponse(client, method="POST")
    response.begin()
    return answer_of(response)


def form(content: bytes, name: str = "scene.png", field: str = "file") -> tuple[bytes, dict[str, str]]:
    """The body and headers by which a browser sends a file."""
    head = f'Content-Disposition: form-data; name="{field}"; filename="{name}"\r\nContent-Type: image/png'
    note = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="note"\r\n\r\nmine\r\n'
    body = f"{note}--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    return body, {"Content-Type": f'multipart/form-data; boundary="{BOUNDARY}"'}


@contextmanager
def running(model: Path, *options: str, folder: Path, program: tuple[str, ...] = (str(SCRIPT),)) -> Iterator[Served]:
    """A server on a free port, in float32 on the CPU; its working and temporary folder is `folder`."""
    arguments = [str(model), "--port", "0", "--device", "cpu", "--precision", "float32", *options]
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        for line in process.stdout:
            if found := re.match(r"http://127\.0\.0\.1:(\d+)/", line):
                yield Served(process, int(found[1]))
                break
        else:
            assert process.stderr
            raise AssertionError(process.stderr.read())
    finally:
        process.kill()
        process.wait()
