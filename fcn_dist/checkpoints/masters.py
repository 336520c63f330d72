"""Which parameter is which in the masters of ZeRO stage 0, where DeepSpeed saves no names.

An optimizer group holds its parameters one after the other, and the 16-bit weights are their masters rounded. Both
together tell which run of which group belongs to which parameter.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def attribute_masters(groups: Sequence[Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 master of each of `weights` that has one, from flat groups in the order of the weights.

    Every element of every group must find its place; if some arrangement does not exist, the result is empty.
    """
    names = list(weights)
    ends = tuple(group.numel() for group in groups)
    # A path is the group of each weight so far, -1 for frozen ones. Weights equal in 16 bits (biases of zero) may fit
    # two groups, so the search goes back; but never twice from the same place.
    pending: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), (0,) * len(groups))]
    tried: set[tuple[int, tuple[int, ...]]] = set()
    while pending:
        path, starts = pending.pop()
        if len(path) == len(names):
            if starts == ends:
                return _cut(groups, weights, path)
            continue
        if (len(path), starts) in tried:
            continue
        tried.add((len(path), starts))
        weight = weights[names[len(path)]]
        pending.append(((*path, -1), starts))
        for index in reversed(range(len(groups))):
            start, end = starts[index], starts[index] + weight.numel()
            if torch.equal(groups[index][start:end].to(weight.dtype), weight.flatten()):
                pending.append(((*path, index), (*starts[:index], end, *starts[index + 1 :])))
    return {}


def _cut(groups: Sequence[Tensor], weights: Mapping[str, Tensor], path: Sequence[int]) -> dict[str, Tensor]:
    starts = [0] * len(groups)
    masters = {}
    for (name, weight), index in zip(weights.items(), path, strict=True):
        if index >= 0:
            end = starts[index] + weight.numel()
            masters[name] = groups[index][starts[index] : end].view(weight.shape)
            starts[index] = end
    return masters
