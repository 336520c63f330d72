"""How fast whole images are evaluated and predicted, beside the plain way: upsample, softmax, argmax at full size.

    python benchmarks/evaluation.py [SCENES] --images 8 --rounds 3 --output reports

The network is FCN-8s on VGG16 with 150 outputs, the same for both. On the GPU if there is one. Prints tables, and
writes them as Markdown with every figure as JSON. See benchmarks/README.md.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from entry import run_benchmark
from measure import Contender, Measured, run_rounds
from tables import DOES, Table, Target, median_rate, one_line, ratio, targets_table, write_report

from fcn_dist.errors import UserError
from fcn_dist.model.devices import multiplies

WAYS = {"ours": "tile by tile, argmax of scores", "plain": "upsample, softmax, argmax at full size"}
KINDS: dict[str, dict[str, Any]] = {
    "prediction": {"scored": False, "after": False},
    "evaluation": {"scored": True, "after": False},
    "prediction, after the coarse scores": {"scored": False, "after": True},
    "evaluation, after the coarse scores": {"scored": True, "after": True},
}
NEEDED = 2.0  # times as fast as the plain way


def main(argv: list[str]) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scenes", type=Path, nargs="?", help="folder with images/validation (default: drawn, of sizes like ADE's)")
    add("--images", type=int, default=8, metavar="N", help="of a measurement (default: %(default)s)")
    add("--warmup", type=int, default=2, metavar="N", help="images before those (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="measurements of each row (default: %(default)s)")
    add("--width", type=float, default=1.0, metavar="FACTOR", help="of the network's channels (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--time-limit", type=float, default=math.inf, metavar="S", help="seconds after which what is left is left out")
    add("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device; one is needed for --device cuda; leave it out to measure the CPU")
    if args.scenes and not any((args.scenes / "images" / "validation").glob("*.jpg")):
        raise UserError(f"{args.scenes} has no images/validation/*.jpg; name a scenes folder, or none")
    contenders = rows(args)
    with tempfile.TemporaryDirectory() as scratch:
        measured = run_rounds(list(contenders.values()), args.rounds, Path(scratch), args.time_limit)
    fast = multiplies(torch.device(args.device), torch.bfloat16)
    by_row = dict(zip(contenders, measured, strict=True))
    facts = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "images": f"{args.images} of {args.scenes.resolve().name if args.scenes else 'drawn sizes'}",
        "precision": f"float32; our prediction {'bfloat16' if fast else 'float32'}",
        "network": f"FCN-8s on VGG16, width {args.width:g}, 150 outputs",
        "rounds": args.rounds,
    }
    tables = [table(by_row), targets_table(targets(by_row))]
    write_report(args.output, f"evaluation-{args.device}", facts, tables, measured)


def rows(args: argparse.Namespace) -> dict[tuple[str, str], Contender]:
    """By kind and way."""
    common = {
        "scenes": str(args.scenes.resolve()) if args.scenes else None,
        "count": args.images,
        "device": args.device,
        "warmup": args.warmup,
        "width": args.width,
    }
    return {
        (kind, way): Contender(f"{way}, {kind}", "evaluation_ways:label", {"way": way} | common | options, does)
        for kind, options in KINDS.items()
        for way, does in WAYS.items()
    }


def table(measured: dict[tuple[str, str], Measured]) -> Table:
    """Medians over the rounds, each way beside the other."""
    figures = ("forward ms", "following ms", "CPU ms", "megapixels", "peak GB")
    found: list[tuple[str, ...]] = []
    for (kind, _), one in measured.items():
        if one.problem or not one.rounds:
            found.append((one.contender.name, *("",) * (len(figures) + 2), one_line(one.problem)))
            continue
        rate = median(one.figures("images/s"))
        times = ratio(median_rate(measured[kind, "ours"], _rate), rate)
        cells = [f"{median(one.figures(name)):,.2f}" for name in figures]
        ours = f"{times:.2f}" if times else ""
        found.append((one.contender.name, f"{rate:,.2f}", ours, *cells, one.contender.does))
    return Table("from pixels to labels", ("", "images/s", "ours is x times", *figures, DOES), tuple(found))


def targets(measured: dict[tuple[str, str], Measured]) -> list[Target]:
    """Ours over the plain way, the whole and what follows the coarse scores."""
    return [
        Target(
            f"{kind}, ours over the plain way",
            NEEDED,
            ratio(median_rate(measured[kind, "ours"], _rate), median_rate(measured[kind, "plain"], _rate)),
        )
        for kind in KINDS
    ]


def _rate(figures: dict[str, Any]) -> float:
    return float(figures["images/s"])


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
