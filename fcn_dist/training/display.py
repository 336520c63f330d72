"""What rank 0 shows of training: a panel in a terminal, plain lines elsewhere, and at the end a table."""

import os
import sys
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fcn_dist.sizes import show_size
from fcn_dist.training.panel import WIDEST, panel, summary
from fcn_dist.training.standing import Standing

REFRESHES = 2  # a second
ESTIMATED_OVER = 600.0  # seconds of steps from which the time left is reckoned


def _print_past_the_panel() -> None:
    """A forked process has no panel, and its lock may be held for ever by a thread that was not forked."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, getattr(stream, "rich_proxied_file", stream))


os.register_at_fork(after_in_child=_print_past_the_panel)


class TrainingDisplay:
    """Shows what the journal is told; silent on ranks other than 0. A context manager."""

    def __init__(
        self, steps: int, first_step: int, world_size: int = 1, headline: str = "", shown: bool = True
    ) -> None:
        self._shown, self._headline = shown, headline
        self._console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
        self._standing = Standing(steps, world_size, first_step)
        self._steps = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            expand=True,
            speed_estimate_period=ESTIMATED_OVER,
        )
        self._task = self._steps.add_task("training", total=steps, completed=first_step)
        self._live = Live(
            get_renderable=self._panel, console=self._console, refresh_per_second=REFRESHES, transient=True
        )

    def __enter__(self) -> "TrainingDisplay":
        if self._headline:
            self.say(self._headline)
        if self._shown and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._shown and self._standing.figures:
            self._console.print(summary(self._standing), soft_wrap=False)

    def step(self, done: int) -> None:
        """`done` steps are trained."""
        self._steps.update(self._task, completed=done)

    def hear(self, line: dict[str, Any]) -> None:
        """A line of the journal."""
        self._standing.hear(line)

    def figures(self, done: int) -> None:
        """The figures of the last interval, where no panel shows them."""
        if self._console.is_terminal:
            return
        figures = self._standing.figures
        loss = "-" if figures["loss"] is None else f"{figures['loss']:.4f}"
        text = (
            f"step {done}/{self._standing.steps}  epoch {figures['epoch']:.2f}  loss {loss}  "
            f"lr {figures['learning_rate']:.2e}  {figures['images_per_second']:.1f} img/s  "
            f"waiting {100 * figures['data_wait']:.0f} %  memory {show_size(figures['peak_memory'])}"
        )
        self.say(text if figures["mfu"] is None else f"{text}  MFU {100 * figures['mfu']:.0f} %")

    def say(self, text: str) -> None:
        """One line of news."""
        if self._shown:
            self._console.print(text)

    def _panel(self) -> RenderableType:
        return panel(self._standing, self._headline.partition("\n")[0], self._steps, min(self._console.width, WIDEST))
