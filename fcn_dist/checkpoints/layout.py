"""Where a parameter's elements lie in the flat tensors of ranks: arithmetic alone, for reading and writing alike.

DeepSpeed 0.19 lays the parameters of an optimizer's group out in three ways:

in a row      stage 0: one after the other, whole on every rank
in a run      stages 1 and 2: one after the other over all ranks, each of which owns an equal run of the row
in shares     stage 3: each parameter cut into equal shares, and a rank's shares one after the other
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fcn_dist.errors import UserError


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements, and its place in a flat tensor."""

    name: str  # of the parameter
    start: int  # its first element, in the flattened parameter
    numel: int
    offset: int  # of that element, in the flat tensor


def in_a_row(sizes: Mapping[str, int]) -> list[Piece]:
    """The pieces of one flat tensor that holds parameters of these sizes whole."""
    return in_a_run(sizes, [0] * len(sizes), sum(sizes.values()), rank=0)


def in_a_run(sizes: Mapping[str, int], paddings: Sequence[int], length: int, rank: int) -> list[Piece]:
    """The pieces of rank `rank`'s run, `length` elements long; `paddings` are elements unused behind each parameter."""
    pieces, first, begin = [], rank * length, 0
    for (name, numel), padding in zip(sizes.items(), paddings, strict=True):
        start, end = max(begin, first), min(begin + numel, first + length)
        if start < end:
            pieces.append(Piece(name, start - begin, end - start, start - first))
        begin += numel + padding
    return pieces


def in_shares(sizes: Mapping[str, int], world_size: int, rank: int) -> list[Piece]:
    """The pieces of rank `rank`'s shares. Each is ceil(numel / ranks) long, so the last end in padding."""
    pieces, offset = [], 0
    for name, numel in sizes.items():
        share = share_of(numel, world_size)
        start = min(rank * share, numel)
        if length := min(share, numel - start):
            pieces.append(Piece(name, start, length, offset))
        offset += share
    return pieces


def share_of(numel: int, world_size: int) -> int:
    """The elements that stage 3 sets aside on each rank for a parameter."""
    return -(-numel // world_size)


def check_cover(sizes: Mapping[str, int], pieces: Iterable[Piece], where: str) -> None:
    """Raise UserError unless the pieces, of all ranks together, hold every element of every parameter exactly once."""
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for piece in pieces:
        found.setdefault(piece.name, []).append((piece.start, piece.numel))
    for name, runs in found.items():
        end = 0
        for start, numel in sorted(runs):
            if start != end:
                break
            end += numel
        if end != sizes.get(name) or sum(numel for _, numel in runs) != end:
            raise UserError(
                f"{where}: the parts of {name} are {sorted(runs)} as (first element, elements), and do not make up "
                f"its {sizes.get(name, 0)} elements once each; restore the checkpoint from a copy"
            )
