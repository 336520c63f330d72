"""A training step's time and memory beside pytorch-fcn's FCN-8s in plain PyTorch.

    python benchmarks/training.py --batch 2 --size 256 --rounds 3 --output reports

On the GPU if there is one, then with the largest batch in 12, 24 and 80 GB, too. Prints tables, and writes them as
Markdown with every figure as JSON. See benchmarks/README.md.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from entry import run_benchmark
from measure import Contender, Measured, run_rounds
from tables import DOES, Table, Target, fastest, median_rate, one_line, ratio, targets_table, write_report

from fcn_dist.errors import UserError
from fcn_dist.model.devices import peak_flops

GB = 10**9
OURS, PEER = "ours, ", "peer, "
OURS_BF16, PEER_FP32 = "ours, bf16", "peer, fp32"
RECOMPUTED = "ours, bf16, stages 1-3 recomputed"
TORCH_POOLING = "ours, bf16, torch's pooling"  # on a GPU alone
COMPILED = "ours, bf16, compiled"
LOOKED_AT = "ours, bf16, layers looked at"
AT_THE_SAME_BATCH = (TORCH_POOLING, COMPILED, LOOKED_AT)  # alone; on a CPU only if they are asked for
BUDGETS = (12, 24, 80)  # GB
SHARE_OF_STEPS = 0.45  # of a time limit; the largest batches have the rest
VARIANTS = (
    # name, function without its ending, options, what it does
    (OURS_BF16, "training_ours:train", {"precision": "bf16"}, "launch/train.py's step, zero1_bf16.json"),
    (PEER_FP32, "training_peer:train", {"precision": "fp32", "compiled": False}, "as its users run it"),
    (
        RECOMPUTED,
        "training_ours:train",
        {"precision": "bf16", "recompute_stages": 3},
        "likewise, train.recompute_stages=3; batches in 12 GB alone",
    ),
    (
        TORCH_POOLING,
        "training_ours:train",
        {"precision": "bf16", "torch_pooling": True},
        "ReLU and pooling in torch's operations, not in Triton's kernels",
    ),
    ("peer, autocast", "training_peer:train", {"precision": "autocast", "compiled": False}, "bf16 autocast"),
    (
        "peer, autocast, compiled",
        "training_peer:train",
        {"precision": "autocast", "compiled": True},
        "torch.compile of forward and loss",
    ),
    (
        COMPILED,
        "training_ours:train",
        {"precision": "bf16", "compiled": True},
        "launch/train.py's step, train.compile=true",
    ),
    (
        "peer, fp32, compiled",
        "training_peer:train",
        {"precision": "fp32", "compiled": True},
        "torch.compile of forward and loss",
    ),
    ("ours, fp32", "training_ours:train", {"precision": "fp32"}, "launch/train.py's step, zero1_fp32.json"),
    (
        LOOKED_AT,
        "training_ours:train",
        {"precision": "bf16", "looks": True},
        "log.layers=1: each layer's gradient and weights in every step, where the default is every hundredth",
    ),
)
# In this order a time limit cuts off what matters least.


def main(argv: list[str]) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=int, default=2, metavar="N", help="images a step (default: %(default)s)")
    add("--size", type=int, default=256, metavar="PIXELS", help="of their sides (default: %(default)s)")
    add("--outputs", type=int, default=151, metavar="N", help="classes (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="measurements of each row (default: %(default)s)")
    add("--steps", type=int, default=3, metavar="N", help="steps of a measurement (default: %(default)s)")
    add("--warmup", type=int, default=3, metavar="N", help="steps before those (default: %(default)s)")
    add("--only", action="append", choices=[row[0] for row in VARIANTS], help="this row, and others likewise named")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--time-limit", type=float, default=math.inf, metavar="S", help="seconds after which what is left is left out")
    add("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device; one is needed for --device cuda; leave it out to measure the CPU")
    with tempfile.TemporaryDirectory() as scratch:
        run(args, Path(scratch))


def run(args: argparse.Namespace, scratch: Path) -> None:
    """Measure what the arguments ask for, and report it."""
    on_gpu, began = args.device == "cuda", time.monotonic()
    same_batch, own_batch = contenders(args)
    limit = args.time_limit * (SHARE_OF_STEPS if on_gpu else 1)
    measured = run_rounds(same_batch, args.rounds, scratch, limit)
    largest = []
    if on_gpu:
        largest = run_rounds(own_batch, 1, scratch, args.time_limit - (time.monotonic() - began))
    name = torch.cuda.get_device_name() if on_gpu else ""
    peak = peak_flops(name)
    tables = [steps_table(measured, args.batch, on_gpu, peak)]
    if on_gpu:
        tables += [largest_table(largest, peak), targets_table(gpu_targets(largest, peak))]
    else:
        tables.append(targets_table(cpu_targets(measured)))
    facts: dict[str, Any] = {
        "device": name or "CPU",
        "batch": f"{args.batch} images of {args.size}x{args.size}, {args.outputs} outputs",
        "rounds": f"{args.rounds} of {args.steps} steps after {args.warmup}",
    }
    if on_gpu:
        facts |= {
            "peak FLOP/s in 16 bits": f"{peak:.3g}" if peak else "not known of this device",
            "float32 convolutions": "TF32" if torch.backends.cudnn.allow_tf32 else "float32",
        }
    write_report(args.output, f"training-{args.device}", facts, tables, [*measured, *largest])


def contenders(args: argparse.Namespace) -> tuple[list[Contender], list[Contender]]:
    """Rows at the same batch, and at the largest of each."""
    timing = {"size": args.size, "outputs": args.outputs, "steps": args.steps, "warmup": args.warmup}
    same = timing | {"device": args.device, "batch": args.batch}
    own = timing | {"budgets": BUDGETS}
    small = timing | {"budgets": BUDGETS[:1], "in_whole": False}  # the whole of a GPU would take many thousands
    on_cpu = args.device == "cpu"
    usual = [row[0] for row in VARIANTS if not (on_cpu and row[0] in AT_THE_SAME_BATCH)]
    chosen = [row for row in VARIANTS if row[0] in (args.only or usual) and not (on_cpu and row[0] == TORCH_POOLING)]
    return (
        [Contender(name, function, options | same, does) for name, function, options, does in chosen],
        [
            Contender(name, f"{function}_largest", options | (small if name == RECOMPUTED else own), does)
            for name, function, options, does in chosen
            if name not in AT_THE_SAME_BATCH
        ],
    )


def steps_table(measured: list[Measured], batch: int, on_gpu: bool, peak: float | None) -> Table:
    """Medians over the rounds at the same batch."""
    columns = ["", "step ms", "min", "max", "images/s", "x the peer's fp32 step"]
    columns += ["MFU %", "allocated GB", "reserved GB"] if on_gpu else ["CPU s a step", "peak RSS growth GB"]
    peer = step_time(named(measured, PEER_FP32))
    rows: list[tuple[str, ...]] = []
    for one in measured:
        if one.problem or not one.rounds:
            rows.append((one.contender.name, *("",) * (len(columns) - 1), one_line(one.problem)))
            continue
        times = [round_["step"] for round_ in one.rounds]
        middle = median(times)
        relative = f"{middle / peer:.2f}" if peer else ""
        cells = [f"{1e3 * time_:,.0f}" for time_ in (middle, min(times), max(times))]
        cells += [f"{batch / middle:,.2f}", relative]
        if on_gpu:
            flops = one.rounds[0]["flops"] * batch / middle
            cells.append(f"{100 * flops / peak:.1f}" if peak else "-")
            cells += [f"{median(one.figures(name)) / GB:.2f}" for name in ("allocated", "reserved")]
        else:
            cells += [f"{median(one.figures('CPU s')):.2f}", f"{median(one.figures('resident')) / GB:.2f}"]
        rows.append((one.contender.name, *cells, one.contender.does))
    return Table(f"a step of {batch} images", (*columns, DOES), tuple(rows))


def largest_table(measured: list[Measured], peak: float | None) -> Table:
    """The largest batch in each budget, and how fast each is at its own largest."""
    columns = ("", *(f"batch in {budget} GB" for budget in BUDGETS), "in the whole", "at batch", "images/s", "MFU %")
    rows: list[tuple[str, ...]] = []
    for one in measured:
        if one.problem or not one.rounds:
            rows.append((one.contender.name, *("",) * (len(columns) - 1), one_line(one.problem)))
            continue
        figures = one.rounds[0]
        cells = [str(figures["batches"].get(str(budget), "-")) for budget in BUDGETS]
        cells += [
            "-" if figures["whole"] is None else str(figures["whole"]),
            str(figures.get("batch", "-")),
            f"{rate(figures):,.1f}",
        ]
        cells.append(f"{100 * utilisation(figures, peak):.1f}" if peak else "-")
        said = f"; stopped by: {one_line(figures['stopped by'][0])}" if figures["stopped by"] else ""
        rows.append((one.contender.name, *cells, one.contender.does + said))
    return Table("the largest batch", (*columns, DOES), tuple(rows))


def cpu_targets(measured: list[Measured]) -> list[Target]:
    """Our fastest precision against the peer as its users run it, and at its best."""
    ours, peer_best = best(measured, OURS), best(measured, PEER)
    peer = median_rate(plain, rate) if (plain := named(measured, PEER_FP32)) else None
    return [
        Target("our step over the peer's in fp32", 0.4, ratio(peer, ours), at_most=True),
        Target("our step over the peer's fastest", 0.4, ratio(peer_best, ours), at_most=True),
    ]


def gpu_targets(largest: list[Measured], peak: float | None) -> list[Target]:
    """What each does at its own largest batch; the targets are those of an H100."""
    ours, peer, small = (named(largest, name) for name in (OURS_BF16, PEER_FP32, RECOMPUTED))
    figures = ours.rounds[0] if ours and ours.rounds else None
    our_rate = rate(figures) if figures else None
    return [
        Target(
            "images/s in bf16 over the peer's in fp32", 3, ratio(our_rate, median_rate(peer, rate) if peer else None)
        ),
        Target("images/s in bf16 over the peer's best", 1.5, ratio(our_rate, best(largest, PEER))),
        Target("MFU in bf16, %", 35, 100 * utilisation(figures, peak) if figures and peak else None),
        Target("micro-batch in 12 GB", 512, small.rounds[0]["batches"].get("12") if small and small.rounds else None),
    ]


def utilisation(figures: dict[str, Any], peak: float) -> float:
    """The share of the device's peak that a contender's own arithmetic is."""
    return float(figures.get("flops", 0)) * rate(figures) / peak


def rate(figures: dict[str, Any]) -> float:
    """Images a second; 0 if not one fits."""
    return float(figures.get("images/s", 0))


def step_time(measured: Measured | None) -> float | None:
    """The median, None if there is none."""
    return median(measured.figures("step")) if measured and measured.rounds else None


def best(measured: list[Measured], who: str) -> float | None:
    """Images a second of the fastest among ours or the peer's."""
    return fastest([one for one in measured if one.contender.name.startswith(who)], rate)


def named(measured: list[Measured], name: str) -> Measured | None:
    """The row of that name, if it is asked for."""
    return next((one for one in measured if one.contender.name == name), None)


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
