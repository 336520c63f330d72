"""What the loop hands to backward: one loss for a global batch, however it is cut."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_dist.config import DataConfig, Recipe, ScheduleConfig, TrainConfig
from fcn_dist.data.loader import Batch
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.ranks import BatchPlan, Rank
from fcn_dist.training.loop import Trainer
from fcn_dist.training.phases import Phase, PhaseClock

RANKS, MICRO_BATCHES, IMAGES = 2, 3, 2
SIZE = (16, 24)


class Engine:
    """Averages gradients over ranks and accumulation, as DeepSpeed does; its network is one coarse map of scores."""

    def __init__(self) -> None:
        self.scores = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def __call__(self, images: Tensor, **_: object) -> Tensor:
        return self.scores.expand(len(images), -1, -1, -1)

    def fp16_enabled(self) -> bool:
        return False

    def backward(self, loss: Tensor) -> None:
        (loss / (RANKS * MICRO_BATCHES)).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Counted by DeepSpeed."""


def batches() -> list[list[Batch]]:
    """Of each rank; how much is labelled differs from image to image."""
    random = torch.Generator().manual_seed(1)
    of_ranks: list[list[Batch]] = []
    for _ in range(RANKS):
        of_ranks.append([])
        for _ in range(MICRO_BATCHES):
            targets = torch.randint(0, 4, (IMAGES, *SIZE), generator=random).to(torch.uint8)
            for image in targets:
                image[: int(torch.randint(0, SIZE[0], (), generator=random))] = IGNORE_LABEL
            labelled = int((targets != IGNORE_LABEL).sum())
            of_ranks[-1].append(Batch(torch.zeros(IMAGES, *SIZE, 3, dtype=torch.uint8), targets, labelled, (0, 1)))
    return of_ranks


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_the_gradient_is_that_of_the_whole_global_batch(kind: Any) -> None:
    """By torch's own loss of full-size scores: a mean over labelled pixels, or their sum and a mean over images."""
    engine, of_ranks = Engine(), batches()
    everything = torch.cat([batch.targets for some in of_ranks for batch in some]).long()
    labelled, images = int((everything != IGNORE_LABEL).sum()), len(everything)
    plan = BatchPlan(images, IMAGES, MICRO_BATCHES, RANKS)
    recipe = Recipe(DataConfig(), schedule=ScheduleConfig(steps=1), train=TrainConfig(global_batch=images, loss=kind))
    logged: list[Tensor] = []
    seen: list[Phase] = []
    clock = PhaseClock(0)
    for some in of_ranks:
        job: Any = SimpleNamespace(
            recipe=recipe,
            config=SimpleNamespace(plan=plan),
            rank=Rank(0, RANKS),
            device=torch.device("cpu"),
            stride=8,
            offset=0,
        )
        check: Any = SimpleNamespace(watch=lambda loss: loss)
        layers: Any = SimpleNamespace(due=lambda step: step == 1, look=lambda: seen.append(clock.now.phase))
        meter: Any = SimpleNamespace(add_losses=logged.extend)
        others: Any = dict.fromkeys(
            ("intake", "shortage", "average", "pace", "progress", "journal", "scorer", "keeper")
        )
        trainer = Trainer(job, engine, check=check, meter=meter, layers=layers, clock=clock, **others)
        trainer.accumulate(1, labelled, some)

    wanted = engine.scores.detach().clone().requires_grad_()
    full = F.interpolate(wanted, scale_factor=8, mode="bilinear").expand(images, -1, -1, -1)
    loss = F.cross_entropy(full, everything, ignore_index=IGNORE_LABEL, reduction="sum")
    (loss / (labelled if kind == "mean" else images)).backward()  # type: ignore[no-untyped-call]
    assert engine.scores.grad is not None and wanted.grad is not None
    torch.testing.assert_close(engine.scores.grad, wanted.grad)
    assert seen == [Phase.LOGGING] * RANKS, "once a step, and no part of backward"
    # What is logged is the mean over labelled pixels either way.
    torch.testing.assert_close(torch.stack(logged).sum(), (loss / labelled).detach())
