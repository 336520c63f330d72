"""What a server takes on at the same time: sizes, and turns."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

from fastapi import HTTPException

from fcn_dist.errors import UserError

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Limits:
    """Of one server. What it holds at most is one decoded image with what the network makes of it, and the uploads."""

    max_bytes: int = 32_000_000  # of one upload
    max_pixels: int = 16_000_000  # of one image; a network at full width needs about 700 bytes a pixel
    requests: int = 16  # that wait or are worked on, each with its upload in memory
    upload_seconds: float = 60.0  # for one upload to arrive

    def __post_init__(self) -> None:
        """Raises UserError for limits that let nothing in."""
        for option, value in (("bytes", self.max_bytes), ("pixels", self.max_pixels), ("requests", self.requests)):
            if value < 1:
                flag = "--requests" if option == "requests" else f"--max-{option}"
                raise UserError(f"{flag} is {value}; 1 or more is needed")


class Turns:
    """Requests take turns: a bounded number is let in, one at a time is worked on. All methods in one event loop."""

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self._inside = 0
        self._work = asyncio.Lock()
        self._closing = asyncio.Event()
        self._seconds = 1.0  # that the last turn took

    @property
    def inside(self) -> int:
        """How many requests are let in."""
        return self._inside

    @asynccontextmanager
    async def let_in(self) -> AsyncIterator[None]:
        """From before the upload is read to the answer; HTTP error 503 if too many are inside."""
        if self._inside >= self._requests:
            wait = min(60, max(1, ceil(self._seconds * self._inside / 2)))
            message = f"{self._inside} images are waiting already; try again in {wait} s"
            raise HTTPException(503, message, headers={"Retry-After": str(wait)})
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Decoding and predicting: one request at a time, in the order they came."""
        async with self._work:
            start = time.monotonic()
            yield
            self._seconds = time.monotonic() - start

    def close(self) -> None:
        """End what is inside, with 503."""
        self._closing.set()

    async def until_closed(self, answering: Coroutine[Any, Any, Answer]) -> Answer:
        """The answer, or HTTP error 503 as soon as the server is stopping."""
        answer, closed = asyncio.ensure_future(answering), asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait((answer, closed), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise HTTPException(503, "the server is stopping")
            return answer.result()
        finally:
            answer.cancel()
            closed.cancel()
