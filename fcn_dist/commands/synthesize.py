"""`synthesize`: render synthetic scenes into a folder that `create` packs."""

import argparse
import re
from pathlib import Path

from fcn_dist.console import console
from fcn_dist.data.synthetic import CLASSES, render
from fcn_dist.errors import UserError


def main(argv: list[str]) -> None:
    """Render as the arguments say, and print what was rendered."""
    options = build_parser().parse_args(argv)
    counts = {"training": options.training, "validation": options.validation}
    render(options.out, **counts, size=_size(options.size), seed=options.seed)
    console.print(
        f"{options.out}: {options.training} training and {options.validation} validation scenes, {len(CLASSES)} classes"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Render synthetic scenes in the layout of ADEChallengeData2016.")
    add = parser.add_argument
    add("out", type=Path, help="folder to write; new or empty")
    add("--training", type=int, default=96, metavar="N", help="training scenes (default: %(default)s)")
    add("--validation", type=int, default=24, metavar="N", help="validation scenes (default: %(default)s)")
    add("--size", default="160x208", metavar="HxW", help="middle size in pixels (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="another seed, other scenes (default: %(default)s)")
    return parser


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise UserError(f"--size {text!r} is no size; height and width in pixels are needed; write it as 160x208")
    return int(match[1]), int(match[2])
