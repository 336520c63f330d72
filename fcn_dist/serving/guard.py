"""What every request and answer passes: pages of other sites kept out, headers for browsers, refusals that arrive."""

import asyncio
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # No script or style but the page's own files, no request to anywhere else, no frame around it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LINGER_SECONDS = 2.0


class SecurityHeaders:
    """Adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers)


class OwnSite:
    """Refuses what another site's page sends, and, if `hosts` are given, names that other sites may point here.

    A page anywhere can send requests to this machine; browsers say in Origin where it came from. A site whose name
    is made to mean 127.0.0.1 after its page was loaded (DNS rebinding) is told by the Host header.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and _name(host) not in self._hosts:
            message = f"this server answers to {', '.join(sorted(self._hosts))} alone, not to {host!r}; --host opens it"
            return await JSONResponse({"detail": message}, 421)(scope, receive, send)
        if origin is not None and _netloc(origin) != host:
            message = f"a page of {origin} asked; only this server's own page and scripts may"
            return await JSONResponse({"detail": message}, 403)(scope, receive, send)
        return await self._app(scope, receive, send)


def _netloc(origin: str) -> str | None:
    """Of an Origin header; None if it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name(host: str) -> str | None:
    """Of a Host header, without the port; None if it is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class Lingering:
    """Closes the connection after an answer that comes before the whole upload, but lets the answer arrive.

    Closed at once, with bytes of the client's unread, the connection would be reset, and most clients would report
    that instead of the answer. So for a moment the rest is received and thrown away.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        # Who waits to be told "100 Continue" has sent nothing yet.
        received = "expect" in headers or not ("content-length" in headers or "transfer-encoding" in headers)

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def lingering(message: Message) -> None:
            if message["type"] == "http.response.start" and not received:
                MutableHeaders(scope=message)["Connection"] = "close"
            if message["type"] != "http.response.body" or message.get("more_body", False) or received:
                return await send(message)
            await send({**message, "more_body": True})
            try:
                async with asyncio.timeout(LINGER_SECONDS):
                    while not received:
                        await counted()
            except TimeoutError:
                pass
            return await send({"type": "http.response.body", "body": b""})

        return await self._app(scope, counted, lingering)
