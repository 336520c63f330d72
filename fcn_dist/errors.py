"""How commands end early: exceptions raised anywhere, caught once per command, and the exit code of each."""

EXIT_LOST_PEER = 1  # as for a bug: it was the lost rank's end that decides, and launchers report that one's code
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: stopped early, with a checkpoint; the same command goes on
EXIT_DIVERGED = 76  # more steps were not finite than allowed: the same command would only meet them again
EXIT_STUCK = 77  # a rank did nothing for too long; the same command goes on from the last checkpoint


class UserError(Exception):
    """Something the user can fix; a command prints it without a traceback and exits with code 2.

    The message says what is wrong, the value found, what is needed, and what to change.
    """

    code = EXIT_USER_ERROR


class EarlyEnd(Exception):
    """A run that ends before its last step, with an exit code of its own that schedulers can act on.

    The message says what happened and how to go on.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)  # both, so that one rank can send it to the others
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


class LostPeer(Exception):
    """Another rank of the job is gone, and this one cannot go on without it; every rank that notices says so itself.

    The message says how it showed. The cause stands in what the lost rank printed, if it could.
    """

    code = EXIT_LOST_PEER


def counted(number: int, thing: str) -> str:
    """Such as "1 rank", or "2 ranks"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def named(items: list[str], limit: int = 5) -> str:
    """The first `limit` items joined by commas, with a count of those not shown."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
