"""What users can get wrong: one exception, raised anywhere, caught once per command."""


class UserError(Exception):
    """Something the user can fix; a command prints it without a traceback and exits with code 2.

    The message says what is wrong, the value found, what is needed, and what to change.
    """


def named(items: list[str], limit: int = 5) -> str:
    """The first `limit` items joined by commas, with a count of those not shown."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
