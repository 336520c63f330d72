"""How long the main thread is blocked in collectives, measured where every one of them waits.

On CPU, gloo's collectives run in threads of their own, and whoever needs their outcome calls `Work.wait`: DeepSpeed,
torch.distributed and we alike. The rank that all others wait for is then the one that waits least. On CUDA, `wait`
returns at once and the device waits, so nothing is measured there.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import Work

from fcn_dist.training.phases import PhaseClock


@contextmanager
def waits_measured(clock: PhaseClock) -> Iterator[None]:
    """Add the seconds of each wait of the main thread to `clock`."""
    original = Work.wait

    def wait(work: Work, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return original(work, *arguments, **options)
        began = time.monotonic()
        try:
            return original(work, *arguments, **options)
        finally:
            clock.add_wait(time.monotonic() - began)

    Work.wait = wait  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Work.wait = original  # type: ignore[method-assign]
