"""The figures of a run: what steps report in, what is logged every so many steps out."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from fcn_dist.model.devices import peak_flops, peak_memory
from fcn_dist.model.flops import training_flops
from fcn_dist.training.collective import largest_over_ranks, sum_over_ranks
from fcn_dist.training.engine import Engine, gradient_norm, loss_scale
from fcn_dist.training.job import Job
from fcn_dist.training.phases import TRAINING_PHASES, Phase, PhaseClock


@dataclass
class Meter:
    """Figures of the steps since they were last read."""

    device: torch.device
    clock: PhaseClock
    _losses: list[list[torch.Tensor]] = field(default_factory=list)  # of finite steps
    _of_this_step: list[list[torch.Tensor]] = field(default_factory=list)
    _steps: int = 0
    _not_finite: int = 0  # of these steps
    _before: tuple[float, float] = (0.0, 0.0)

    def add_losses(self, shares: list[torch.Tensor]) -> None:
        """One micro-batch's share of a global batch's loss, and of that of the auxiliary heads if there are any.

        Both stay on the device until they are read.
        """
        self._of_this_step.append(shares)

    def forget_step(self) -> None:
        """The step is done again from the start."""
        self._of_this_step = []

    def add_step(self, finite: bool) -> None:
        """A step is done; the losses of one that was not finite say nothing."""
        self._steps += 1
        if finite:
            self._losses += self._of_this_step
        else:
            self._not_finite += 1
        self._of_this_step = []

    def read(self, job: Job, engine: Engine, done: int, rate: float) -> dict[str, Any]:
        """The figures over all ranks, and a fresh start. All ranks call it."""
        losses = [torch.stack(shares).sum() for shares in zip(*self._losses, strict=True)]
        # Waits for the device, so that the time below is the steps' own.
        sums = [float(sum_over_ranks(loss, job.rank)) for loss in losses]
        finite = self._steps - self._not_finite
        self.clock.enter(Phase.LOGGING)  # which adds up the seconds until now
        elapsed, waited = (now - before for now, before in zip(self._seconds(), self._before, strict=True))
        waited = float(sum_over_ranks(torch.tensor([waited], device=self.device), job.rank))
        memory = torch.tensor([peak_memory(self.device)], device=self.device)
        images_per_second = self._steps * job.config.plan.global_batch / elapsed
        norm = gradient_norm(engine)
        figures = {
            "epoch": done * job.config.plan.global_batch / job.stream.num_samples,
            "loss": sums[0] / finite if finite else None,
            **({"auxiliary_loss": sums[1] / finite if finite else None} if job.recipe.train.auxiliary else {}),
            "not_finite_steps": self._not_finite,
            "learning_rate": rate,
            "gradient_norm": norm if norm is not None and math.isfinite(norm) else None,
            "loss_scale": loss_scale(engine),
            "skipped_steps": int(engine.skipped_steps),
            "images_per_second": images_per_second,
            "data_wait": waited / job.rank.world_size / elapsed,
            "mfu": flops_utilisation(job, engine, images_per_second),
            "peak_memory": int(largest_over_ranks(memory, job.rank)),  # bytes, of the rank that holds most
        }
        self._losses, self._steps, self._not_finite, self._before = [], 0, 0, self._seconds()
        return figures

    def _seconds(self) -> tuple[float, float]:
        """Of training, and in it of waiting for data, from the start on."""
        return sum(self.clock.seconds[phase] for phase in TRAINING_PHASES), self.clock.seconds[Phase.DATA]


def flops_utilisation(job: Job, engine: Engine, images_per_second: float) -> float | None:
    """The share of what the devices can do at most that goes into the network's arithmetic.

    None where that most is not known: on CPU, in float32, on devices that are not in the table.
    """
    if job.device.type != "cuda" or job.config.precision == "float32":
        return None
    peak = peak_flops(torch.cuda.get_device_name(job.device))
    flops = training_flops(engine.module, job.recipe.data.crop)
    return images_per_second * flops / (job.rank.world_size * peak) if peak else None
