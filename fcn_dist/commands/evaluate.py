"""`deepspeed launch/evaluate.py (--run RUN [--step N] | --model FILE) --shards OUT`: exact scores on any ranks."""

import argparse
import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

from fcn_dist.addresses import is_url, shown_url
from fcn_dist.checkpoints.consolidate import WEIGHTS
from fcn_dist.checkpoints.weights import open_run
from fcn_dist.commands.ranks import among_ranks
from fcn_dist.commands.views import add_views, views_of
from fcn_dist.console import console, status_console
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.transforms import decode
from fcn_dist.deploy.colours import distinct
from fcn_dist.deploy.confusion import draw_confusion
from fcn_dist.deploy.modelfile import read_model_file
from fcn_dist.deploy.modelurl import local_copy
from fcn_dist.deploy.pictures import Row, sheet, write_png
from fcn_dist.errors import UserError
from fcn_dist.files import check_place, write_text
from fcn_dist.model.devices import keep_freed_memory
from fcn_dist.model.fcn import FCN, torch_dtype
from fcn_dist.model.inference import for_inference
from fcn_dist.model.views import Views
from fcn_dist.progress import count_progress
from fcn_dist.ranks import Rank, cores_of
from fcn_dist.scoring.evaluate import best_outputs, check_classes, evaluate, scored, scores_other
from fcn_dist.scoring.metrics import Scores

SHEET_SCENES = 6
CONFUSION_FORMS = (".csv", ".png")


def main(argv: list[str]) -> None:
    """Parse, evaluate and report."""
    options = build_parser().parse_args(argv)
    views = _checked(options)
    shard_set = ShardSet.open(options.shards, options.split)
    rank = Rank.from_environment()
    model, name = load(options, shard_set)
    with among_ranks():
        scores = _evaluate(model, shard_set, rank, options, views)
    if rank.index == 0:
        report(scores, f"{name} in {options.precision}{looks(views)}")
        if options.json:
            ways = {"precision": options.precision, "views": asdict(views)}
            write_text(options.json, json.dumps({"model": name, **ways, **scores.as_dict()}) + "\n")
            console.print(f"scores: {options.json}")
        for path in options.confusion:
            write_confusion(path, scores)
            console.print(f"confusion: {path}")
        if options.sheet:
            draw_sheet(model, shard_set, options.sheet, views)
            console.print(f"sheet: {options.sheet}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder; its newest whole checkpoint is scored")
    source.add_argument(
        "--model", help="model file written by launch/convert.py, a folder with one, or its address with #sha256=..."
    )
    parser.add_argument("--step", type=int, help="which checkpoint of --run")
    parser.add_argument(
        "--weights", choices=WEIGHTS, help="which of --run (default: averaged where there are any, see train.ema)"
    )
    parser.add_argument("--shards", required=True, help="folder written by shards/create.py, or its URL")
    parser.add_argument("--split", default="validation")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the network's arithmetic (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="loader processes a rank")
    add_views(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="score the first N samples alone, and say so")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write scores, classes and confusion matrix")
    parser.add_argument(
        "--confusion",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write the confusion matrix, rows truth: pixels to .csv, a picture of shares to .png (repeatable)",
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw image, truth and prediction of some scenes")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


def looks(views: Views) -> str:
    """How images were looked at, if not once as they are."""
    parts = [f"scaled by {', '.join(f'{scale:g}' for scale in views.scales)}"] if views.scales != (1.0,) else []
    parts += ["mirrored"] if views.flip else []
    parts += [f"in windows of {views.window}"] if views.window else []
    return f" ({', '.join(parts)})" if parts else ""


def _checked(options: argparse.Namespace) -> Views:
    """How to look at images; raises UserError for what can be seen to be wrong before anything is read."""
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit is {options.limit}; 1 sample or more is needed")
    for path in options.confusion:
        if path.suffix not in CONFUSION_FORMS:
            raise UserError(
                f"--confusion {path} ends in {path.suffix or 'nothing'!r}; .csv (pixels) or .png (a picture of shares) "
                "is needed; rename it"
            )
    for path in filter(None, (options.json, *options.confusion, options.sheet)):
        check_place(path)
    return views_of(options)


def _evaluate(model: FCN, shard_set: ShardSet, rank: Rank, options: argparse.Namespace, views: Views) -> Scores:
    """With the other ranks."""
    start_ranks(rank)
    model.to(torch_dtype(options.precision))
    if torch.cuda.is_available():
        model.to(torch.device("cuda", rank.local))
    model = for_inference(model)
    with count_progress(rank.index == 0) as progress:
        task = progress.add_task(options.split, total=scored(shard_set, options.limit))
        return evaluate(
            model,
            shard_set,
            rank=rank,
            workers=options.workers,
            views=views,
            limit=options.limit,
            # Rank 0 sees its own share alone; the others are as far, give or take a sample.
            advance=lambda samples: progress.advance(task, samples * rank.world_size),
        )


def load(options: argparse.Namespace, shard_set: ShardSet) -> tuple[FCN, str]:
    """The network to score, and how to call it."""
    if options.model:
        for name in ("step", "weights"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} chooses from what --run has; a model file has one state; leave it out")
        model, info = read_model_file(local_copy(options.model))
        check_classes(info.description.classes, shard_set)
        return model, shown_url(options.model) if is_url(options.model) else options.model
    opened = open_run(options.run, options.step, options.weights)
    for damage in opened.passed_over:
        status_console.print(f"passed over {damage.dir}: {damage.reason}")
    check_classes(opened.description.classes, shard_set)
    model = opened.description.build()
    model.load_state_dict(opened.found.state)
    return model, f"{options.run} step {opened.checkpoint.state.step} ({opened.found.weights} weights)"


def start_ranks(rank: Rank) -> None:
    """Join the other ranks, if a launcher started any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank.local)
    else:
        torch.set_num_threads(cores_of(rank))
        keep_freed_memory()
    if rank.world_size > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def write_confusion(path: Path, scores: Scores) -> None:
    """In the form that the name's end says."""
    if path.suffix == ".csv":
        write_text(path, confusion_csv(scores))
    else:
        write_png(path, draw_confusion(scores.confusion, [row.name for row in scores.classes]))


def confusion_csv(scores: Scores) -> str:
    """A row a truth, a column a prediction, in pixels; label 0 is "other"."""
    out = io.StringIO()
    names = ["other", *(row.name for row in scores.classes)]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["truth", *names])
    for name, counts in zip(names, scores.confusion.tolist(), strict=True):
        writer.writerow([name, *counts])
    return out.getvalue()


def draw_sheet(model: FCN, shard_set: ShardSet, path: Path, views: Views) -> None:
    """Write a picture of image, truth and prediction for scenes spread evenly over the set."""
    table = np.frombuffer(shard_set.label_rule(scores_other(model, shard_set)).label_table, np.uint8)
    device = model.score_fr.weight.device
    rows = []
    model.eval()
    for index in np.linspace(0, len(shard_set) - 1, min(SHEET_SCENES, len(shard_set))).round().astype(int):
        sample = shard_set.read(int(index))
        image, truth = decode(sample)
        with torch.inference_mode():
            size = (truth.shape[0], truth.shape[1])
            outputs = best_outputs(model, model, torch.from_numpy(image)[None].to(device), size, views)
        rows.append(Row(image, truth, table[outputs.cpu().numpy()], sample.key))
    write_png(path, sheet(rows, shard_set.classes, distinct(shard_set.colours)))


def report(scores: Scores, name: str) -> None:
    """Headline figures and a table of classes, best first."""
    count = f"{scores.num_samples}"
    if scores.num_samples < scores.set_size:
        count = f"the first {scores.num_samples} of {scores.set_size}"
    console.print(f"{name} on {count} {scores.split} samples")
    official, paper = scores.official, scores.paper
    table = Table(title="scores, per cent")
    for column, justify in (("family", "left"), ("figure", "left"), ("value", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for family, figures in (("official", official), ("FCN paper", paper)):
        for figure, value in vars(figures).items():
            table.add_row(family, figure.replace("_", " "), f"{100 * value:.2f}")
    console.print(table)

    table = Table(title="classes by IoU, per cent")
    table.add_column("class")
    for column in ("IoU", "accuracy", "truth pixels", "predicted pixels"):
        table.add_column(column, justify="right")
    for row in sorted(scores.classes, key=lambda row: (row.iou is None, -(row.iou or 0))):
        iou, accuracy = ("-" if value is None else f"{100 * value:.2f}" for value in (row.iou, row.accuracy))
        table.add_row(row.name, iou, accuracy, f"{row.truth_pixels:,}", f"{row.predicted_pixels:,}")
    console.print(table)
