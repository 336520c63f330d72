"""What rank 0 shows of training: a panel in a terminal, plain lines elsewhere, and at the end a table."""

import math
import os
import sys
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleRenderable, RenderableType
from rich.control import Control
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import ControlType
from rich.text import Text

from fcn_dist.sizes import show_size
from fcn_dist.training.panel import WIDEST, panel, summary
from fcn_dist.training.standing import Standing

REFRESHES = 2  # a second
ESTIMATED_OVER = 600.0  # seconds of steps from which the time left is reckoned
ECHO = 3  # columns right of the panel: a "^C" that is typed must not begin a new line


def _print_past_the_panel() -> None:
    """A forked process has no panel, and its lock may be held for ever by a thread that was not forked."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, getattr(stream, "rich_proxied_file", stream))


os.register_at_fork(after_in_child=_print_past_the_panel)


class _Screen(Console):
    """Never without its cursor, which nobody would bring back after a kill."""

    def show_cursor(self, show: bool = True) -> bool:
        """As it is."""
        return False


class _Panel(Live):
    """Also where the window has become narrower: most terminals have then broken each line of what was shown."""

    _width = 0

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Take away the lines that have come of it, and go on as ever."""
        shape, before, self._width = self._live_render._shape, self._width, self.console.width
        shown = super().process_renderables(renderables)
        if shape and self._width < before:
            width, height = shape
            more = height * (math.ceil(width / self._width) - 1)
            shown = [Control(*((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * more), *shown]
        return shown


class TrainingDisplay:
    """Shows what the journal is told; silent on ranks other than 0. A context manager."""

    def __init__(
        self, steps: int, first_step: int, world_size: int = 1, headline: str = "", shown: bool = True
    ) -> None:
        self._shown, self._headline, self._over = shown, headline, False
        self._console = _Screen(file=sys.stdout, highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
        # A console counts as a terminal as well where FORCE_COLOR says so; a dumb one cannot take a panel back.
        self._panelled = shown and sys.stdout.isatty() and not self._console.is_dumb_terminal
        self._sparks = not self._console.options.ascii_only
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
        self._live = _Panel(
            get_renderable=self._panel, console=self._console, refresh_per_second=REFRESHES, transient=True
        )

    def __enter__(self) -> "TrainingDisplay":
        if self._headline:
            self.say(self._headline)
        if self._panelled:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._live.stop()
        if self._shown and self._standing.figures:
            self._console.print(summary(self._standing, self._sparks), soft_wrap=False)

    def step(self, done: int) -> None:
        """`done` steps are trained."""
        self._standing.step = done
        self._steps.update(self._task, completed=done)

    def hear(self, line: dict[str, Any]) -> None:
        """A line of the journal."""
        self._standing.hear(line)

    def figures(self, done: int) -> None:
        """The figures of the last interval, where no panel shows them."""
        if self._panelled:
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
        if self._over:
            return Text()  # what is shown last is shown whole, even where the screen has no room for it
        width = min(self._console.width - ECHO, WIDEST)
        return panel(self._standing, self._headline.partition("\n")[0], self._steps, width, self._sparks)
