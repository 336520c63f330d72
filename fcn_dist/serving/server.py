"""An address and a model in; a server that runs until it is told to stop."""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fcn_dist.console import console
from fcn_dist.deploy.predict import Predictor
from fcn_dist.errors import UserError
from fcn_dist.serving.app import build_app
from fcn_dist.serving.limits import Limits, Turns

CONNECTIONS = 256  # open at once, idle ones too
PATIENCE_SECONDS = 10.0  # for the head of a request to come
GRACE_SECONDS = 3  # for answers that are being sent when the server stops


def listen(host: str, port: int) -> socket.socket:
    """A socket at that address; port 0 takes a free one. Raises UserError if it cannot be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; 0 to 65535 is needed (0 takes any that is free)")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{host}, port {port}, cannot be listened at ({reason}); an address of this machine and a "
            "free port are needed; give another --port (0 takes any that is free) or --host"
        ) from error


def serve(predictor: Predictor, listener: socket.socket, limits: Limits) -> None:
    """Answer requests until SIGINT or SIGTERM; requests that are inside then get 503."""
    host, port = listener.getsockname()[:2]
    local = ipaddress.ip_address(host).is_loopback
    turns = Turns(limits.requests)
    worker = ThreadPoolExecutor(1, "labelling")
    hosts = frozenset({host, "localhost", "127.0.0.1", "::1"}) if local else None
    app = build_app(predictor, limits, turns, worker, hosts)
    # Requests are not logged: who sends what is nobody's business.
    config = uvicorn.Config(
        app,
        http=Impatient,
        access_log=False,
        log_level="warning",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    # What is wrong with a form is its sender's to know.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    # uvicorn stops on these by itself, and afterwards raises them again.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)
    console.print(f"{predictor.info.path.name} on {predictor.device} in {predictor.precision}")
    console.print(f"http://{f'[{host}]' if ':' in host else host}:{port}/  (Ctrl-C ends it)")
    if not local:
        console.print("It is open to everyone who reaches this machine at that port.")
    sys.stdout.flush()
    _Server(config, turns).run(sockets=[listener])
    if wait([worker.submit(int)], timeout=0.1).not_done:
        # A prediction cannot be interrupted, and may take a minute; nobody waits for it any more.
        sys.stdout.flush()
        os._exit(0)


class Impatient(H11Protocol):
    """Closes a connection on which no request has come for a while: there are only so many."""

    _seen: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Look again and again."""
        super().connection_made(transport)
        self._look = self.loop.call_later(PATIENCE_SECONDS, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to look at any more."""
        self._look.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._seen:
            self.transport.close()
            return
        self._seen = self.cycle
        self._look = self.loop.call_later(PATIENCE_SECONDS, self._close_if_idle)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, turns: Turns) -> None:
        super().__init__(config)
        self._turns = turns

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """First those who wait are told."""
        self._turns.close()
        await super().shutdown(sockets)
