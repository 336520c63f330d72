"""The page that sets stages, precisions and ranks side by side: its formatter, and that the committed one is whole."""

import re
from pathlib import Path

import pytest
from equivalence_page import BEGIN, END, Cell, Trained, measured, update_page

from fcn_dist.errors import UserError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "equivalence.md"
TRAINED = (
    Trained(Cell(0, "fp32", 1), (9.0, 2.0)),
    Trained(Cell(3, "fp32", 1), (9.0, 2.5)),
    Trained(Cell(0, "fp16", 1), (9.0, 4.0), skipped=2),
    Trained(Cell(3, "fp16", 1), problem="exit code 1"),
)
FACTS = {"command": "python benchmarks/equivalence.py", "machine": "a loom"}


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table but heads and rules."""
    # A head's first cell is empty.
    found = [line.strip("| ").split("|") for line in text.splitlines() if re.match(r"\| \S", line)]
    return [[cell.strip() for cell in row] for row in found if not row[0].startswith("---")]


def test_a_row_is_a_stage_on_some_ranks_and_a_column_a_precision() -> None:
    text = measured(TRAINED, 7, FACTS, left_out=(), by_wrapper=False)
    assert "### Loss after 7 updates\n\n|  | fp32 | fp16 |\n" in text
    assert rows(text)[:2] == [
        ["ZeRO 0, 1 rank", "2.0000000", "4.0000000 (2 skipped)"],
        ["ZeRO 3, 1 rank", "2.5000000", "exit code 1"],
    ]
    assert text.endswith("- command: python benchmarks/equivalence.py\n- machine: a loom")


def test_the_spread_is_the_distance_of_the_extremes_as_a_share_of_the_lower() -> None:
    found = {row[0]: row[1:] for row in rows(measured(TRAINED, 7, FACTS, left_out=(), by_wrapper=False))[2:]}
    assert found["fp32, all stages and ranks"] == ["2.0000000", "2.5000000", "2.5e-01"]
    assert found["fp16, all stages and ranks"] == ["4.0000000", "4.0000000", "0.0e+00"]  # the failed one is left out
    assert found["all cells"] == ["2.0000000", "4.0000000", "1.0e+00"]


def test_what_was_left_out_or_done_in_another_way_is_said() -> None:
    plain = measured(TRAINED, 7, FACTS, left_out=(), by_wrapper=False)
    assert "Left out" not in plain and "fp16_anywhere" not in plain
    noted = measured(TRAINED, 7, FACTS, left_out=(2, 4), by_wrapper=True)
    assert "Left out: 2 and 4 ranks" in noted and "tests/fp16_anywhere.py" in noted


def test_the_text_around_the_tables_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        update_page(page, TRAINED, 7, FACTS, (), False)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n### Loss") and text.endswith(f"a loom\n{END}\nafter\n")
    assert "old" not in text and text.count("### Spread") == 1


def test_a_page_without_its_markers_is_not_touched(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("words\n")
    with pytest.raises(UserError, match=r"page\.md has no lines <!-- measured: begin --> and <!-- measured: end -->"):
        update_page(page, TRAINED, 7, FACTS, (), False)
    assert page.read_text() == "words\n"


def test_the_committed_page_has_every_stage_precision_and_number_of_ranks() -> None:
    _, _, rest = PAGE.read_text().partition(BEGIN)
    inside, end, _ = rest.partition(END)
    assert end
    assert "|  | fp32 | bf16 | fp16 |\n" in inside
    losses = {row[0]: row[1:] for row in rows(inside) if row[0].startswith("ZeRO")}
    assert list(losses) == [
        f"ZeRO {stage}, {ranks} rank{'s' if ranks > 1 else ''}" for ranks in (1, 2, 4) for stage in range(4)
    ]
    for cells in losses.values():
        assert len(cells) == 3 and all(re.fullmatch(r"\d\.\d{7}", cell) for cell in cells)
    assert any(row[0] == "all cells" for row in rows(inside))
