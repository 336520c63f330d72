"""What two checkpoints of DeepSpeed hold, compared tensor by tensor and bit by bit."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fcn_dist.checkpoints.restricted import load_restricted


def leaves(value: object, where: str) -> Iterator[tuple[str, object]]:
    """Everything in `value` that holds nothing else, and where it is."""
    if isinstance(value, dict):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list | tuple):
        children = [(str(index), child) for index, child in enumerate(value)]
    elif not isinstance(value, Tensor) and hasattr(value, "__dict__") and vars(value):
        children = list(vars(value).items())
    else:
        yield where, value
        return
    for name, child in children:
        yield from leaves(child, f"{where}/{name}")


def contents(folder: Path) -> dict[str, object]:
    """All leaves of all of a folder's files."""
    paths = sorted(folder.glob("*.pt"))
    return {where: leaf for path in paths for where, leaf in leaves(load_restricted(path), path.name)}


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Where two contents differ in presence, type, shape or any bit."""
    found = sorted(one.keys() ^ other.keys())
    return found + [where for where in one.keys() & other.keys() if not _same(one[where], other[where])]


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        # As bits: what stage 3 pads with is whatever its memory held, a NaN now and then.
        bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    return type(one) is type(other) and (one == other or one is other)
