"""The options by which a command is told how to look at images."""

import argparse

from fcn_dist.model.views import Views


def add_views(parser: argparse.ArgumentParser) -> None:
    """--scales, --flip, --window and --overlap."""
    group = parser.add_argument_group("several looks at each image, whose probabilities are averaged")
    group.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="FACTOR", help="of its size")
    group.add_argument("--flip", action="store_true", help="each also mirrored")
    group.add_argument("--window", type=int, default=0, metavar="PIXELS", help="of windows' sides (default: none)")
    group.add_argument("--overlap", type=float, default=1 / 3, metavar="SHARE", help="of windows (default: a third)")


def views_of(options: argparse.Namespace) -> Views:
    """What was asked for; raises UserError if it cannot be."""
    return Views(tuple(options.scales), options.flip, options.window, options.overlap)
