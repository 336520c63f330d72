"""`create`: pack a folder of scenes into shards."""

import argparse
import time
from pathlib import Path

from rich.table import Table

from fcn_dist.console import console
from fcn_dist.data.packing.plan import DEFAULT_SAMPLES_PER_SHARD, PackOptions, Part
from fcn_dist.data.packing.run import DEFAULT_SPLITS, PackReport, pack_scenes
from fcn_dist.data.scenes.pairs import DEFAULT_MAX_PIXELS, DEFAULT_QUALITY
from fcn_dist.deploy.pictures import short_name
from fcn_dist.errors import UserError, named
from fcn_dist.sizes import parse_size


def main(argv: list[str]) -> None:
    """Pack as the arguments say, and print what was packed."""
    given = build_parser().parse_args(argv)
    options = PackOptions(
        given.samples_per_shard,
        parse_size(given.shard_size) if given.shard_size is not None else None,
        given.seed,
        given.keep_order,
        given.short_side,
        given.quality,
        given.max_pixels,
    )
    part = _parse_part(given.part) if given.part is not None else None
    splits = given.split or DEFAULT_SPLITS
    started = time.perf_counter()
    report = pack_scenes(given.scenes, given.out, splits, options, given.workers, part, given.overwrite)
    seconds = time.perf_counter() - started
    if report.kept:
        console.print(f"{report.kept} of {report.shards} shards were finished before; their hashes fit, they are kept")
    if part:
        console.print(f"part {part}: {report.samples:,} samples in {report.shards} shards in {seconds:.1f} s")
        console.print(f"once all {part.total} parts are there: python shards/merge.py {given.out}")
    else:
        _print_summary(report, seconds)


def _parse_part(text: str) -> Part:
    number, slash, total = text.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal()):
        raise UserError(f"--part is {text!r}; I/N with two whole numbers is needed, such as 1/4")
    return Part.of(int(number), int(total))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Pack a folder of scenes into WebDataset shards. A run that was interrupted goes on where it was "
        "if the same command is given again.",
    )
    add = parser.add_argument
    add("scenes", type=Path, help="folder with images/SPLIT, annotations/SPLIT and objectInfo150.txt")
    add("out", type=Path, help="folder to write OUT/SPLIT/SPLIT-000000.tar ... and OUT/SPLIT/index.json into")
    add("--split", action="append", metavar="NAME", help=f"may be repeated (default: {', '.join(DEFAULT_SPLITS)})")
    add("--samples-per-shard", type=int, metavar="N", help=f"default: {DEFAULT_SAMPLES_PER_SHARD}")
    add("--shard-size", metavar="SIZE", help="instead: as many samples as fit this size, such as 100MB")
    add("--seed", type=int, default=0, metavar="N", help="of the order of the samples (default: %(default)s)")
    add("--keep-order", action="store_true", help="keep the samples in the order of their names")
    add("--short-side", type=int, metavar="N", help="shrink scenes whose short side is longer (default: as they are)")
    quality = "of converted JPEGs (default: %(default)s)"
    add("--quality", type=int, default=DEFAULT_QUALITY, metavar="N", help=quality)
    pixels = "of one image (default: %(default)s)"
    add("--max-pixels", type=int, default=DEFAULT_MAX_PIXELS, metavar="N", help=pixels)
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
    add("--part", metavar="I/N", help="pack every N-th shard only, so that N machines pack one set; then run merge")
    add("--overwrite", action="store_true", help="replace shard sets that are there already; they are removed first")
    return parser


def _print_summary(report: PackReport, seconds: float) -> None:
    table = Table("split", "samples", "shards", "MB", "classes seen", title="packed", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for shard_set in report.shard_sets:
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
    for shard_set in report.shard_sets:
        pixels = zip(shard_set.classes, shard_set.class_pixels[1:], strict=True)
        if absent := [short_name(name) for name, count in pixels if not count]:
            console.print(f"{shard_set.split}: in no image: {named(absent)} (masks number classes from 1; 0 is other)")
        for kind, conversion in shard_set.created_by["conversions"].items():
            console.print(f"{shard_set.split}: {conversion['count']} x {kind}: {named(conversion['keys'])}")
    console.print(f"{report.samples:,} samples in {seconds:.1f} s, {report.samples / seconds:,.0f} images/s")
