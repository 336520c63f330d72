"""Whether ZeRO stage, precision and ranks change what is learned: the loss of one training in every combination.

    python benchmarks/equivalence.py

Trains ZeRO 0-3 x fp32, bf16, fp16 x 1, 2, 4 ranks from the same seed on the same global batches, under the real
launcher, and writes the tables into docs/equivalence.md, whose text says what they show. On a machine with GPUs, each
rank has one of its own; ranks beyond their number are left out.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from entry import run_benchmark
from equivalence_page import Cell, Trained, update_page
from launched import launch
from tables import machine

from fcn_dist.console import status_console
from fcn_dist.data.packing.run import pack
from fcn_dist.data.synthetic import render
from fcn_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16", "fp16")
RANKS = (1, 2, 4)
GLOBAL_BATCH = 4
PACKAGES = ("torch", "deepspeed", "numpy")
SCENES = 10  # epochs then end inside global batches
# fp16's usual first scale, 65536, overflows here, and what overflows is no update: with 1024 every update counts.
FIRST_SCALE_POWER = 10
# Everything random is on: crops, resizing, mirroring, jitter and dropout. The rate is constant, so that more steps
# continue the same training.
RECIPE = f"""
data: {{crop: [48, 64], scale: [0.5, 1.5], flip: 0.5, jitter: 0.2, workers: 1}}
model: {{width: 0.0625, head_width: 24, dropout: 0.3}}
schedule: {{learning_rate: 0.002, kind: constant, warmup_steps: 2}}
train: {{global_batch: {GLOBAL_BATCH}, seed: 5}}
evaluate: {{at_end: false}}
log: {{every: 1}}
"""


def main(argv: list[str]) -> None:
    """Train every cell, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=8, metavar="N", help="updates before the loss is read (default: %(default)s)")
    add("--page", type=Path, default=ROOT / "docs" / "equivalence.md", help="default: docs/equivalence.md")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise UserError(f"--steps is {args.steps}; at least one update is needed")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else None
    left_out = tuple(ranks for ranks in RANKS if devices is not None and ranks > devices)
    cells = [Cell(s, p, r) for r in RANKS if r not in left_out for p in PRECISIONS for s in STAGES]
    by_wrapper = not _takes_fp16()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        render(scratch / "scenes", training=SCENES, validation=1, size=(64, 80), seed=3)
        pack(scratch / "scenes", scratch / "shards")
        (scratch / "recipe.yaml").write_text(RECIPE)
        trained = []
        for number, cell in enumerate(cells, start=1):
            trained.append(train(cell, args.steps, scratch, by_wrapper))
            status_console.print(f"{number} of {len(cells)}: {cell} {trained[-1].outcome}")
    facts = {"command": shlex.join(["python", "benchmarks/equivalence.py", *argv]), **machine(PACKAGES)}
    if devices:
        facts["devices"] = f"{devices} of {torch.cuda.get_device_name()}"
    update_page(args.page, trained, args.steps, facts, left_out, by_wrapper)
    status_console.print(f"written: {args.page}")
    if failed := [str(one.cell) for one in trained if one.problem]:
        raise UserError(f"{len(failed)} trainings failed: {', '.join(failed)}; the page says why")


def train(cell: Cell, steps: int, scratch: Path, by_wrapper: bool) -> Trained:
    """Train `steps` updates and one batch more, whose loss is that of the weights after them."""
    script = (
        ROOT / "tests" / "fp16_anywhere.py" if cell.precision == "fp16" and by_wrapper else ROOT / "launch/train.py"
    )
    run = scratch / f"zero{cell.stage}-{cell.precision}-{cell.ranks}"
    config = json.loads((ROOT / "launch" / "zero" / f"zero{cell.stage}_{cell.precision}.json").read_text())
    if cell.precision == "fp16":
        config["fp16"]["initial_scale_power"] = FIRST_SCALE_POWER
    config_path = run.with_suffix(".json")
    config_path.write_text(json.dumps(config))
    arguments = [
        *("--shards", str(scratch / "shards"), "--output", str(run), "--recipe", str(scratch / "recipe.yaml")),
        *("--deepspeed_config", str(config_path), "--steps", str(steps + 1)),
    ]
    if problem := launch([str(script), *arguments], cell.ranks, scratch):
        return Trained(cell, problem=problem)
    journal = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in journal if line["event"] == "train"]
    return Trained(cell, tuple(line["loss"] for line in lines), lines[-1]["skipped_steps"])


def _takes_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 on this machine as it is."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
