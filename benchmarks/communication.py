"""Which ZeRO stage, bucket and overlap train fastest on several ranks, and whether the model on paper tells the time.

    python benchmarks/communication.py --output reports

On the GPUs if there are two or more, else with two ranks on the CPU, which talk through gloo. Every setting is trained
by ranks together, and by as many ranks at the same time of which each is alone: those say what a rank computes, on a
machine as busy. The model (fcn_dist/training/scaling.py) adds what is sent, at the rate of one reduction measured by
the same ranks. Prints tables, and writes them as Markdown and JSON. See benchmarks/README.md.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from entry import run_benchmark
from launched import launch
from measure import Contender, Measured
from tables import Table, Target, targets_table, write_report

from fcn_dist.config import ModelConfig
from fcn_dist.model.devices import multiplies
from fcn_dist.sizes import show_size
from fcn_dist.training.deepspeed_config import DEFAULT
from fcn_dist.training.footprint import without_content
from fcn_dist.training.memoryplan import Partition, Weights, sent
from fcn_dist.training.scaling import Links, Work, step

WITHIN = 0.25  # of the measured step, at the median of all settings
BUCKETS = (5_000_000, 50_000_000, 500_000_000)
SCRIPT = Path(__file__).with_name("communication_rank.py")


@dataclass
class Setting:
    """A row, and what its rounds gave."""

    stage: int
    bucket: int = BUCKETS[1]
    overlap: bool = False
    together: list[dict[str, float]] = field(default_factory=list)
    alone: list[dict[str, float]] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """In words."""
        return f"ZeRO-{self.stage}, buckets of {self.bucket // 1_000_000} M{', overlapped' if self.overlap else ''}"

    @property
    def zero(self) -> dict[str, Any]:
        """The DeepSpeed configuration's section of that name."""
        zero = {"stage": self.stage, "reduce_bucket_size": self.bucket, "allgather_bucket_size": self.bucket}
        return {**zero, "overlap_comm": self.overlap}

    def config(self, precision: str) -> dict[str, Any]:
        """The DeepSpeed configuration."""
        return {**DEFAULT, "bf16": {"enabled": precision == "bfloat16"}, "zero_optimization": self.zero}

    def typical(self, which: str, part: str) -> float:
        """Seconds."""
        rounds: list[dict[str, float]] = getattr(self, which)
        return median(one[part] for one in rounds)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return median(one["work"] + one["update"] for one in self.together)


SETTINGS = (
    *(Setting(stage) for stage in range(4)),
    *(Setting(1, bucket) for bucket in (BUCKETS[0], BUCKETS[2])),
    *(Setting(stage, overlap=True) for stage in (1, 2)),
)


def main(argv: list[str]) -> None:
    """Measure, and report."""
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=gpus if gpus > 1 else 2, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images a rank (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96, metavar="PIXELS", help="of the sides (default: %(default)s)")
    parser.add_argument("--outputs", type=int, default=151, metavar="N", help="classes (default: %(default)s)")
    parser.add_argument("--width", type=float, default=1.0, help="of the network (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        default="bfloat16" if multiplies(torch.device("cuda" if gpus else "cpu"), torch.bfloat16) else "float32",
        help="default here: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="a round (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR")
    options = parser.parse_args(argv)
    if gpus <= 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.ranks))
    for _ in range(options.rounds):
        measure_once(options)
    weights = Weights.of(without_content(ModelConfig(width=options.width), options.outputs))
    rows, ratios = [], []
    fastest = min(setting.seconds for setting in SETTINGS)
    for setting in SETTINGS:
        partition, said = on_paper(setting, weights, options)
        ratios.append(said / setting.seconds)
        alone = setting.typical("alone", "work") + setting.typical("alone", "update")
        figures = (setting.seconds, *(setting.typical("together", part) for part in ("work", "update")), alone, said)
        cells = [f"{1000 * seconds:,.0f}" for seconds in figures]
        more = (show_size(round(sent(weights, partition))), f"{ratios[-1]:.2f}", f"{setting.seconds / fastest:.2f}")
        rows.append((setting.name, *cells, *more))
    columns = (
        "",
        "step ms",
        "forward, backward",
        "update",
        "a rank alone",
        "on paper",
        "sent",
        "ratio",
        "x the fastest",
    )
    table = Table("a step, ranks together", columns, tuple(rows))
    off = median(abs(1 - ratio) for ratio in ratios)
    targets = targets_table([Target("on paper differs from measured by, at the median", WITHIN, off, at_most=True)])
    facts = {
        "device": f"{gpus} x {torch.cuda.get_device_name()}" if gpus > 1 else "CPU, gloo",
        "ranks": str(options.ranks),
        "network": f"FCN-8s on VGG16, {options.outputs} outputs, width {options.width:g}, {options.precision}, "
        f"{options.batch} images of {options.size}x{options.size} a rank",
        "a reduction sends": f"{show_size(round(median(SETTINGS[0].bandwidth)))}/s from each rank",
        "rounds": f"{options.rounds} of {options.steps} steps",
    }
    found = [Measured(Contender(one.name, "communication_rank:main", {}), one.together) for one in SETTINGS]
    write_report(options.output, f"communication-{'cuda' if gpus > 1 else 'cpu'}", facts, [table, targets], found)


def measure_once(options: argparse.Namespace) -> None:
    """A round of all settings: ranks together, then as many that are alone."""
    values = {name: getattr(options, name) for name in ("batch", "size", "outputs", "width", "steps", "precision")}
    settings = json.dumps({**values, "configs": [setting.config(options.precision) for setting in SETTINGS]})
    together, *alone = run(settings, [options.ranks]) + run(settings, [1] * options.ranks)
    for number, setting in enumerate(SETTINGS):
        setting.together.append(together["steps"][number])
        setting.bandwidth.append(together["bandwidth"])
        setting.alone += [one["steps"][number] for one in alone]


def run(settings: str, jobs: list[int]) -> list[dict[str, Any]]:
    """Jobs of so many ranks each, at the same time; what the first rank of each wrote."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(jobs)) as pool:
        homes = [Path(folder) / str(number) for number in range(len(jobs))]
        for home in homes:
            home.mkdir()
        commands = [[str(SCRIPT), settings, str(home / "found.json")] for home in homes]
        for problem in pool.map(launch, commands, jobs, homes):
            if problem:
                raise RuntimeError(problem)
        return [json.loads((home / "found.json").read_text()) for home in homes]


def on_paper(setting: Setting, weights: Weights, options: argparse.Namespace) -> tuple[Partition, float]:
    """Seconds of a step, by the model."""
    partition = Partition.of(setting.zero, options.precision, options.ranks)
    link = median(setting.bandwidth)
    work = Work(setting.typical("alone", "work") / options.batch, setting.typical("alone", "update"))
    return partition, step(weights, partition, Links(link, link, options.ranks), work, options.batch).seconds


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
