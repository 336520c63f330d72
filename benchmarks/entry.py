"""How a benchmark's command starts and ends: whatever ends it, ends what it has started."""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from fcn_dist.console import run_command

Main = Callable[[list[str]], None]


def run_benchmark(main: Main) -> int:
    """Run `main` with the process's arguments; returns the exit code.

    Its ranks and contenders have groups of their own, which a signal to this process does not reach. So a request to
    end unwinds the stack, where whoever has started them ends them.
    """
    signal.signal(signal.SIGTERM, _unwind)
    return run_command(lambda: main(sys.argv[1:]))


def _unwind(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)
