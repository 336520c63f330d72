"""What the skips, pretrained weights and the batch are worth on CamVid: one change at a time, as many images each.

    python benchmarks/ablation.py CAMVID --weights vgg16_conv_caffe.safetensors --output reports

CAMVID is a folder of scenes, packed at a reduced size, or of shards. Every row is trained on the same samples in the
same order, `--images` of them, and so in fewer steps where the batch is larger; the learning rate goes with the square
root of the batch. Prints a table, and writes it as Markdown with every figure as JSON.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from entry import run_benchmark
from measure import Measured
from tables import DOES, Table, one_line, write_report
from training_run import RECIPES, Training, check_weights, device, end, measured, options, shards_of

from fcn_dist.errors import UserError

SHORT_SIDE = 120  # pixels of the images that are packed
CROP = "[96,128]"
BATCH, RATE = 16, 3e-4  # of all rows that say nothing else
COMMON = (
    f"data.crop={CROP}",
    "data.scale=[0.8,1.25]",
    "model.head_width=256",
    "model.dropout=0.1",
    "schedule.head_multiplier=5",
    "schedule.warmup_steps=0",
    "log.every=1",
)


def main(argv: list[str]) -> None:
    """Train and report."""
    parser = options(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=1280, metavar="N", help="that each row is trained on (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--only", action="append", default=[], metavar="TEXT", help="rows whose name contains it; may be repeated")
    args = parser.parse_args(argv)
    check_weights(args.weights)
    rows = trainings(args)
    with tempfile.TemporaryDirectory() as scratch:
        found = measured(rows, shards_of(args.camvid, Path(scratch), SHORT_SIDE), Path(scratch))
    name, kind = device()
    facts = {
        "device": name,
        "images": f"{args.images} in each row, crops of {CROP}",
        "learning rate": f"{RATE:g} at batch {BATCH}, as the square root of the batch; falls to 0",
    }
    write_report(args.output, f"ablation-{kind}", facts, [table(found)], found)
    end(rows, found)


def trainings(args: argparse.Namespace) -> list[Training]:
    """The rows; what is not pretrained trains all of its stages, what is the last two and the head.

    Raises UserError if one of them cannot be trained on just so many images.
    """
    weights = (f"model.weights={args.weights.resolve()}", "model.frozen_stages=3")
    at_once, plain = ("model.variant=fcn8s", "model.at_once=true"), ("model.at_once=false",)
    rows = [
        ("FCN-32s", BATCH, ("model.variant=fcn32s", *plain, *weights), "no skip"),
        ("FCN-16s", BATCH, ("model.variant=fcn16s", *plain, *weights), "pool4"),
        ("FCN-8s", BATCH, ("model.variant=fcn8s", *plain, *weights), "pool4 and pool3, unscaled"),
        ("FCN-8s at once", BATCH, (*at_once, *weights), "pool4 x 0.01, pool3 x 0.0001"),
        ("FCN-8s at once, batch 2", 2, (*at_once, *weights), ""),
        ("FCN-8s at once, batch 64", 64, (*at_once, *weights), ""),
        (
            "FCN-8s, not pretrained",
            BATCH,
            ("model.variant=fcn8s", *plain, "model.frozen_stages=0"),
            "all stages trained",
        ),
    ]
    found = []
    for name, batch, settings, does in rows:
        if args.only and not any(text in name for text in args.only):
            continue
        if args.images < batch or args.images % batch:
            raise UserError(
                f"--images is {args.images}, and {name!r} trains {batch} a step; rows of as many images need a "
                f"multiple of {batch}; give one, or leave rows out with --only"
            )
        cut = (
            f"train.global_batch={batch}",
            f"schedule.steps={args.images // batch}",
            f"schedule.learning_rate={RATE * (batch / BATCH) ** 0.5:g}",
            f"train.seed={args.seed}",
        )
        found.append(Training(name, RECIPES / "camvid_cpu.yaml", (*COMMON, *settings, *cut, *args.settings), does))
    return found


def table(found: list[Measured]) -> Table:
    """A row a training."""
    columns = ("", "steps", "mean IoU %", "pixel accuracy %", "last loss", "seconds", "images/s", "peak GB", DOES)
    rows: list[tuple[str, ...]] = []
    for one in found:
        name = one.contender.name
        if one.problem:
            rows.append((name, *("",) * (len(columns) - 2), one_line(one.problem)))
            continue
        (run,) = one.rounds
        cells = [f"{run['steps']}", f"{run['mean IoU']:.2f}", f"{run['pixel accuracy']:.2f}"]
        cells += [f"{run['losses'][-1][1]:.3f}", f"{run['seconds']:.0f}", f"{run['images/s']:.1f}"]
        rows.append((name, *cells, f"{run['peak GB']:.2f}", one.contender.does))
    return Table("one change at a time, scores on the validation split", columns, tuple(rows))


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
