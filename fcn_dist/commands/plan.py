"""`python launch/plan.py --recipe R --gpus N --gpu-memory 12GB`: what training holds, sends and has room for.

Nothing is trained, and no GPU is needed: see training/footprint.py and training/memoryplan.py.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fcn_dist.config import Recipe
from fcn_dist.console import console, status_console
from fcn_dist.errors import UserError
from fcn_dist.model.fcn import EARLY_STAGES, FCN
from fcn_dist.ranks import cut_anew
from fcn_dist.recipefile import load_recipe
from fcn_dist.sizes import parse_size, show_size
from fcn_dist.training import scaling
from fcn_dist.training.deepspeed_config import BUCKET
from fcn_dist.training.footprint import Footprint, footprint, without_content
from fcn_dist.training.memoryplan import DTYPES, Held, Partition, Weights, held, largest_micro_batch, sent
from fcn_dist.training.scaling import Links, Work, step

STAGES = (0, 1, 2, 3)
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # fp16 has the sizes of bf16
ACCUMULATED = 4  # micro-batches, in the table of what more GPUs bring
WIDTH = 120  # characters of a table that does not go to a terminal


class Row(NamedTuple):
    """One setting, and what comes of it."""

    partition: Partition
    recompute_stages: int
    held: Held  # at the micro-batch that is asked about
    largest: int  # micro-batch
    accumulated: int  # the largest where several are accumulated


def main(argv: list[str]) -> None:
    """Parse, reckon and print."""
    options = build_parser().parse_args(argv)
    for name in ("gpus", "classes", "micro_batch", "gpus_per_host", "images_per_second"):
        if getattr(options, name) is not None and not 1 <= getattr(options, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; 1 or more is needed")
    memory = parse_size(options.gpu_memory) - parse_size(options.reserve)
    if memory <= 0:
        raise UserError(
            f"--gpu-memory {options.gpu_memory} leaves nothing after --reserve {options.reserve}; give more memory, or "
            "reserve less"
        )
    recipe = load_recipe(options.recipe, options.overrides)
    images = options.micro_batch or max(1, -(-(recipe.train.global_batch or options.gpus) // options.gpus))
    outputs = options.classes + recipe.data.score_other
    model = without_content(recipe.model, outputs, recipe.train.auxiliary > 0)
    links = Links(parse_size(options.link), parse_size(options.network), options.gpus_per_host)
    weights = Weights.of(model)
    rows = plan(recipe, outputs, weights, options.gpus, memory, images)
    report(recipe, model, rows, options.gpus, memory, images)
    if options.images_per_second:
        work = Work(1 / options.images_per_second)
        partition = Partition(1, "bfloat16", options.gpus, BUCKET)
        report_scaling(weights, partition, links, work, images, recipe.train.global_batch)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, help="YAML, or a name of launch/recipes: camvid")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="of the whole job")
    parser.add_argument("--gpu-memory", required=True, metavar="SIZE", help="of each, such as 12GB or 80GiB")
    parser.add_argument(
        "--reserve", default="1GB", metavar="SIZE", help="of it, for CUDA and its libraries (default: %(default)s)"
    )
    parser.add_argument("--classes", type=int, default=150, metavar="N", help="default: %(default)s")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="images; default: the global batch over the GPUs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a recipe value"
    )
    speed = parser.add_argument_group("what more GPUs bring, on paper")
    speed.add_argument("--images-per-second", type=float, metavar="R", help="of one GPU, as training shows it")
    speed.add_argument(
        "--link", default="50GB", metavar="SIZE", help="a second, that a GPU sends to another of its host"
    )
    speed.add_argument("--network", default="10GB", metavar="SIZE", help="a second, that a host sends (%(default)s)")
    speed.add_argument("--gpus-per-host", type=int, default=8, metavar="N", help="default: %(default)s")
    return parser


def plan(recipe: Recipe, outputs: int, weights: Weights, gpus: int, memory: float, images: int) -> list[Row]:
    """Every setting that can be trained."""
    recomputed = sorted({0, EARLY_STAGES, recipe.train.recompute_stages})
    settings = [(precision, stages) for precision in PRECISIONS for stages in recomputed]
    footprints: dict[tuple[str, int], Footprint] = {}
    with Progress(console=status_console, transient=True, disable=not status_console.is_terminal) as progress:
        for precision, stages in progress.track(settings, description="rehearsing steps"):
            footprints[precision, stages] = footprint(recipe, outputs, DTYPES[precision], stages)
    rows = []
    for stage in STAGES:
        for precision, stages in settings:
            partition = Partition(stage, precision, gpus, BUCKET, averages=recipe.train.ema is not None)
            steps = footprints[precision, stages]
            largest, accumulated = (
                largest_micro_batch(weights, one, steps, memory)
                for one in (partition, replace(partition, accumulates=True))
            )
            rows.append(Row(partition, stages, held(weights, partition, steps.step(images)), largest, accumulated))
    return rows


def report(recipe: Recipe, model: FCN, rows: list[Row], gpus: int, memory: float, images: int) -> None:
    """Print the table, and what follows from it."""
    weights, config, (height, width) = Weights.of(model), recipe.model, recipe.data.crop
    console.print(
        f"{config.variant} on {config.backbone}, {weights.all / 1e6:.1f} M parameters, {model.num_outputs} outputs, "
        f"crops of {height}x{width}; {in_words(gpus)} with {show_size(round(memory))} each for training\n"
    )
    table = Table("ZeRO", "precision", "recomputed", box=None, header_style="dim", padding=(0, 1, 0, 0))
    sizes = ("weights", "gradients", "optimizer", "buffers", f"activations\nof {images}", "in all", "sent")
    for name in (*sizes, "largest\nmicro-batch"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        kinds = (row.held.parameters, row.held.gradients, row.held.optimizer, row.held.buffers, row.held.activations)
        cells = [show_size(round(size)) for size in (*kinds, row.held.most, sent(weights, row.partition))]
        stages = f"stages 1-{row.recompute_stages}" if row.recompute_stages else "-"
        table.add_row(
            str(row.partition.stage), PRECISIONS[row.partition.precision], stages, *cells, str(row.largest or "none")
        )
    # A file is as wide as it needs to be.
    Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False).print(table)
    console.print("\nBytes on each GPU; sent: by each GPU in a step without accumulation.\n")
    for line in advice(recipe, rows, gpus):
        console.print(line)


def report_scaling(
    weights: Weights, partition: Partition, links: Links, work: Work, images: int, global_batch: int | None
) -> None:
    """Print how images a second grow with the number of GPUs."""
    console.print("\nOn paper, with ZeRO-1 in bf16, nothing overlapped:\n")
    table = Table("GPUs", box=None, header_style="dim", padding=(0, 1, 0, 0))
    for name in ("images/s", "computing", f"images/s, {ACCUMULATED} accumulated", "computing"):
        table.add_column(name, justify="right")
    for gpus in sorted({*(2**power for power in range(7)), partition.world_size}):
        cells = [str(gpus)]
        for micro_batches in (1, ACCUMULATED):
            one = step(weights, replace(partition, world_size=gpus), links, work, images, micro_batches)
            cells += [f"{one.images_per_second:,.0f}", f"{one.efficiency:.0%}"]
        table.add_row(*cells)
    console.print(table)
    console.print()
    for line in scaling.advice(weights, partition, links, work, images, global_batch):
        console.print(line)


def advice(recipe: Recipe, rows: list[Row], gpus: int) -> list[str]:
    """What a person would say who looks at the table."""
    plain, best = (
        max(some, key=lambda row: (row.largest, -row.partition.stage, -row.recompute_stages))
        for some in ([row for row in rows if not row.recompute_stages], rows)
    )
    if not best.largest:
        return ["Not one image fits. Take a smaller crop, a narrower network (model.width), or GPUs with more memory."]
    lines = [f"Micro-batches of {plain.largest} fit at most without recomputation ({setting(plain)})."]
    if best.largest > plain.largest:
        lines[0] = (
            f"Micro-batches of {plain.largest} fit at most without recomputation ({setting(plain)}), and of "
            f"{best.largest} with it ({setting(best)}); it costs arithmetic in backward, so take it for the larger "
            "batch, not for speed."
        )
    lines.append(zero_saves(rows, gpus))
    if total := recipe.train.global_batch:
        if total < gpus:
            return [*lines, f"The recipe's global batch of {total} has less than one image for each of {gpus} GPUs."]
        cut = [row for row in (plain, best) if row.accumulated or row.largest * gpus >= total]
        cuts = [f"{cut_in_words(total, row, gpus)}, {setting(row)}" for row in cut]
        if plain.largest * gpus >= total or best is plain:
            del cuts[1:]
        if cuts:
            lines.append(f"The recipe's global batch of {total}: {'; or '.join(cuts)}.")
    return lines


def cut_in_words(total: int, row: Row, gpus: int) -> str:
    """How a global batch is cut."""
    largest = row.largest if row.largest * gpus >= total else row.accumulated
    cut = cut_anew(total, min(largest, total), gpus)
    return f"{in_words(gpus)} x micro-batch {cut.micro_batch} x accumulation {cut.accumulation}"


def zero_saves(rows: list[Row], gpus: int) -> str:
    """How much memory partitioning can save at all, in the precision of the last row of stage 0."""
    unpartitioned = [row for row in rows if row.partition.stage == 0][-1]
    whole = unpartitioned.held.optimizer
    if gpus == 1:
        return "On one GPU, ZeRO partitions nothing: stage 0 or 1 does."
    saved = whole - whole / gpus
    activations = show_size(round(unpartitioned.held.activations))
    return (
        f"ZeRO-1 saves {show_size(round(saved))} of {show_size(round(whole))} of optimizer state on each GPU, and no "
        f"number of GPUs more than {show_size(round(whole))}; stages 2 and 3 add little, since the network has "
        f"{show_size(round(unpartitioned.held.parameters))} of weights, and the micro-batch takes {activations}."
    )


def in_words(gpus: int) -> str:
    """How many there are."""
    return f"{gpus} GPU{'s' if gpus > 1 else ''}"


def setting(row: Row) -> str:
    """In words."""
    recomputed = f", stages 1-{row.recompute_stages} recomputed" if row.recompute_stages else ""
    return f"ZeRO-{row.partition.stage}, {PRECISIONS[row.partition.precision]}{recomputed}"
