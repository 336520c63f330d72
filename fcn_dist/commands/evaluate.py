"""`deepspeed launch/evaluate.py (--run RUN [--step N] | --model FILE) --shards OUT`: exact scores on any ranks."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

from fcn_dist.checkpoints.consolidate import consolidate
from fcn_dist.checkpoints.store import DEEPSPEED_TAG, open_checkpoint
from fcn_dist.commands.ranks import among_ranks
from fcn_dist.console import console, status_console
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.transforms import decode
from fcn_dist.deploy.modelfile import read_model_file
from fcn_dist.deploy.pictures import Row, distinct, sheet, write_png
from fcn_dist.errors import UserError
from fcn_dist.files import write_text
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.devices import keep_freed_memory
from fcn_dist.model.fcn import FCN, torch_dtype
from fcn_dist.model.upsampling import argmax_upsampled
from fcn_dist.progress import count_progress
from fcn_dist.ranks import Rank, cores_of
from fcn_dist.scoring.evaluate import check_classes, evaluate, scores_other
from fcn_dist.scoring.metrics import Scores

SHEET_SCENES = 6


def main(argv: list[str]) -> None:
    """Parse, evaluate and report."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder; its newest whole checkpoint is scored")
    source.add_argument("--model", type=Path, help="model file written by launch/convert.py")
    parser.add_argument("--step", type=int, help="which checkpoint of --run")
    parser.add_argument("--shards", required=True, help="folder written by shards/create.py, or its URL")
    parser.add_argument("--split", default="validation")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the network's arithmetic (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="loader processes a rank")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write scores, classes and confusion matrix")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw image, truth and prediction of some scenes")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    options = parser.parse_args(argv)
    for path in filter(None, (options.json, options.sheet)):
        if not path.parent.is_dir():
            raise UserError(
                f"{path} cannot be written: there is no folder {path.parent}; make it, or give another path"
            )
    shard_set = ShardSet.open(options.shards, options.split)
    rank = Rank.from_environment()
    model, name = load(options, shard_set)
    shown = rank.index == 0
    with among_ranks():
        start_ranks(rank)
        model.to(torch_dtype(options.precision))
        if torch.cuda.is_available():
            model.to(torch.device("cuda", rank.local))
        with count_progress(shown) as progress:
            task = progress.add_task(options.split, total=len(shard_set))
            scores = evaluate(
                model,
                shard_set,
                rank=rank,
                workers=options.workers,
                # Rank 0 sees its own share alone; the others are as far, give or take a sample.
                advance=lambda samples: progress.advance(task, samples * rank.world_size),
            )
    if shown:
        report(scores, name)
        if options.json:
            write_text(options.json, json.dumps({"model": name, **scores.as_dict()}) + "\n")
        if options.sheet:
            draw_sheet(model, shard_set, options.sheet)
            console.print(f"sheet: {options.sheet}")


def load(options: argparse.Namespace, shard_set: ShardSet) -> tuple[FCN, str]:
    """The network to score, and how to call it."""
    if options.model:
        if options.step is not None:
            raise UserError("--step chooses a checkpoint of --run; a model file has one state; leave it out")
        model, info = read_model_file(options.model)
        check_classes(info.description.classes, shard_set)
        return model, str(options.model)
    checkpoint, passed_over = open_checkpoint(options.run, options.step)
    for damage in passed_over:
        status_console.print(f"passed over {damage.dir}: {damage.reason}")
    description = ModelDescription.from_dict(checkpoint.state.model)
    check_classes(description.classes, shard_set)
    model = description.build()
    model.load_state_dict(consolidate(checkpoint.dir / DEEPSPEED_TAG, model).state)
    return model, f"{options.run} step {checkpoint.state.step}"


def start_ranks(rank: Rank) -> None:
    """Join the other ranks, if a launcher started any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank.local)
    else:
        torch.set_num_threads(cores_of(rank))
        keep_freed_memory()
    if rank.world_size > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def draw_sheet(model: FCN, shard_set: ShardSet, path: Path) -> None:
    """Write a picture of image, truth and prediction for scenes spread evenly over the set."""
    table = np.frombuffer(shard_set.label_rule(scores_other(model, shard_set)).label_table, np.uint8)
    device = model.score_fr.weight.device
    rows = []
    model.eval()
    for index in np.linspace(0, len(shard_set) - 1, min(SHEET_SCENES, len(shard_set))).round().astype(int):
        sample = shard_set.read(int(index))
        image, truth = decode(sample)
        with torch.inference_mode():
            coarse = model(torch.from_numpy(image)[None].to(device), coarse=True)
            outputs = argmax_upsampled(coarse, (truth.shape[0], truth.shape[1]), model.stride, model.offset)
        rows.append(Row(image, truth, table[outputs[0].cpu().numpy()], sample.key))
    write_png(path, sheet(rows, shard_set.classes, distinct(shard_set.colours)))


def report(scores: Scores, name: str) -> None:
    """Headline figures and a table of classes, best first."""
    console.print(f"{name} on {scores.num_samples} {scores.split} samples")
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
