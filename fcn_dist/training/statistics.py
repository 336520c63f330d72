"""The running statistics of batch normalisation, made the same on all ranks."""

import torch
from torch import nn

from fcn_dist.model.batchnorm import BatchNorm2d
from fcn_dist.ranks import Rank
from fcn_dist.training.collective import sum_over_ranks


def average_statistics(model: nn.Module, rank: Rank) -> None:
    """Replace running means and variances by their averages over ranks. All ranks call it, once a step.

    A layer normalises by its rank's own micro-batch, so each rank has statistics of its own after a step, and up to
    ZeRO stage 2 only those of rank 0 are saved. Averaging the variances leaves out how far the ranks' means lie apart,
    on purpose: what the running variance estimates is the average of the micro-batches' variances, each about its own
    mean (Ioffe & Szegedy 2015, algorithm 2), and one rank that sees the same micro-batches one after the other leaves
    it out as well. One all-reduce for all layers; layers in evaluation, those of frozen stages, take no part.
    """
    if rank.world_size == 1:
        return
    layers = [layer for layer in model.modules() if isinstance(layer, BatchNorm2d) and layer.training]
    statistics = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    if not statistics:
        return
    flat = sum_over_ranks(torch.cat(statistics), rank) / rank.world_size
    for buffer, averaged in zip(statistics, torch.split(flat, [len(buffer) for buffer in statistics]), strict=True):
        buffer.copy_(averaged)
