"""Where parameters lie in flat tensors: whatever the sizes and ranks, every element has one place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fcn_dist.checkpoints.layout import Piece, check_cover, in_a_row, in_a_run, in_shares, share_of
from fcn_dist.checkpoints.trainingstate import SplitTensor
from fcn_dist.errors import UserError

sizes_of = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(
    lambda sizes: {f"p{index}": size for index, size in enumerate(sizes)}
)
ranks = st.integers(1, 9)


def assert_apart(pieces: list[Piece], length: int) -> None:
    """No two pieces share an element of the flat tensor."""
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        assert piece.offset >= end
        end = piece.offset + piece.numel
    assert end <= length


@given(sizes_of)
def test_a_row_is_every_parameter_after_the_other(sizes: dict[str, int]) -> None:
    pieces = in_a_row(sizes)
    check_cover(sizes, pieces, "row")
    assert [(piece.name, piece.start) for piece in pieces] == [(name, 0) for name in sizes]
    assert [piece.offset for piece in pieces] == [sum(list(sizes.values())[:i]) for i in range(len(sizes))]


@given(sizes_of, ranks, st.data())
def test_the_runs_of_all_ranks_are_the_row_cut_in_equal_parts(
    sizes: dict[str, int], world_size: int, data: st.DataObject
) -> None:
    paddings = [data.draw(st.integers(0, 3)) for _ in sizes]
    total = sum(sizes.values()) + sum(paddings)
    alignment = 2 * world_size  # as DeepSpeed has it
    length = -(-total // alignment) * alignment // world_size
    runs = [in_a_run(sizes, paddings, length, rank) for rank in range(world_size)]
    check_cover(sizes, (piece for run in runs for piece in run), "runs")
    for run in runs:
        assert_apart(run, length)
    # The oracle: number the row's elements, cut it, and look where each went.
    row: list[tuple[str, int] | None] = []
    for (name, numel), padding in zip(sizes.items(), paddings, strict=True):
        row += [*((name, element) for element in range(numel)), *([None] * padding)]
    for rank, run in enumerate(runs):
        placed = {piece.offset + i: (piece.name, piece.start + i) for piece in run for i in range(piece.numel)}
        cut = row[rank * length : (rank + 1) * length]
        assert placed == {offset: element for offset, element in enumerate(cut) if element}


@given(sizes_of, ranks)
def test_the_shares_of_all_ranks_are_every_parameter_in_equal_parts(sizes: dict[str, int], world_size: int) -> None:
    shares = [in_shares(sizes, world_size, rank) for rank in range(world_size)]
    check_cover(sizes, (piece for share in shares for piece in share), "shares")
    length = sum(share_of(numel, world_size) for numel in sizes.values())
    for rank, share in enumerate(shares):
        assert_apart(share, length)
        assert all(piece.start == rank * share_of(sizes[piece.name], world_size) for piece in share)


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece("a", 0, 3, 0)],
        [Piece("a", 0, 3, 0), Piece("a", 4, 1, 0)],
        [Piece("a", 0, 3, 0), Piece("a", 2, 3, 0)],
        [Piece("a", 0, 5, 0), Piece("a", 0, 5, 0)],
        [Piece("a", 0, 6, 0)],
        [Piece("a", 0, 5, 0), Piece("b", 0, 1, 0)],
        [],
    ],
    ids=["short", "a hole", "twice in part", "twice", "too long", "unknown", "nowhere"],
)
def test_a_gap_or_an_overlap_is_an_error_that_names_the_parameter(pieces: list[Piece]) -> None:
    with pytest.raises(UserError, match=r"folder: the parts of [ab] are"):
        check_cover({"a": 5}, pieces, "folder")


@given(sizes_of, st.data())
def test_a_split_tensor_gives_any_run_of_its_elements(sizes: dict[str, int], data: st.DataObject) -> None:
    numel = sum(sizes.values())
    whole = torch.arange(numel, dtype=torch.float32)
    split = SplitTensor((numel, 1), torch.split(whole, list(sizes.values())))
    assert torch.equal(split.joined(), whole.view(numel, 1))
    start = data.draw(st.integers(0, numel))
    target = torch.full((data.draw(st.integers(0, numel - start)),), -1.0, dtype=torch.float64)
    split.copy_to(target, start)
    assert torch.equal(target, whole[start : start + target.numel()].double())
