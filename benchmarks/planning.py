"""What `launch/plan.py` says a step holds, beside what torch's allocator held.

    python benchmarks/planning.py --output reports

On the GPU if there is one, with one rank; else on the CPU with one and two. Prints a table, and writes it as Markdown
and JSON. See benchmarks/README.md.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from entry import run_benchmark
from launched import ROOT, launch
from measure import Contender, Measured
from tables import Table, Target, one_line, targets_table, write_report

from fcn_dist.model.columns import takes_columns
from fcn_dist.recipefile import load_recipe
from fcn_dist.sizes import show_size
from fcn_dist.training.deepspeed_config import read_deepspeed_config, resolve
from fcn_dist.training.footprint import footprint, without_content
from fcn_dist.training.memoryplan import DTYPES, Partition, Weights, held

WITHIN = 0.1  # of what is measured
LIMIT = 300.0  # seconds of a row


class Setting(NamedTuple):
    """A row."""

    ranks: int
    stage: int
    precision: str
    recompute_stages: int = 0
    micro_batch: int = 8

    @property
    def name(self) -> str:
        """Of the row."""
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        return f"ZeRO-{self.stage}, {self.precision}, {ranks}, {self.micro_batch} images"

    @property
    def config(self) -> Path:
        """The DeepSpeed configuration."""
        return ROOT / "launch" / "zero" / f"zero{self.stage}_{self.precision}.json"


ON_CPU = (
    Setting(1, 0, "bf16"),
    Setting(1, 1, "bf16"),
    Setting(1, 1, "bf16", recompute_stages=2, micro_batch=24),
    Setting(1, 1, "bf16", recompute_stages=3, micro_batch=24),
    Setting(1, 1, "fp32"),
    Setting(2, 0, "bf16"),
    Setting(2, 1, "bf16"),
    Setting(2, 2, "fp32"),
    Setting(2, 3, "bf16"),
    Setting(2, 3, "bf16", recompute_stages=3),
)
ON_GPU = (
    Setting(1, 0, "bf16", micro_batch=64),
    Setting(1, 1, "bf16", micro_batch=64),
    Setting(1, 1, "bf16", recompute_stages=3, micro_batch=64),
    Setting(1, 1, "fp16", micro_batch=64),  # which DeepSpeed does not train on a CPU
    Setting(1, 1, "fp32", micro_batch=32),
)


def main(argv: list[str]) -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=151, metavar="N", help="classes (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="of the sides (default: %(default)s)")
    parser.add_argument("--width", type=float, default=1.0, help="of the network (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains it, such as fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="S", help="after which rows are left out")
    parser.add_argument("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR")
    options = parser.parse_args(argv)
    settings = [one for one in (ON_GPU if options.device == "cuda" else ON_CPU) if options.only in one.name]
    ends = time.monotonic() + options.time_limit
    found = [beside(setting, options, ends - time.monotonic()) for setting in settings]
    rows = []
    for setting, one in zip(settings, found, strict=True):
        recomputed = f"stages 1-{setting.recompute_stages}" if setting.recompute_stages else "-"
        cells = ("", "", one_line(one.problem))
        if one.rounds:
            said, held_ = (one.rounds[0][name] for name in ("planned", "measured"))
            cells = (show_size(said), show_size(held_), f"{said / held_:.3f}")
        rows.append((one.contender.name, recomputed, *cells))
    table = Table("bytes a rank holds at most", ("", "recomputed", "planned", "measured", "ratio"), tuple(rows))
    ratios = [round_["planned"] / round_["measured"] for one in found for round_ in one.rounds]
    worst = max((abs(1 - ratio) for ratio in ratios), default=None)
    targets = targets_table([Target("planned differs from measured by", WITHIN, worst, at_most=True)])
    facts = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "network": f"FCN-8s on VGG16, {options.outputs} outputs, width {options.width:g}, "
        f"{options.size}x{options.size}",
    }
    write_report(options.output, f"planning-{options.device}", facts, [table, targets], found)


def beside(setting: Setting, options: argparse.Namespace, limit: float) -> Measured:
    """What is planned and what is measured, for one row."""
    one = Measured(Contender(setting.name, "planning_rank:main", {}, "launch/plan.py"))
    values = [f"data.crop=[{options.size},{options.size}]", f"model.width={options.width}"]
    values += [f"train.recompute_stages={setting.recompute_stages}"]
    values += [f"train.global_batch={setting.micro_batch * setting.ranks}"]
    if limit <= 0:
        one.problem = "no time was left"
        return one
    try:
        most = measured(setting, values, options.outputs, min(limit, LIMIT))
    except RuntimeError as error:
        one.problem = str(error)
        return one
    one.rounds.append({"planned": round(predicted(setting, values, options.outputs, options.device)), "measured": most})
    return one


def predicted(setting: Setting, values: Sequence[str], outputs: int, device: str) -> float:
    """Bytes, by the planner."""
    recipe = load_recipe(None, [*values, "schedule.steps=1", "schedule.learning_rate=1e-4"])
    config = resolve(read_deepspeed_config(setting.config), recipe, setting.ranks)
    partition = Partition.of(config.values["zero_optimization"], config.precision, setting.ranks)
    steps = footprint(recipe, outputs, DTYPES[config.precision], setting.recompute_stages)
    by_columns = takes_columns(device, DTYPES[config.precision])
    weights = Weights.of(without_content(recipe.model, outputs), by_columns)
    return held(weights, partition, steps.step(setting.micro_batch)).most


def measured(setting: Setting, values: Sequence[str], outputs: int, limit: float) -> int:
    """Bytes, of the rank that holds most. Raises RuntimeError if the ranks fail, or do not end within `limit` s."""
    script = Path(__file__).with_name("planning_rank.py")
    settings = json.dumps({"config": str(setting.config), "recipe": list(values), "outputs": outputs})
    with tempfile.TemporaryDirectory() as folder:
        if problem := launch([str(script), settings, folder], setting.ranks, Path(folder), limit):
            raise RuntimeError(problem)
        return max(int(path.read_text()) for path in Path(folder).glob("*.json"))


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
