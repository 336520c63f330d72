"""`merge`: join the parts of a set that several runs have packed."""

import argparse
from pathlib import Path

from fcn_dist.console import console
from fcn_dist.data.packing.merge import merge
from fcn_dist.errors import counted, named


def main(argv: list[str]) -> None:
    """Merge, and print what the set holds."""
    given = build_parser().parse_args(argv)
    for shard_set in merge(given.out, *given.sources, workers=given.workers):
        size = sum(shard.size for shard in shard_set.shards)
        console.print(
            f"{shard_set.split}: {counted(len(shard_set), 'sample')} in {counted(len(shard_set.shards), 'shard')}, "
            f"{size / 1e6:,.1f} MB"
        )
        for kind, conversion in shard_set.created_by["conversions"].items():
            console.print(f"{shard_set.split}: {conversion['count']} x {kind}: {named(conversion['keys'])}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Join the parts that `create --part I/N` has packed: check that all are there, and write the index "
        "that one machine would have written.",
    )
    parser.add_argument("out", type=Path, help="folder that shall hold the set; parts that are in there stay in place")
    parser.add_argument("sources", type=Path, nargs="*", metavar="from", help="folders from which to copy other parts")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    return parser
