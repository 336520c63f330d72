"""Whether memory stays flat: many epochs of a small set, and what all processes of the loader hold after each.

    python benchmarks/memory.py SCENES --workers 4 --epochs 20 --output reports

Prints a table, and writes it as Markdown and JSON. See benchmarks/README.md.
"""

import argparse
import sys
import tempfile
from math import ceil
from pathlib import Path
from typing import Any

from entry import run_benchmark
from measure import Contender, Failed, Measured, missing, run_once
from tables import Table, write_report

from fcn_dist.errors import UserError

SETTLED = 3  # the epoch from which growth is counted: buffers and pools are at their size by then


def measure(data: str, workers: int, epochs: int) -> dict[str, Any]:
    """Megabytes of the main process and of the loader's after each epoch."""
    from loading_ours import batches_from, num_samples
    from loading_peers import BATCH

    samples = num_samples(data)
    ends = [ceil(epoch * samples / BATCH) for epoch in range(1, epochs + 1)]  # in steps, rounded up
    loader = batches_from(data, workers)  # endless: loader processes that have no more to do would give memory back
    figures: dict[str, Any] = {"samples": samples, "main": [], "workers": [], "processes": []}
    for step in range(1, ends[-1] + 1):
        next(loader)
        if step in ends:
            main, others = held()
            figures["main"].append(main)
            figures["workers"].append(sum(others))
            figures["processes"].append(1 + len(others))
    return figures


def held() -> tuple[float, list[float]]:
    """Megabytes of this process and of each below it; a page that n processes share counts one n-th in each (PSS)."""
    import psutil

    process = psutil.Process()
    below = process.children(recursive=True)
    return _pss(process), [_pss(child) for child in below]


def _pss(process: Any) -> float:
    return float(process.memory_full_info().pss) / 1e6


def main(argv: list[str]) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scenes", type=Path, help="folder with images/training, annotations/training and objectInfo150.txt")
    add("--workers", type=int, default=4, metavar="N", help="loader processes (default: %(default)s)")
    add("--epochs", type=int, default=20, metavar="N", help="default: %(default)s")
    add("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR", help="default: %(default)s")
    add("--scratch", type=Path, metavar="DIR", help="where to pack to (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    if args.epochs <= SETTLED:
        raise UserError(f"--epochs is {args.epochs}; growth is counted from epoch {SETTLED}, so more are needed")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        _run(args, Path(scratch))


def _run(args: argparse.Namespace, scratch: Path) -> None:
    data = scratch / "shards"
    options = {"data": str(data / "training"), "workers": args.workers, "epochs": args.epochs}
    contender = Contender("loader", "memory:measure", options, needs="psutil")
    if problem := missing(contender):
        raise UserError(problem)
    try:
        written = {"scenes": str(args.scenes), "out": str(data)}
        run_once(Contender("pack", "loading_ours:write_shards", written), scratch)
        measured = Measured(contender, [run_once(contender, scratch)])
    except Failed as failure:
        raise UserError(f"the measurement failed:\n{failure}") from failure
    facts = {
        "scenes": f"{args.scenes.resolve().name}, {measured.rounds[0]['samples']} pairs",
        "workers": args.workers,
        f"growth from epoch {SETTLED} to {args.epochs}": _growth(measured),
    }
    write_report(args.output, f"memory-{args.scenes.resolve().name}", facts, [_table(measured)], [measured])


def _totals(measured: Measured) -> list[float]:
    figures = measured.rounds[0]
    return [main + workers for main, workers in zip(figures["main"], figures["workers"], strict=True)]


def _growth(measured: Measured) -> str:
    settled, last = _totals(measured)[SETTLED - 1], _totals(measured)[-1]
    return f"{last - settled:+.1f} MB ({last / settled - 1:+.1%})"


def _table(measured: Measured) -> Table:
    figures = measured.rounds[0]
    columns = zip(_totals(measured), figures["main"], figures["workers"], strict=True)
    rows = [
        (str(epoch), *(f"{value:,.1f}" for value in values), str(processes))
        for epoch, (values, processes) in enumerate(zip(columns, figures["processes"], strict=True), 1)
    ]
    return Table(
        "memory after each epoch (PSS)",
        ("epoch", "all, MB", "main process", "loader processes", "processes"),
        tuple(rows),
    )


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
