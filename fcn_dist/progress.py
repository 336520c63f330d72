"""Progress of training on rank 0: a live line in a terminal, plain lines elsewhere."""

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows steps; silent on ranks other than 0. A context manager."""

    def __init__(self, steps: int, first_step: int, shown: bool) -> None:
        self._shown = shown
        self._console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
        self._steps = steps
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not shown or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=steps, completed=first_step, figures="")

    def __enter__(self) -> "TrainingProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, done: int) -> None:
        """`done` steps are trained."""
        self._progress.update(self._task, completed=done)

    def figures(self, done: int, figures: dict[str, Any]) -> None:
        """Show the figures of the last interval."""
        text = (
            f"epoch {figures['epoch']:.2f}  loss {figures['loss']:.4f}  lr {figures['learning_rate']:.2e}  "
            f"{figures['images_per_second']:.1f} img/s  waiting {100 * figures['data_wait']:.0f} %"
        )
        self._progress.update(self._task, figures=text)
        if not self._console.is_terminal:
            self.say(f"step {done}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        """One line of news."""
        if self._shown:
            self._progress.console.print(text)
