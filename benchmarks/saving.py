"""How long a checkpoint keeps training waiting, and when it is on disk: ours beside DeepSpeed's own saving.

    python benchmarks/saving.py --rounds 5 --output reports [--scratch DISK]

The network is FCN-8s on VGG16 at full width with 151 outputs, under ZeRO-1 in bf16 with Adam, on one rank and the
device there is. Prints a table, and writes it as Markdown and JSON. See benchmarks/README.md.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from entry import run_benchmark
from measure import Contender, Measured, run_rounds
from tables import Table, write_report

from fcn_dist.config import ModelConfig
from fcn_dist.model.fcn import parameter_count
from fcn_dist.training.footprint import without_content

OUTPUTS = 151

CONTENDERS = (
    ("DeepSpeed save_checkpoint", "deepspeed", "no hash, no flush, no commit"),
    ("ours, at once", "blocking", "SHA-256, flushed, committed"),
    ("ours, in the background", "background", "the same, while training goes on"),
)


@dataclass(frozen=True)
class Trained:
    """An engine after two steps, and how to take another."""

    engine: Any
    step: Callable[[], None]


def trained(width: float) -> Trained:
    """A network whose optimizer has its state; at width 1 it has its full size."""
    import torch

    from fcn_dist.config import Recipe, ScheduleConfig, TrainConfig
    from fcn_dist.model.fcn import FCN
    from fcn_dist.training.collective import start_ranks
    from fcn_dist.training.deepspeed_config import DEFAULT, resolve
    from fcn_dist.training.engine import build_engine
    from fcn_dist.training.schedule import parameter_groups

    schedule = ScheduleConfig(steps=1, learning_rate=1e-4)
    model = FCN(OUTPUTS, ModelConfig(width=width))
    start_ranks()
    config = resolve(DEFAULT, Recipe(schedule=schedule, train=TrainConfig(global_batch=1)), 1)
    engine = build_engine(model, config, parameter_groups(model, schedule))
    image = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8).to(engine.device)

    def step() -> None:
        engine.backward(engine(image, coarse=True).float().square().mean())
        engine.step()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()

    step()
    step()
    return Trained(engine, step)


def deepspeed(out: str, width: float) -> dict[str, Any]:
    """DeepSpeed's own saving, by the checkpoint engine it comes with."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    one = trained(width)
    # As its configuration would make it: the present form of torch's files.
    one.engine.checkpoint_engine = TorchCheckpointEngine()
    one.engine.checkpoint_engine.zipfile_serialization = True
    began = perf_counter()
    one.engine.save_checkpoint(out, tag="one", save_latest=True)
    stalled = perf_counter() - began
    return {"stalled": stalled, "durable": None, "bytes": _bytes(Path(out))}


def blocking(out: str, width: float) -> dict[str, Any]:
    """Ours, with training waiting until the checkpoint is on disk."""
    return _ours(out, width, in_background=False)


def background(out: str, width: float) -> dict[str, Any]:
    """Ours, with steps taken meanwhile."""
    return _ours(out, width, in_background=True)


def _ours(out: str, width: float, in_background: bool) -> dict[str, Any]:
    from fcn_dist.checkpoints.commit import commit, prepare
    from fcn_dist.checkpoints.store import CheckpointState
    from fcn_dist.training.average import WeightAverage
    from fcn_dist.training.state import take_state
    from fcn_dist.training.writing import Writing

    one = trained(width)
    took = [_timed(one.step) for _ in range(3)]
    began = perf_counter()
    folder = prepare(Path(out), 1)
    writing = Writing(
        take_state(one.engine, WeightAverage(one.engine, None), folder, is_first_rank=True), in_background
    )
    stalled = perf_counter() - began
    meanwhile = []
    while not writing.over:
        meanwhile.append(_timed(one.step))
    writing.wait()
    committing = perf_counter()
    files = {path.relative_to(folder).as_posix(): file for path, file in writing.files.items()}
    state = CheckpointState(1, 1, 1, 1, "bfloat16", {}, {}, {}, "", None)
    commit(folder, state, files)
    stalled += perf_counter() - committing
    return {
        "stalled": stalled,
        "durable": perf_counter() - began,
        "bytes": _bytes(Path(out)),
        "step": median(took),
        "step_meanwhile": median(meanwhile) if meanwhile else None,
    }


def _timed(action: Callable[[], None]) -> float:
    began = perf_counter()
    action()
    return perf_counter() - began


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(measured: list[Measured], parameters: int) -> Table:
    """Medians over the rounds."""
    rows: list[tuple[str, ...]] = []
    for one in measured:
        if one.problem:
            rows.append((one.contender.name, "", "", "", "", "", one.problem))
            continue
        cells = [one.contender.name]
        for name in ("stalled", "durable", "step", "step_meanwhile"):
            values = [round_[name] for round_ in one.rounds if round_.get(name) is not None]
            cells.append(f"{median(values):.2f}" if values else "-")
        rows.append((*cells, f"{median(one.figures('bytes')) / 1e9:.2f}", one.contender.does))
    columns = ("checkpoint", "training waits, s", "on disk after, s", "a step, s", "a step meanwhile, s", "GB")
    return Table(f"a checkpoint of {parameters / 1e6:.0f} million parameters", (*columns, "what it does"), tuple(rows))


def main(argv: list[str]) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="the disk to write to (default: the temporary one)")
    parser.add_argument(
        "--time-limit", type=float, default=math.inf, metavar="S", help="after which rounds are left out"
    )
    parser.add_argument("--width", type=float, default=1.0, help="factor of the network's channels")
    options = parser.parse_args(argv)
    contenders = [
        Contender(name, f"saving:{function}", {"width": options.width}, does, writes=True)
        for name, function, does in CONTENDERS
    ]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        measured = run_rounds(contenders, options.rounds, Path(scratch), options.time_limit)
    parameters = parameter_count(without_content(ModelConfig(width=options.width), OUTPUTS))
    write_report(options.output, "saving", {}, [table(measured, parameters)], measured)


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
