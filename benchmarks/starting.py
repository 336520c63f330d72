"""From the command to the first mask on disk: `launch/predict.py` with one image, beside python's and torch's start.

    python benchmarks/starting.py quickstart/model.safetensors IMAGE --rounds 7 --output reports

Each is a fresh process, as a user starts it. See benchmarks/README.md.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from entry import run_benchmark
from measure import Contender, Measured, run_rounds
from tables import DOES, Table, Target, one_line, targets_table, write_report

PREDICT = Path(__file__).resolve().parents[1] / "launch" / "predict.py"
MOST = 3.0  # seconds


def contenders(model: Path, image: Path) -> list[Contender]:
    """Python, torch, and ours."""
    ways: tuple[tuple[str, list[str], str, bool], ...] = (
        ("python", ["-c", "pass"], "starts and ends", False),
        ("python, torch", ["-c", "import torch"], "imports torch", False),
        ("ours", [str(PREDICT), str(model), str(image), "--device", "cpu"], "label map and overlay on disk", True),
    )
    return [
        Contender(name, "starting:command", {"arguments": arguments}, does, writes=writes)
        for name, arguments, does, writes in ways
    ]


def command(arguments: list[str], out: str | None = None) -> dict[str, Any]:
    """Seconds of a python process with these arguments; `cpu` are those of all its threads."""
    began = perf_counter()
    subprocess.run([sys.executable, *arguments, *(["--output", out] if out else [])], check=True)
    seconds, used = perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if out:
        assert list(Path(out).rglob("*.png")), arguments
    return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime}


def table(measured: Sequence[Measured]) -> Table:
    """Medians over the rounds."""
    rows: list[tuple[str, ...]] = []
    for one in measured:
        if one.problem:
            rows.append((one.contender.name, "", "", "", one_line(one.problem)))
            continue
        took = one.figures("seconds")
        spread, cpu = f"{min(took):.2f}-{max(took):.2f}", median(one.figures("cpu"))
        rows.append((one.contender.name, f"{median(took):.2f}", spread, f"{cpu:.2f}", one.contender.does))
    return Table("seconds of a process", ("", "seconds", "range", "CPU s", DOES), tuple(rows))


def main(argv: list[str]) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model file; quickstart.sh leaves one")
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmark-reports"), metavar="DIR")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        each = contenders(options.model.resolve(), options.image.resolve())
        measured = run_rounds(each, options.rounds, Path(scratch))
    _, torch, ours = (None if one.problem else median(one.figures("seconds")) for one in measured)
    beyond = None if ours is None or torch is None else ours - torch
    targets = [
        Target("seconds to the first mask", MOST, ours, True),
        Target("of them, beyond torch's", 1.0, beyond, True),
    ]
    write_report(options.output, "starting", {}, [table(measured), targets_table(targets)], measured)


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
