"""Options that may stand anywhere on a command line."""

import argparse
from collections.abc import Sequence


def parse_anywhere(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Options between positional arguments are options, too; with a "--", after which nothing is, they go before it."""
    return parser.parse_args(argv) if "--" in argv else parser.parse_intermixed_args(argv)
