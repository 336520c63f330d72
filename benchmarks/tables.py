"""Measured contenders in; a table on the screen, as Markdown, and every single figure as JSON out."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from measure import INSTALL, Measured
from rich.console import Console
from rich.table import Table as RichTable

from fcn_dist.console import console

PACKAGES = ("torch", "numpy", "opencv-python-headless", "Pillow", "webdataset", "mosaicml-streaming", "litdata")
DOES = "what it does"
WIDTH = 150  # of tables that do not go to a terminal


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; the first column is left-aligned, so is what a row does."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def show(self) -> None:
        """Print it."""
        table = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if self._is_text(number) else "right")
        for row in self.rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else WIDTH, markup=False).print(table)

    def markdown(self) -> str:
        """The same as Markdown."""
        rule = ["---" if self._is_text(number) else "---:" for number in range(len(self.columns))]
        lines = [self.columns, tuple(rule), *self.rows]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def _is_text(self, number: int) -> bool:
        return number == 0 or self.columns[number] == DOES


def rate_table(
    title: str, measured: Sequence[Measured], ours: Measured, rate: Callable[[dict[str, Any]], float], *more: str
) -> Table:
    """Images a second of each contender: median, range, and how many times as fast ours is.

    `rate` reads it from the figures of a round; `more` are further figures to show by their medians.
    """
    ours_rate = median_rate(ours, rate)
    rows = []
    for one in measured:
        if one.problem:
            rows.append((one.contender.name, *("",) * (4 + len(more)), one_line(one.problem)))
            continue
        rates = [rate(round_) for round_ in one.rounds]
        middle = median(rates)
        ratio = f"{ours_rate / middle:.2f}" if ours_rate else ""
        cells = (f"{middle:,.0f}", f"{min(rates):,.0f}", f"{max(rates):,.0f}", ratio)
        others = (f"{median(one.figures(name)):,.0f}" for name in more)
        rows.append((one.contender.name, *cells, *others, one.contender.does))
    return Table(title, ("", "images/s", "min", "max", "ours is x times", *more, DOES), tuple(rows))


def median_rate(measured: Measured, rate: Callable[[dict[str, Any]], float]) -> float | None:
    """The median over the rounds, None if there is none."""
    return median(map(rate, measured.rounds)) if measured.rounds and not measured.problem else None


def fastest(measured: Sequence[Measured], rate: Callable[[dict[str, Any]], float]) -> float | None:
    """The highest median among those that have one."""
    return max((r for one in measured if (r := median_rate(one, rate)) is not None), default=None)


@dataclass(frozen=True)
class Target:
    """A bound on a ratio of two figures; None where one of them is missing."""

    what: str
    needed: float
    found: float | None
    at_most: bool = False

    def row(self) -> tuple[str, ...]:
        """What the table of targets says of it."""
        bound = f"{'<=' if self.at_most else '>='} {self.needed:g}"
        if self.found is None:
            return self.what, bound, "", "not measured"
        met = self.found <= self.needed if self.at_most else self.found >= self.needed
        return self.what, bound, f"{self.found:.2f}", "met" if met else "missed"


def targets_table(targets: Sequence[Target]) -> Table:
    """Bounds beside what was found."""
    return Table("targets", ("", "needed", "found", "result"), tuple(target.row() for target in targets))


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where either is."""
    return numerator / denominator if numerator and denominator else None


def write_report(
    output: Path, name: str, facts: dict[str, Any], tables: Sequence[Table], measured: Sequence[Measured]
) -> None:
    """Print `tables`, and write `output/NAME.md` and `output/NAME.json`."""
    facts = facts | {"command": command()} | machine(PACKAGES)
    for table in tables:
        table.show()
    for fact, value in facts.items():
        console.print(f"{fact}: {value}")
    output.mkdir(parents=True, exist_ok=True)
    head = "".join(f"- {fact}: {value}\n" for fact, value in facts.items())
    (output / f"{name}.md").write_text("\n".join([f"## {name}\n", head, *(table.markdown() for table in tables)]))
    tree = {
        **facts,
        "tables": [vars(table) for table in tables],
        "measured": [
            {"name": m.contender.name, "does": m.contender.does, "problem": m.problem, "rounds": m.rounds}
            for m in measured
        ],
    }
    (output / f"{name}.json").write_text(json.dumps(tree, indent=1) + "\n")
    console.print(f"written: {output / name}.md and .json")


def command() -> str:
    """The command line with folders by their names only, so that a report can be shown to others."""
    return shlex.join(["python", *(Path(word).name if os.sep in word else word for word in sys.argv)])


def machine(packages: Sequence[str]) -> dict[str, str]:
    """What figures depend on besides the command; no name of a host or folder."""
    return {
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "load average at the end": "{:.1f}, {:.1f}, {:.1f}".format(*os.getloadavg()),
        "date": time.strftime("%Y-%m-%d"),
        "versions": ", ".join([f"Python {platform.python_version()}", *map(_version, packages)]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def one_line(problem: str) -> str:
    """The end of what went wrong, as it fits into a table."""
    # The whole of it is in the JSON.
    if INSTALL in problem or not problem.strip():
        return problem
    return problem.strip().splitlines()[-1].replace("|", "/")[:160]
