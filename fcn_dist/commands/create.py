"""`create`: pack a folder of scenes into shards."""

import argparse
import time

from rich.table import Table

from fcn_dist.console import console
from fcn_dist.data.packing import DEFAULT_SAMPLES_PER_SHARD, DEFAULT_SPLITS, pack
from fcn_dist.data.pairs import DEFAULT_MAX_PIXELS, DEFAULT_QUALITY
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import named


def main(argv: list[str]) -> None:
    """Pack as the arguments say, and print what was packed."""
    options = vars(_parser().parse_args(argv))
    scenes, out = options.pop("scenes"), options.pop("out")
    splits = options.pop("split") or DEFAULT_SPLITS
    started = time.perf_counter()
    shard_sets = pack(scenes, out, splits, **options)
    _print_summary(shard_sets, time.perf_counter() - started)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("create", description="Pack a folder of scenes into WebDataset shards.")
    add = parser.add_argument
    add("scenes", help="folder with images/SPLIT, annotations/SPLIT and objectInfo150.txt")
    add("out", help="folder to write OUT/SPLIT/SPLIT-000000.tar ... and OUT/SPLIT/index.json into")
    add("--split", action="append", metavar="NAME", help=f"may be repeated (default: {', '.join(DEFAULT_SPLITS)})")
    add(
        "--samples-per-shard",
        type=int,
        default=DEFAULT_SAMPLES_PER_SHARD,
        metavar="N",
        help="default: %(default)s",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the order of the samples (default: %(default)s)")
    add("--keep-order", action="store_true", help="keep the samples in the order of their names")
    add(
        "--short-side",
        type=int,
        metavar="N",
        help="shrink scenes whose short side is longer (default: as they are)",
    )
    add(
        "--quality",
        type=int,
        default=DEFAULT_QUALITY,
        metavar="N",
        help="of converted JPEGs (default: %(default)s)",
    )
    add(
        "--max-pixels",
        type=int,
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help="of one image (default: %(default)s)",
    )
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
    add("--overwrite", action="store_true", help="replace shard sets that are there already")
    return parser


def _print_summary(shard_sets: list[ShardSet], seconds: float) -> None:
    table = Table("split", "samples", "shards", "MB", "classes seen", title="packed", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for shard_set in shard_sets:
        size = sum(shard.size for shard in shard_set.shards)
        seen = sum(pixels > 0 for pixels in shard_set.class_pixels[1:])
        table.add_row(
            shard_set.split,
            f"{len(shard_set):,}",
            f"{len(shard_set.shards):,}",
            f"{size / 1e6:,.1f}",
            f"{seen} of {len(shard_set.classes)}",
        )
    console.print(table)
    for shard_set in shard_sets:
        for kind, conversion in shard_set.created_by["conversions"].items():
            console.print(f"{shard_set.split}: {conversion['count']} x {kind}: {named(conversion['keys'])}")
    samples = sum(map(len, shard_sets))
    console.print(f"{samples:,} samples in {seconds:.1f} s, {samples / seconds:,.0f} images/s")
