"""Progress of training on rank 0: a live line in a terminal, plain lines elsewhere; and of bytes on their way."""

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from fcn_dist.sizes import show_size


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
        loss = "-" if figures["loss"] is None else f"{figures['loss']:.4f}"
        text = (
            f"epoch {figures['epoch']:.2f}  loss {loss}  lr {figures['learning_rate']:.2e}  "
            f"{figures['images_per_second']:.1f} img/s  waiting {100 * figures['data_wait']:.0f} %  "
            f"memory {show_size(figures['peak_memory'])}"
        )
        if figures["mfu"] is not None:
            text += f"  MFU {100 * figures['mfu']:.0f} %"
        self._progress.update(self._task, figures=text)
        if not self._console.is_terminal:
            self.say(f"step {done}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        """One line of news."""
        if self._shown:
            self._progress.console.print(text)


def transfer_progress() -> Progress:
    """A bar of bytes with their rate and the time left, on standard error; silent where that is no terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


class RateColumn(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        """Empty until two steps have been seen."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


def count_progress(shown: bool = True) -> Progress:
    """A bar of things done with their rate and the time left, on standard error; silent where that is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown or not sys.stderr.isatty(),
        transient=True,
    )
