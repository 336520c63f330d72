"""From a checkpoint to one file of float32 weights: ours beside DeepSpeed's own converter, seconds and memory.

    python benchmarks/converting.py --rounds 5 --output reports [--scratch DISK]

The checkpoints are of FCN-8s on VGG16 at full width with 150 outputs, random weights trained for two small steps by two
real ranks under DeepSpeed, with Adam. See benchmarks/README.md.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import starting
from entry import run_benchmark
from launched import launch
from measure import Contender, Measured, run_rounds
from tables import Table, Target, ratio, targets_table, write_report

from fcn_dist.console import status_console

RANKS = 2
CASES = ("bf16-1", "bf16-2", "bf16-3", "fp32-1", "fp32-2", "fp32-3")
RANK_SCRIPT = Path(__file__).with_name("converting_rank.py")
WAYS: tuple[tuple[str, str, dict[str, bool], str], ...] = (
    ("DeepSpeed", "deepspeed", {}, "torch's own form, its default; no check, and not flushed to disk"),
    ("DeepSpeed, flushed", "deepspeed", {"flush": True}, "likewise, and its file on disk at the end, as ours is"),
    ("DeepSpeed, safetensors", "deepspeed", {"safe": True}, "no check, not flushed"),
    (
        "ours, unproven",
        "unproven",
        {},
        "weights held against their CRC-32, masters against the 16-bit weights; no flush or proof",
    ),
    (
        "ours",
        "proven",
        {},
        "as the command does: numbers finite, too, flushed, read back, scores of the probe compared",
    ),
)
COMMANDS: tuple[tuple[str, dict[str, bool], str], ...] = (
    ("DeepSpeed's command", {"ours": False}, "a process that imports its zero_to_fp32 and calls it"),
    ("our command", {"ours": True}, "launch/convert.py, with every check and the flush"),
)
MOST_MEMORY = 1.2  # of the float32 weights, and a rank's file besides


def contenders(case: str, run: Path) -> list[Contender]:
    """All ways for one checkpoint, and the commands."""
    ways = [*WAYS, *((name, "command", options, does) for name, options, does in COMMANDS)]
    return [
        Contender(f"{case}: {name}", f"converting_ways:{function}", {"run": str(run), **options}, does, writes=True)
        for name, function, options, does in ways
    ]


def save(case: str, folder: Path, width: float) -> str:
    """Have two ranks write the case's run folder, unless it is there; why they did not."""
    run = folder / case
    if any((run / "checkpoints").glob("step-*")):
        return ""
    status_console.print(f"training and saving {case}")
    precision, stage = case.split("-")
    return launch([str(RANK_SCRIPT), str(run), precision, stage, str(width)], RANKS, folder)


def table(measured: Sequence[Measured]) -> Table:
    """Medians over the rounds, memory as a share of the file of float32 weights."""
    rows: list[tuple[str, ...]] = []
    for one in measured:
        if one.problem:
            rows.append((one.contender.name, "", "", "", "", "", one.problem))
            continue
        took = one.figures("seconds")
        shares = (f"{share(one, name):.2f}" for name in ("anonymous", "resident"))
        spread = f"{min(took):.2f}-{max(took):.2f}"
        rows.append(
            (
                one.contender.name,
                f"{median(took):.2f}",
                spread,
                f"{median(one.figures('cpu')):.2f}",
                *shares,
                one.contender.does,
            )
        )
    columns = ("", "seconds", "range", "CPU s", "memory of its own", "with mapped files", "what it does")
    return Table("memory as a multiple of the float32 weights", columns, tuple(rows))


def share(one: Measured, name: str) -> float:
    """A peak over the bytes of the weights."""
    return median(one.figures(name)) / median(one.figures("bytes"))


def seconds(one: Measured) -> float | None:
    """The median, if there is one."""
    return None if one.problem else median(one.figures("seconds"))


def targets(case: str, measured: Sequence[Measured]) -> list[Target]:
    """What ours is to keep to, for one checkpoint."""
    default, flushed, safe, unproven, ours, their_command, our_command = measured
    compared = {
        "the command over DeepSpeed's": (our_command, their_command),
        "all, over DeepSpeed flushed": (ours, flushed),
        "unproven, over DeepSpeed to safetensors": (unproven, safe),
        "all, over DeepSpeed not flushed": (ours, default),
    }
    times = [
        Target(f"{case}: seconds, {what}", 1.0, ratio(seconds(one), seconds(other)), True)
        for what, (one, other) in compared.items()
    ]
    memory = None if ours.problem else share(ours, "anonymous")
    return [*times, Target(f"{case}: memory of its own, all", MOST_MEMORY, memory, True)]


def main(argv: list[str]) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="PRECISION-STAGE")
    parser.add_argument("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="the disk to write to (default: the temporary one)")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="keep them there, and use those that are there")
    parser.add_argument("--width", type=float, default=1.0, help="factor of the network's channels")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = (options.checkpoints or Path(scratch) / "checkpoints").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        problems = {case: save(case, folder, options.width) for case in options.cases}
        cases = [case for case in options.cases if not problems[case]]
        each = [way for case in cases for way in contenders(case, folder / case)]
        measured = run_rounds(each, options.rounds, Path(scratch), math.inf)
    count = len(WAYS) + len(COMMANDS)
    of_case = {case: measured[n * count : (n + 1) * count] for n, case in enumerate(cases)}
    tables = [
        table([one for ways in of_case.values() for one in ways[: len(WAYS)]]),
        starting.table([one for ways in of_case.values() for one in ways[len(WAYS) :]]),
        targets_table([target for case, ways in of_case.items() for target in targets(case, ways)]),
    ]
    facts = {f"no checkpoint of {case}": problem for case, problem in problems.items() if problem}
    write_report(options.output, "converting", facts, tables, measured)


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
