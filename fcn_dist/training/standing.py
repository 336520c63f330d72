"""Where a run stands: its journal's lines in, the newest of each figure out."""

import time
from dataclasses import dataclass, field
from typing import Any

SMOOTHING = 0.9  # of the loss: what a figure keeps of those before


@dataclass
class Standing:
    """The newest of each figure, the loss so far, and the best evaluation."""

    steps: int
    world_size: int
    first_step: int = 0
    step: int = field(init=False)  # the newest that is trained
    began: float = field(default_factory=time.time)
    figures: dict[str, Any] = field(default_factory=dict)  # of the newest event "train"
    losses: list[float] = field(default_factory=list)  # smoothed
    last_score: tuple[int, float] | None = None  # step and mean IoU
    best_score: tuple[int, float] | None = None
    saved: tuple[int, float] | None = None  # step and when
    straggler: tuple[int, str] | None = None  # step and what
    damaged: int = 0  # samples replaced
    skipped_steps: int = 0
    _weight: float = 0.0

    def __post_init__(self) -> None:
        self.step = self.first_step

    def hear(self, line: dict[str, Any]) -> None:
        """Take in a line of the journal; those of a run before its restart are told again."""
        step = line["step"]
        match line["event"]:
            case "train":
                self.figures = line
                self.skipped_steps = line["skipped_steps"]
                if line["loss"] is not None:
                    self._smooth(line["loss"])
            case "evaluate":
                self.last_score = (step, line["official"]["mean_iou"])
                if self.best_score is None or self.last_score[1] > self.best_score[1]:
                    self.best_score = self.last_score
            case "checkpoint":
                self.saved = (step, line["time"])
            case "straggler":
                what = "waits for data" if line["reason"] == "data" else "takes longer to compute"
                self.straggler = (step, f"rank {line['rank']} on {line['host']} {what}")
            case "bad_sample":
                self.damaged += 1
            case "not_finite":
                self.skipped_steps += 1  # until the next figures, which count those of the whole run

    def _smooth(self, loss: float) -> None:
        """A mean in which each figure weighs a tenth less than the one after it."""
        before = self.losses[-1] * self._weight if self.losses else 0.0
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.losses.append((SMOOTHING * before + (1 - SMOOTHING) * loss) / self._weight)

    def skipped(self) -> str:
        """What did not become part of training, empty if all did."""
        parts = [
            f"{count} {name}{'s' * (count > 1)}"
            for count, name in ((self.damaged, "damaged sample"), (self.skipped_steps, "step"))
            if count
        ]
        return " and ".join(parts)
