"""`describe`: print what a shard set holds, and draw a sheet of its samples."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fcn_dist.console import console
from fcn_dist.data.describe import Description, Spread, describe
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.transforms import decode
from fcn_dist.data.verifying.verify import find_splits
from fcn_dist.deploy.colours import Colour
from fcn_dist.deploy.lettering import BACKGROUND, draw_caption
from fcn_dist.deploy.pictures import Labels, Picture, overlay, with_legend, write_png
from fcn_dist.errors import UserError, named
from fcn_dist.files import write_text

SHEET_COLUMNS, BOX_WIDTH, BOX_HEIGHT, GAP, CAPTION_SIZE = 3, 240, 180, 12, 13
BAR_WIDTH = 24
styled = Console(highlight=False, soft_wrap=True)  # reads markup: names that go to it are escaped


def main(argv: list[str]) -> None:
    """Describe every split of the folder."""
    arguments = build_parser().parse_args(argv)
    for option in ("top", "samples"):
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option} is {getattr(arguments, option)}; at least 1 is needed")
    shard_sets = [ShardSet.open(folder) for folder in find_splits(arguments.out)]
    descriptions = [describe(shard_set) for shard_set in shard_sets]
    for description in descriptions:
        _print(description, arguments.top)
    if arguments.json:
        facts = {description.split: asdict(description) for description in descriptions}
        write_text(arguments.json, json.dumps(facts, indent=1) + "\n")
    if arguments.sheet:
        _write_sheet(arguments.sheet, shard_sets, arguments.samples)
        console.print(f"sheet: {arguments.sheet}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Print what a shard set holds.")
    parser.add_argument("out", type=Path, help="folder that create has written, or one split of it")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="classes to list (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, metavar="PATH", help="draw samples with their labels into this PNG")
    parser.add_argument("--samples", type=int, default=12, metavar="N", help="on the sheet (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there as well")
    return parser


def _print(description: Description, top: int) -> None:
    d = description
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_row("samples", f"{d.samples:,} in {d.shards:,} shard{'s' * (d.shards > 1)}, {d.bytes / 1e6:,.1f} MB")
    for side in ("height", "width", "short_side"):
        spread: Spread = getattr(d, side)
        facts.add_row(side.replace("_", " "), f"{spread.smallest} to {spread.largest}, median {spread.median:g}")
    for name, triple in (("mean", d.channel_mean), ("std", d.channel_std)):
        facts.add_row(f"channel {name}", "RGB " + "  ".join(f"{value:.2f}" for value in triple))
    facts.add_row("unlabelled", f"{d.unlabelled_share:.1%} of all pixels")
    options = ", ".join(f"{name} {value}" for name, value in d.created_by["options"].items() if value is not None)
    facts.add_row("packed by", escape(f"fcn-dist {d.created_by['fcn_dist']} with {options}"))
    for kind, conversion in d.created_by["conversions"].items():
        facts.add_row("converted", escape(f"{conversion['count']} x {kind}: {named(conversion['keys'])}"))
    if not d.created_by["conversions"]:
        facts.add_row("converted", "none")
    styled.rule(f"[bold]{escape(d.split)}[/]", align="left")
    styled.print(facts)
    styled.print(_class_table(d, top))


def _class_table(description: Description, top: int) -> Table:
    shown = description.classes[:top]
    table = Table(box=None, header_style="dim", padding=(0, 1))
    for header in ("label", "", "share", "", "images", "class"):
        table.add_column(header, justify="right" if header in ("label", "share", "images") else "left")
    largest = max((c.pixel_share for c in shown), default=0.0) or 1.0
    for c in shown:
        colour = f"rgb({c.colour[0]},{c.colour[1]},{c.colour[2]})"
        bar = f"[{colour}]{'█' * round(c.pixel_share / largest * BAR_WIDTH)}[/]"
        row = str(c.label), f"[{colour}]██[/]", f"{c.pixel_share:.2%}", bar, f"{c.images:,}", escape(c.name)
        table.add_row(*row)
    rest = description.classes[top:]
    if rest:
        absent = sum(not c.images for c in rest)
        share = f"{sum(c.pixel_share for c in rest):.2%}"
        table.add_row("", "", share, "", "", f"[dim]{len(rest)} more classes, {absent} of them in no image[/]")
    return table


def _write_sheet(path: Path, shard_sets: list[ShardSet], samples: int) -> None:
    """Draw `samples` of each split, spread evenly over it: image and labels side by side, with one legend."""
    cells, maps = [], []
    for shard_set in shard_sets:
        count = min(samples, len(shard_set))
        indices = np.linspace(0, len(shard_set) - 1, count).round().astype(int)
        for index in indices:
            sample = shard_set.read(int(index))
            image, labels = decode(sample)
            cells.append(_cell(f"{shard_set.split}: {sample.key}", image, labels, shard_set.colours))
            maps.append(labels)
    missing = -len(cells) % SHEET_COLUMNS
    cells += [_paper(*cells[0].shape[:2])] * missing
    rows = [np.hstack(cells[start : start + SHEET_COLUMNS]) for start in range(0, len(cells), SHEET_COLUMNS)]
    body = np.vstack(rows)
    try:
        write_png(path, with_legend(body, maps, shard_sets[0].classes, shard_sets[0].colours))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another path for --sheet") from error


def _cell(title: str, image: Picture, labels: Labels, colours: Sequence[Colour]) -> Picture:
    """One sample: image and labels within two equal boxes, and its title below."""
    height, width = labels.shape
    scale = min(BOX_WIDTH / width, BOX_HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    labels = np.asarray(cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
    pair = np.hstack([image, overlay(image, labels, colours)])
    caption = draw_caption(title, 2 * BOX_WIDTH, CAPTION_SIZE)
    caption_top = BOX_HEIGHT + GAP // 3
    cell = _paper(caption_top + caption.shape[0] + GAP, 2 * BOX_WIDTH + GAP)
    # Pictures of a row stand on one line, above their captions.
    cell[BOX_HEIGHT - pair.shape[0] : BOX_HEIGHT, : pair.shape[1]] = pair
    cell[caption_top : caption_top + caption.shape[0], : caption.shape[1]] = caption
    return cell


def _paper(height: int, width: int) -> Picture:
    paper = np.empty((height, width, 3), np.uint8)
    paper[:] = BACKGROUND
    return paper
