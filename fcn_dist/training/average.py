"""The exponential moving average of the weights (train.ema): each rank averages the masters that it updates.

The averages lie in the optimizer's own state, beside its moments: DeepSpeed's files hold them, and whoever lays a state
out anew carries them along. Buffers are not averaged: what goes with the averaged weights are those of training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fcn_dist.checkpoints.trainingstate import AVERAGE_KEY
from fcn_dist.errors import UserError
from fcn_dist.training.engine import Engine
from fcn_dist.training.holders import rewriting, wrapper_of


class WeightAverage:
    """What `decay` keeps of an average at every update, the rest being the masters; None: there is no average."""

    def __init__(self, engine: Engine, decay: float | None) -> None:
        """Find the masters of `engine`. Raises UserError if they are not where they can be averaged."""
        self.decay, self._engine = decay, engine
        self._masters: list[Tensor] = []
        self._averages: list[Tensor] = []
        if decay is None:
            return
        cure = "set train.ema=null"
        self._wrapper = wrapper_of(engine, cure)
        for key in ("offload_optimizer", "offload_param"):
            offload = engine.config.get("zero_optimization", {}).get(key) or {}
            if offload.get("device") == "nvme":
                raise UserError(
                    f"train.ema is {decay}, and zero_optimization.{key} moves weights to NVMe; they must be in memory "
                    f"to be averaged; {cure}, or offload to the CPU"
                )
        self._masters = [holder.tensor for holder in self._wrapper.holders(engine)]
        for master in self._masters:
            if master.dtype != torch.float32:
                raise UserError(
                    f"train.ema is {decay}, and this configuration keeps masters in {master.dtype}, which loses what "
                    f"an update adds to an average; float32 ones are needed; {cure}, or keep float32 masters"
                )

    def begin(self) -> None:
        """Go on with the averages of the state that was restored, or begin with the masters as they are."""
        state = self._engine.basic_optimizer.state
        if self.decay is None:
            for own in state.values():
                own.pop(AVERAGE_KEY, None)
            return
        restored = [state.get(master, {}).get(AVERAGE_KEY) for master in self._masters]
        self._averages = [
            master.detach().clone() if average is None else average
            for master, average in zip(self._masters, restored, strict=True)
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Add the masters of the step that was just taken; a step that was skipped adds nothing."""
        if self.decay is None or not self._engine.was_step_applied():
            return
        decay = decay_after(self._engine.global_steps - self._engine.skipped_steps, self.decay)
        torch._foreach_lerp_(self._averages, self._masters, 1 - decay)
        state = self._engine.basic_optimizer.state
        for master, average in zip(self._masters, self._averages, strict=True):
            # Only now: Adam makes its moments in the first update where a state is empty.
            state[master][AVERAGE_KEY] = average

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The engine computes with the averaged weights in the block, and after it with its own, to the bit.

        All ranks call it. A block that raises ends the run, and the weights stay as they are then: ranks would wait
        for each other in vain.
        """
        self._exchange()
        yield
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Masters for averages, and averages for masters."""
        if self.decay is None:
            return
        with rewriting(self._engine, self._wrapper):
            for master, average in zip(self._masters, self._averages, strict=True):
                own = master.detach().clone()
                master.copy_(average)
                average.copy_(own)


def decay_after(updates: int, decay: float) -> float:
    """The decay of update number `updates`, from 1: less than `decay` at first, so that first weights are forgotten.

    min(decay, (1 + n) / (10 + n)), as TensorFlow's ExponentialMovingAverage with num_updates has it.
    """
    return min(decay, (1 + updates) / (10 + updates))
