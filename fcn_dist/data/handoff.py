"""Micro-batches from loader processes to the training process, through memory that both have mapped.

A new piece of shared memory a batch is the usual way, and costs a page fault every 4 kB: 5.5 ms for 32 images of
256x256, as much as three of the images take to decode. So each loader process has slots that it fills in turn, and the
training process copies a batch out (0.2 ms) before its slot is filled again. The memory is anonymous, so that the size
of /dev/shm, small in containers, does not matter.
"""

import mmap
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcn_dist.data.transforms import Pixels


class Place(NamedTuple):
    """Where one batch lies: the n-th of a loader process."""

    worker: int
    number: int
    images: int  # in the batch


class Slots:
    """Memory for `slots` micro-batches, of `micro_batch` images at most, of each loader process.

    Made before the processes are forked.
    """

    def __init__(self, workers: int, slots: int, micro_batch: int, crop: tuple[int, int]) -> None:
        self._slots = slots
        shape = (workers, slots, micro_batch, *crop)
        self._images = _shared((*shape, 3), np.uint8)
        self._targets = _shared(shape, np.uint8)
        # Batches of each process that have been copied out. Written by the training process alone.
        self._copied = _shared((workers,), np.int64)

    def free(self, place: Place) -> bool:
        """Whether the slot of `place` may be filled: what it held before has been copied out."""
        return bool(self._copied[place.worker] > place.number - self._slots)

    def arrays(self, place: Place) -> tuple[Pixels, Pixels]:
        """Images (B, H, W, 3) and targets (B, H, W) at `place`."""
        slot = place.worker, place.number % self._slots
        images: Pixels = self._images[slot]
        targets: Pixels = self._targets[slot]
        return images[: place.images], targets[: place.images]

    def take(self, place: Place, pin_memory: bool) -> tuple[Tensor, Tensor]:
        """Copies of both, in page-locked memory if `pin_memory`; the slot is free afterwards."""
        arrays = self.arrays(place)
        if pin_memory:
            images, targets = (torch.from_numpy(array).pin_memory() for array in arrays)
        else:
            # By NumPy, on one thread: torch copies on all, and waits for the one whose core a loader process has.
            images, targets = (torch.from_numpy(array.copy()) for array in arrays)
        self._copied[place.worker] = place.number + 1
        return images, targets


def _shared(shape: tuple[int, ...], dtype: type) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
    """Zeros that this process and those forked from it share; given back when no array refers to them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(1, size)), dtype, int(np.prod(shape))).reshape(shape)
