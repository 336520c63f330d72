"""How fast crops are loaded, beside a plain folder, webdataset, mosaicml-streaming and litdata.

    python benchmarks/loading.py SCENES --workers 2 --rounds 5 --output reports

Prints tables, and writes them as Markdown with every figure as JSON. See benchmarks/README.md.
"""

import argparse
import sys
import tempfile
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from entry import run_benchmark
from measure import INSTALL, Contender, Failed, Measured, missing, run_once, run_rounds
from scenes_copies import link_copies
from tables import Table, Target, fastest, median_rate, rate_table, ratio, targets_table, write_report

from fcn_dist.console import status_console
from fcn_dist.errors import UserError

BATCH = 32
HANDED_OVER = 8  # times as many batches where nothing is decoded and no epoch ends, or it would be over in an instant
CPU = "CPU us an image"
PEERS = (
    # name, function, what prepares its data, module it needs
    ("torch Dataset, folder", "folder", "", ""),
    ("webdataset", "webdataset", "loading_ours:write_shards", ""),
    ("mosaicml-streaming", "mosaicml", "loading_peers:write_mds", "streaming"),
    ("litdata", "litdata", "loading_peers:write_litdata", "litdata"),
)
CROPS = {
    "Pillow": "Pillow decodes, resizes the whole and crops",
    "our crop": "our decoding, and our crop before the resize",
    "no decoding": "reads and hands over, always the same crop",
}


def main(argv: list[str]) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scenes", type=Path, help="folder with images/training, annotations/training and objectInfo150.txt")
    add("--workers", type=int, default=2, metavar="N", help="loader processes (default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="measurements of each row (default: %(default)s)")
    add("--batches", type=int, default=40, metavar="N", help=f"of {BATCH}, measured (default: %(default)s)")
    add("--warmup", type=int, default=12, metavar="N", help="batches before those (default: %(default)s)")
    add("--tries", type=int, default=10, metavar="N", help="fresh loaders for the first batch (default: %(default)s)")
    add("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR", help="default: %(default)s")
    add("--scratch", type=Path, metavar="DIR", help="where to pack to (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    if not find_spec("psutil"):
        raise UserError(f"psutil is not installed; {INSTALL}")
    if not (args.scenes / "images" / "training").is_dir():
        raise UserError(f"{args.scenes} has no images/training; name a scenes folder")
    if args.batches % args.workers or args.warmup % args.workers:
        # Batches come in turns, one a worker: part of a turn would be counted, or not, by chance.
        raise UserError(f"--batches {args.batches} and --warmup {args.warmup} must be multiples of --workers")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        _run(args, Path(scratch))


def contenders(data: dict[str, str], problems: dict[str, str], args: argparse.Namespace) -> dict[str, list[Contender]]:
    """Rows by table; `data` is where each function finds its data, `problems` why it does not."""
    timing = {"workers": args.workers, "batches": args.batches}
    loaded = timing | {"warmup": args.warmup}
    long = {"batches": HANDED_OVER * args.batches}
    shards = {"data": data["webdataset"]}

    def ours(name: str, does: str, **options: Any) -> Contender:
        return Contender(name, "loading_ours:load", shards | loaded | options, does)

    def peers(crop: str) -> list[Contender]:
        return [
            Contender(
                f"{name}, {crop}",
                f"loading_peers:{function}",
                {"data": data[function], "crop": crop} | loaded,
                CROPS[crop],
                needs,
                problem=problems.get(function, ""),
            )
            for name, function, _, needs in PEERS
        ]

    def alone(name: str, does: str, crop: bool) -> Contender:
        return Contender(name, "loading_ours:alone", shards | timing | {"crop": crop}, does)

    return {
        "loading": [
            ours("ours", "build_loader"),
            *peers("Pillow"),
            *peers("our crop"),
        ],
        "parts": [
            alone("decoding alone", "bytes in memory, plain processes, no loader", crop=False),
            alone("decoding and cropping alone", "the same, and cropped into one batch", crop=True),
            ours("ours, no decoding", "reads, checks and hands over", without="decoding", **long),
            *peers("no decoding"),
            ours("ours, only handing over", "batches are made and handed over", without="reading", **long),
            Contender(
                "torch, only handing over", "loading_peers:hand_over", loaded | long, "DataLoader with one same batch"
            ),
        ],
    }


def prepare(scenes: Path, scratch: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Write each peer's data; returns where it lies, and what went wrong by function."""
    data, problems = {}, {}
    for name, function, writer, needs in PEERS:
        out = scratch / function
        data[function] = str(scenes if not writer else out / "training" if function == "webdataset" else out)
        contender = Contender(name, writer, {"scenes": str(scenes), "out": str(out)}, needs=needs)
        if not writer or missing(contender):
            continue
        status_console.print(f"writing the data of {name}")
        try:
            run_once(contender, scratch)
        except Failed as failure:
            problems[function] = f"its data could not be written: {failure}"
            status_console.print(problems[function])
    return data, problems


def _run(args: argparse.Namespace, scratch: Path) -> None:
    per_copy = sum(1 for _ in (args.scenes / "images" / "training").iterdir())
    # Twice what is loaded: webdataset deals whole shards out to workers, which may hold unequal shares.
    copies = ceil(2 * (args.warmup + args.batches) * BATCH / per_copy)
    pairs = link_copies(args.scenes, scratch / "scenes", copies)
    data, problems = prepare(scratch / "scenes", scratch)
    groups = contenders(data, problems, args)
    flat = run_rounds([one for group in groups.values() for one in group], args.rounds, scratch)
    measured = {kind: [one for one in flat if one.contender in group] for kind, group in groups.items()}
    latencies = run_rounds(
        [
            Contender(
                "first batch",
                "loading_ours:first_batches",
                {"data": data["webdataset"], "workers": args.workers, "tries": args.tries},
            )
        ],
        1,
        scratch,
    )[0]
    ours = measured["loading"][0]
    tables = [
        rate_table("loading", measured["loading"], ours, _rate, CPU),
        rate_table("where the time goes", measured["parts"], ours, _rate, CPU),
        _latency_table(latencies),
        targets_table(_targets(measured, latencies)),
    ]
    facts = {
        "scenes": f"{args.scenes.resolve().name}, {len(pairs)} pairs ({copies} links to each)",
        "micro-batch": f"{BATCH} crops of 256x256; {args.warmup} to warm up, {args.batches} measured",
        "workers": args.workers,
        "rounds": args.rounds,
    }
    write_report(args.output, f"loading-{args.scenes.resolve().name}", facts, tables, [*flat, latencies])


def _rate(figures: dict[str, Any]) -> float:
    return float(figures["images/s"])


def _latency_table(latencies: Measured) -> Table:
    rows = []
    for where, times in latencies.rounds[0].items() if latencies.rounds else ():
        rows.append((f"at the {where} of an epoch", *(f"{f(times):.0f}" for f in (median, min, max))))
    return Table("first batch of a fresh loader, ms", ("", "median", "min", "max"), tuple(rows))


def _targets(measured: dict[str, list[Measured]], latencies: Measured) -> list[Target]:
    by_name = {one.contender.name: one for group in measured.values() for one in group}
    ours = median_rate(by_name["ours"], _rate)
    pillow = fastest([one for name, one in by_name.items() if name.endswith(", Pillow")], _rate)
    same_crop = median_rate(by_name["webdataset, our crop"], _rate)
    alone = median_rate(by_name["decoding and cropping alone"], _rate)
    first = latencies.rounds[0] if latencies.rounds else None
    return [
        Target("ours over the fastest peer that decodes with Pillow", 2.0, ratio(ours, pillow)),
        Target("ours over webdataset with our crop", 1.1, ratio(ours, same_crop)),
        Target("ours over decoding and cropping alone", 0.85, ratio(ours, alone)),
        Target(
            "first batch in the middle of an epoch over that at its start",
            1.2,
            ratio(median(first["middle"]), median(first["start"])) if first else None,
            at_most=True,
        ),
    ]


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
