"""Remote shards fetched into the node cache before they are needed: when each is first used in, copies on disk out."""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from fcn_dist.data.remote.cache import NodeCache, RemoteFile


class ReadAhead:
    """Keeps the next `depth` files of a consumer in the cache.

    `uses` yields, in the order of the consumer, the position at which a file is first used and the file; it may be
    endless and may name a file again. It is read in the background.

    Nothing runs before the first `advance`, so that one made before a fork works in each child. What goes wrong in the
    background is left alone: the consumer's own fetch meets it again, and says so. The background ends, at the latest
    after the file that it is fetching, with `close`, when nobody holds the ReadAhead any more, and with the process.
    """

    def __init__(self, cache: NodeCache, uses: Iterator[tuple[int, RemoteFile]], depth: int) -> None:
        self._background = _Background(cache, uses, depth)
        self._started = False
        weakref.finalize(self, self._background.close)

    def advance(self, position: int) -> None:
        """Say that the consumer is at `position`, from which it never goes back."""
        self._background.advance(position)
        if not self._started:
            self._started = True
            threading.Thread(target=self._background.run, name="read-ahead", daemon=True).start()

    def close(self) -> None:
        """End the background; it is not waited for."""
        self._background.close()


class _Background:
    """What the thread holds: were it the ReadAhead itself, that would never be collected."""

    def __init__(self, cache: NodeCache, uses: Iterator[tuple[int, RemoteFile]], depth: int) -> None:
        self._cache = cache
        self._uses = uses
        self._depth = depth
        self._position = -1
        self._closed = False
        self._changed = threading.Condition()

    def advance(self, position: int) -> None:
        with self._changed:
            self._position = position
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        ahead: deque[tuple[int, RemoteFile]] = deque()
        with suppress(Exception):  # of `uses`, which the consumer computes as well
            for use in self._uses:
                if not self._wait_for_turn(ahead):
                    return
                ahead.append(use)
                position, file = use
                # What the consumer has reached it fetches itself, and has perhaps read to the end.
                if position > self._position:
                    with suppress(Exception):
                        self._cache.fetch(file)

    def _wait_for_turn(self, ahead: deque[tuple[int, RemoteFile]]) -> bool:
        """Wait until fewer than `depth` files are ahead; False if the read-ahead is closed."""
        with self._changed:
            while not self._closed:
                while ahead and ahead[0][0] <= self._position:
                    ahead.popleft()
                if len({file.sha256 for _, file in ahead}) < self._depth:
                    return True
                self._changed.wait()
        return False
