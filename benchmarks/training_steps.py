"""Steps of a contender in training: what builds it in; times, memory, and the largest batch that fits out.

Shapes: B images, H x W pixels.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

GB = 10**9
# As far as the search for the largest batch goes: one of this share more would not fit.
TOLERANCE = 0.03
MOST = 1 << 14  # images; a search ends there
NO_ROOM = ("out of memory", "ALLOC_FAILED")  # what CUDA, cuDNN and cuBLAS say


@dataclass(frozen=True)
class Scenes:
    """A micro-batch in the memory of the host, the same for every contender."""

    images: Tensor  # (B, H, W, 3) uint8, RGB
    targets: Tensor  # (B, H, W) uint8, output channels
    ignored: int  # in targets, where nothing is learned
    on_gpu: bool

    def pinned(self, tensor: Tensor) -> Tensor:
        """As a loader of that device hands tensors over."""
        return tensor.pin_memory() if self.on_gpu else tensor


class Trainer(Protocol):
    """A network with its optimizer."""

    def prepare(self, scenes: Scenes) -> Any:
        """What its loader would hand over; not part of a step."""

    def step(self, inputs: Any) -> float | Tensor:
        """Train on a micro-batch; returns the loss."""

    def flops(self, size: tuple[int, int]) -> int:
        """Of a step, for one image."""

    def compile(self) -> None:
        """From now on take compiled steps."""

    def close(self) -> None:
        """Give memory back."""


Build = Callable[[int, torch.device], Trainer]  # of outputs and device


def draw_scenes(batch: int, size: int, outputs: int, on_gpu: bool) -> Scenes:
    """Seeded square scenes: smooth images, labels in blocks, a twelfth of them ignored."""
    from fcn_dist.labels import IGNORE_LABEL

    random = torch.Generator().manual_seed(0)
    drawn = min(batch, 64)  # the rest are the same again
    coarse = torch.rand(drawn, 3, 8, 8, generator=random) * 255
    images = F.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8).permute(0, 2, 3, 1)
    blocks = torch.randint(0, outputs, (drawn, 1, 12, 12), generator=random).float()
    blocks[..., 0, :] = IGNORE_LABEL
    targets = F.interpolate(blocks, (size, size), mode="nearest")[:, 0].to(torch.uint8)
    which = torch.arange(batch) % drawn
    return Scenes(images.contiguous()[which], targets[which], IGNORE_LABEL, on_gpu)


def measure(build: Build, device: str, batch: int, size: int, outputs: int, steps: int, warmup: int) -> dict[str, Any]:
    """Times of `steps` steps after `warmup`, and the memory they need."""
    place = torch.device(device)
    on_gpu = place.type == "cuda"
    before = resident("VmRSS")
    trainer = build(outputs, place)
    inputs = trainer.prepare(draw_scenes(batch, size, outputs, on_gpu))
    times, cpu_times, losses = timed(trainer, inputs, steps, warmup, on_gpu)
    if on_gpu:
        memory = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    else:
        memory = {"resident": resident("VmHWM") - before}
    middle = median(times)
    return {
        "step": middle,
        "images/s": batch / middle,
        "flops": trainer.flops((size, size)),
        "CPU s": median(cpu_times),
        "steps": times,
        "losses": losses,
        **memory,
    }


def timed(
    trainer: Trainer, inputs: Any, steps: int, warmup: int, on_gpu: bool
) -> tuple[list[float], list[float], list[float]]:
    """Seconds, seconds of all cores, and losses of `steps` steps one by one, after `warmup` that are not looked at."""
    times, cpu_times, losses = [], [], []
    for number in range(warmup + steps):
        if on_gpu:
            torch.cuda.synchronize()
        began, cpu_began = perf_counter(), process_time()
        loss = trainer.step(inputs)
        if on_gpu:
            torch.cuda.synchronize()
        if number >= warmup:
            times.append(perf_counter() - began)
            cpu_times.append(process_time() - cpu_began)
            losses.append(float(loss))
    return times, cpu_times, losses


def largest(
    build: Build,
    compiled: bool,
    budgets: list[int],
    size: int,
    outputs: int,
    steps: int,
    warmup: int,
    in_whole: bool = True,
) -> dict[str, Any]:
    """The largest batch in each of `budgets` GB of GPU memory and, if `in_whole`, in all there is; images a second
    at the last of these.

    A batch that fits has trained two steps in memory that CUDA limits to the budget, less what the process holds
    besides torch's own. A compiled network starts from the batch of one that is not.
    """
    search = Search(build, size, outputs)
    total = torch.cuda.mem_get_info()[1]
    batches: dict[str, int] = {}
    found = 1
    for budget in sorted(budgets):
        if budget * GB > total:
            continue
        search.limit(budget * GB)
        found = max(1, largest_that_fits(search.fits, found))
        batches[str(budget)] = found if search.fits(found) else 0
    if in_whole:
        search.limit(total)
        found = largest_that_fits(search.fits, found)
    whole = found if in_whole else None
    while found:
        try:
            trainer = search.trainer()
            if compiled:
                trainer.compile()
            inputs = trainer.prepare(draw_scenes(found, size, outputs, on_gpu=True))
            times, *_ = timed(trainer, inputs, steps, warmup, on_gpu=True)
        except RuntimeError as error:
            search.forget(error)
            found = int(found * (1 - TOLERANCE)) if found > 1 / TOLERANCE else found - 1
            continue
        return {
            "batches": batches,
            "whole": whole,
            "batch": found,
            "step": median(times),
            "images/s": found / median(times),
            "flops": trainer.flops((size, size)),
            "stopped by": search.stopped_by,
        }
    return {"batches": batches, "whole": whole and 0, "stopped by": search.stopped_by}


class Search:
    """Tries batches in limited GPU memory, with one trainer for as long as none fails."""

    def __init__(self, build: Build, size: int, outputs: int) -> None:
        self.stopped_by: list[str] = []  # what was said, other than that memory was out
        self._build, self._size, self._outputs = build, size, outputs
        self._device = torch.device("cuda")
        self._trainer: Trainer | None = None

    def limit(self, budget: float) -> None:
        """Let torch hold no more than `budget` bytes, less what the device holds besides."""
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        besides = total - free - torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (budget - besides) / total)))

    def fits(self, batch: int) -> bool:
        """Whether two steps can be trained, after a smallest one that makes the optimizer's state."""
        try:
            trainer = self.trainer()
            inputs = trainer.prepare(draw_scenes(batch, self._size, self._outputs, on_gpu=True))
            timed(trainer, inputs, steps=2, warmup=0, on_gpu=True)
        except RuntimeError as error:
            self.forget(error)
            return False
        return True

    def trainer(self) -> Trainer:
        """The one there is, or a new one."""
        if self._trainer is None:
            gc.collect()
            torch.cuda.empty_cache()  # by now no frame holds what broke off
            self._trainer = self._build(self._outputs, self._device)
            self._trainer.step(self._trainer.prepare(draw_scenes(1, self._size, self._outputs, on_gpu=True)))
        return self._trainer

    def forget(self, error: RuntimeError) -> None:
        """Drop the trainer: a step that broke off may have left gradients halfway."""
        said = str(error).strip().partition("\n")[0]
        if not any(words in str(error) for words in NO_ROOM):
            self.stopped_by.append(said)
        error.__traceback__ = error.__context__ = None  # they hold the activations
        if self._trainer is not None:
            self._trainer.close()
        self._trainer = None


def largest_that_fits(fits: Callable[[int], bool], start: int) -> int:
    """By doubling from `start` until one does not fit, then by halving the gap to a few per cent; 0 if none does."""
    low, high = 0, start
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    if high > MOST:
        return low
    while high - low > max(1, TOLERANCE * low):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def resident(line: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(words.split()[1]) << 10 for words in status if words.startswith(f"{line}:"))
