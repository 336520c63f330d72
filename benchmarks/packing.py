"""How fast scenes are packed, beside webdataset's ShardWriter and mosaicml-streaming's MDSWriter.

    python benchmarks/packing.py SCENES --workers 2 --rounds 5 --output reports

Prints a table, and writes it as Markdown with every figure as JSON. See benchmarks/README.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from entry import run_benchmark
from measure import Contender, Measured, run_rounds
from scenes_copies import link_copies
from tables import Table, Target, fastest, median_rate, rate_table, ratio, targets_table, write_report

from fcn_dist.errors import UserError

OURS = "decodes both, refuses damage and misfits, counts classes and channels, CRC-32, SHA-256, flushes to disk"
WORK = {
    "copy": "copies bytes, looks at nothing",
    "check": "decodes both with Pillow, refuses damage, counts classes and channels, SHA-256 of shards",
    "shrink": "the same, short side to 256, both encoded anew with Pillow",
}


def contenders(scenes: Path, workers: int) -> dict[str, list[Contender]]:
    """Rows by the kind of work; ours come first in "check" and "shrink"."""
    several = f"{workers} processes"

    def ours(name: str, does: str, function: str = "packed", **options: Any) -> Contender:
        return Contender(name, f"packing_ours:{function}", {"scenes": str(scenes)} | options, does, writes=True)

    def peers(work: str) -> list[Contender]:
        options = {"scenes": str(scenes), "work": work}
        return [
            Contender(f"{name}, {processes}", target, options | {"workers": n}, WORK[work], needs, writes=True)
            for name, target, needs in (
                ("webdataset ShardWriter", "packing_peers:shardwriter", "webdataset"),
                ("mosaicml MDSWriter", "packing_peers:mdswriter", "streaming"),
            )
            for n, processes in ((1, "1 process"), (workers, several))
        ]

    return {
        "check": [
            ours(f"ours, {several}", OURS, workers=workers),
            ours("ours, 1 process", OURS, workers=1),
            ours(f"ours, {several}, as a command", "also the start of Python and imports", "command", workers=workers),
            *peers("check"),
        ],
        "copy": peers("copy"),
        "shrink": [
            ours(
                f"ours, {several}, shrunk",
                "the same, short side to 256, both encoded anew",
                workers=workers,
                shrink=True,
            ),
            *peers("shrink"),
        ],
    }


def main(argv: list[str]) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scenes", type=Path, help="folder with images/training, annotations/training and objectInfo150.txt")
    add("--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="measurements of each row (default: %(default)s)")
    add("--copies", type=int, default=4, metavar="N", help="times each pair is packed (default: %(default)s)")
    add("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR", help="default: %(default)s")
    add("--scratch", type=Path, metavar="DIR", help="where to pack to (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    if not (args.scenes / "images" / "training").is_dir():
        raise UserError(f"{args.scenes} has no images/training; name a scenes folder")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        _run(args, Path(scratch))


def _run(args: argparse.Namespace, scratch: Path) -> None:
    pairs = link_copies(args.scenes, scratch / "scenes", args.copies)
    megabytes = sum(path.stat().st_size for pair in pairs for path in (pair.image, pair.mask)) / 1e6
    groups = contenders(scratch / "scenes", args.workers)
    flat = run_rounds([one for group in groups.values() for one in group], args.rounds, scratch)
    measured = {kind: [one for one in flat if one.contender in group] for kind, group in groups.items()}
    for one in flat:
        for round_ in one.rounds:
            round_["MB/s"] = megabytes / round_["seconds"]

    profile = run_rounds(
        [Contender("profile", "packing_ours:profiled", {"scenes": str(scratch / "scenes")}, writes=True)], 1, scratch
    )[0]

    def rate(figures: dict[str, Any]) -> float:
        return len(pairs) / float(figures["seconds"])

    ours, ours_small = measured["check"][0], measured["shrink"][0]
    tables = [
        rate_table("packing, with the checks", measured["check"], ours, rate, "MB/s"),
        rate_table("packing, the peers without checks", [ours, *measured["copy"]], ours, rate, "MB/s"),
        rate_table("packing, shrunk to a short side of 256", measured["shrink"], ours_small, rate, "MB/s"),
        _profile_table(profile, len(pairs)),
    ]
    ratios = {kind: fastest([m for m in group if _is_peer(m)], rate) for kind, group in measured.items()}
    of_one = fastest([m for m in measured["check"] if _is_peer(m) and m.contender.options["workers"] == 1], rate)
    rate_of_ours = median_rate(ours, rate)
    goals = [
        Target("ours over the faster peer with checks, as its users run it", 1.5, ratio(rate_of_ours, of_one)),
        Target("ours over the fastest peer with checks, any processes", 1.5, ratio(rate_of_ours, ratios["check"])),
        Target("ours over the fastest peer without checks", 1.5, ratio(rate_of_ours, ratios["copy"])),
        Target("ours over the fastest peer, shrunk", 1.5, ratio(median_rate(ours_small, rate), ratios["shrink"])),
    ]
    facts = {
        "scenes": f"{args.scenes.resolve().name}, {len(pairs)} pairs ({args.copies} links to each), {megabytes:.1f} MB",
        "rounds": args.rounds,
    }
    write_report(
        args.output, f"packing-{args.scenes.resolve().name}", facts, [*tables, targets_table(goals)], [*flat, profile]
    )


def _is_peer(measured: Measured) -> bool:
    return "work" in measured.contender.options


def _profile_table(profile: Measured, pairs: int) -> Table:
    """Where ours spends its time."""
    title = "where one process of ours spends its time (own time of the costliest functions, under cProfile)"
    figures = profile.rounds[0] if profile.rounds else {}
    total = figures.get("seconds", 0.0)
    rows = [(name, f"{own / pairs * 1e6:,.0f}", f"{own / total:.1%}") for name, own in figures.items()]
    return Table(title, ("", "us a pair", "share"), tuple(rows))


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
