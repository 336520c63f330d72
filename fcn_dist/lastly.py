"""How a process that was one of several ranks is over: with the code that it means, the interpreter not taken down.

Torch's groups have threads that may want the interpreter's lock, and that live on after a group's end while anything
still refers to it, as DeepSpeed does. One that asks for the lock while the interpreter is taken down aborts the
process, whose exit code is then not what the command means: a job that has saved its state would not be continued.
"""

import atexit
import os
import signal
import sys

_codes: list[int] = []


# The last to be called of what is registered after it, so this module imports nothing that registers something before.
@atexit.register
def _be_over() -> None:
    if _codes:
        _end_now(_codes[-1])


def end_after_handlers(code: int) -> None:
    """Let the process be over with `code` once it has done all that it does at its end, unless it says another code."""
    _codes.append(code)


def end_before_handlers(code: int) -> None:
    """Let it be over at once when it comes to its end, after all that it still has to say."""
    atexit.register(_end_now, code)


def _end_now(code: int) -> None:
    from fcn_dist.lasting import lasting_output
    from fcn_dist.outcome import left_outcome

    unhandled = getattr(sys, "last_value", None)  # whose traceback was printed
    with lasting_output():
        pass  # what is left to say is said at the block's end
    if isinstance(unhandled, KeyboardInterrupt):  # Python ends by the signal then
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(left_outcome(1 if unhandled else code))
