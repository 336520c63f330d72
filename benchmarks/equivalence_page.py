"""Losses of trainings that should be one and the same in; the tables of docs/equivalence.md out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tables import Table

from fcn_dist.errors import UserError

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Cell:
    """One training of the table."""

    stage: int  # of ZeRO
    precision: str  # "fp32", "bf16" or "fp16"
    ranks: int

    def __str__(self) -> str:
        return f"ZeRO {self.stage}, {self.precision}, {self.ranks} ranks"


@dataclass(frozen=True)
class Trained:
    """What became of it."""

    cell: Cell
    losses: tuple[float, ...] = ()  # of each global batch, by the weights before its update
    skipped: int = 0  # updates that fp16 left out because gradients overflowed
    problem: str = ""  # why there are no losses

    @property
    def outcome(self) -> str:
        """The loss after the last update but one, as the table shows it."""
        return self.problem or f"{self.losses[-1]:.7f}" + (f" ({self.skipped} skipped)" if self.skipped else "")


@dataclass(frozen=True)
class Spread:
    """The extremes of some losses."""

    low: float
    high: float

    @property
    def relative(self) -> float:
        """Their distance, as a share of the lower one."""
        return (self.high - self.low) / self.low


def spread(trained: Sequence[Trained]) -> Spread | None:
    """Of the last losses; None if there are none."""
    losses = [one.losses[-1] for one in trained if not one.problem]
    return Spread(min(losses), max(losses)) if losses else None


def update_page(
    page: Path,
    trained: Sequence[Trained],
    steps: int,
    facts: Mapping[str, str],
    left_out: Sequence[int],
    by_wrapper: bool,
) -> None:
    """Put what was measured between the page's markers. Raises UserError if it has none."""
    text = page.read_text() if page.is_file() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page} has no lines {BEGIN} and {END}, between which the tables go; restore them")
    page.write_text(f"{before}{BEGIN}\n{measured(trained, steps, facts, left_out, by_wrapper)}\n{END}{after}")


def measured(
    trained: Sequence[Trained], steps: int, facts: Mapping[str, str], left_out: Sequence[int], by_wrapper: bool
) -> str:
    """Both tables, what was left out, and how it was measured, as Markdown."""
    precisions = tuple(dict.fromkeys(one.cell.precision for one in trained))
    notes = []
    if left_out:
        rows = " and ".join(map(str, left_out))
        notes.append(f"Left out: {rows} ranks, which need as many GPUs; this machine has fewer.")
    if by_wrapper and "fp16" in precisions:
        notes.append(
            "fp16 was trained through `tests/fp16_anywhere.py`: DeepSpeed refuses it on a CPU whose oneDNN does not "
            "have it, although torch computes it."
        )
    parts = [
        loss_table(trained, steps, precisions).markdown(),
        spread_table(trained, precisions).markdown(),
        *(note + "\n" for note in notes),
        "".join(f"- {fact}: {value}\n" for fact, value in facts.items()),
    ]
    return "\n".join(parts).rstrip()


def loss_table(trained: Sequence[Trained], steps: int, precisions: Sequence[str]) -> Table:
    """A row for each stage and number of ranks, a column for each precision."""
    outcomes = {one.cell: one.outcome for one in trained}
    places = dict.fromkeys((one.cell.ranks, one.cell.stage) for one in trained)
    rows = tuple(
        (f"ZeRO {stage}, {ranks} rank{'s' * (ranks > 1)}", *(outcomes[Cell(stage, p, ranks)] for p in precisions))
        for ranks, stage in sorted(places)
    )
    return Table(f"Loss after {steps} updates", ("", *precisions), rows)


def spread_table(trained: Sequence[Trained], precisions: Sequence[str]) -> Table:
    """Lowest, highest and their distance: of each precision, of all, and of the same ranks or stage where told."""
    groups = {f"{p}, all stages and ranks": [one for one in trained if one.cell.precision == p] for p in precisions}
    for p in precisions:
        for ranks in sorted({one.cell.ranks for one in trained}):
            name = f"{p}, all stages on {ranks} rank{'s' * (ranks > 1)}"
            groups[name] = [one for one in trained if (one.cell.precision, one.cell.ranks) == (p, ranks)]
    groups["all cells"] = list(trained)
    rows = []
    for name, members in groups.items():
        found = spread(members)
        cells = (f"{found.low:.7f}", f"{found.high:.7f}", f"{found.relative:.1e}") if found else ("", "", "")
        rows.append((name, *cells))
    return Table("Spread", ("", "lowest", "highest", "apart by, relative"), tuple(rows))
