"""`python launch/report.py RUN [RUN2 ...]`: one HTML page about a run, or several side by side, to open in a browser.

It is one file and fetches nothing. With several runs their curves, figures and settings are set against each other.
"""

import argparse
from pathlib import Path

from fcn_dist.console import console
from fcn_dist.sizes import show_size


def main(argv: list[str]) -> None:
    """Parse, read, draw and write."""
    options = build_parser().parse_args(argv)
    from fcn_dist.reporting.report import write_report  # which is refused where matplotlib is not installed

    path = write_report(options.runs, options.output)
    console.print(f"{path}: {show_size(path.stat().st_size)}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder that launch/train.py wrote")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html in the run, comparison.html in the first of several)",
    )
    return parser
