"""`verify`: check a shard set against its index."""

import argparse
import json
from pathlib import Path

from fcn_dist.console import console
from fcn_dist.data.verifying.verify import SplitReport, verify
from fcn_dist.errors import UserError
from fcn_dist.files import write_text


def main(argv: list[str]) -> None:
    """Verify; prints one line if all is well, and raises UserError that lists everything if not."""
    arguments = build_parser().parse_args(argv)
    reports = verify(arguments.out, arguments.deep, arguments.workers)
    if arguments.json:
        write_text(arguments.json, json.dumps(_as_json(reports), indent=1) + "\n")
    lines = [
        "  " + " ".join((f"{report.split}/{problem.file}:", *filter(None, (problem.member, problem.reason))))
        for report in reports
        for problem in report.problems
    ]
    if lines:
        raise UserError(
            f"{arguments.out} is not as it was packed; {len(lines)} problem{'s' * (len(lines) > 1)}:\n"
            + "\n".join(lines)
            + "\nrestore these files from a copy, or pack the scenes again"
        )
    samples, shards, size = (
        sum(getattr(report, name) for report in reports) for name in ("num_samples", "num_shards", "num_bytes")
    )
    splits = ", ".join(report.split for report in reports)
    depth = "hashed, walked and decoded" if arguments.deep else "hashed and walked"
    console.print(f"all good: {samples:,} samples in {shards:,} shards ({size / 1e6:,.1f} MB; {splits}) {depth}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Check shard sets against their index.")
    parser.add_argument("out", type=Path, help="folder that create has written, or one split of it")
    parser.add_argument("--deep", action="store_true", help="also decode every sample and recount its pixels")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was found there as well")
    return parser


def _as_json(reports: list[SplitReport]) -> dict[str, object]:
    return {
        "ok": not any(report.problems for report in reports),
        "splits": {
            report.split: {
                "samples": report.num_samples,
                "shards": report.num_shards,
                "bytes": report.num_bytes,
                "problems": [problem._asdict() for problem in report.problems],
            }
            for report in reports
        },
    }
