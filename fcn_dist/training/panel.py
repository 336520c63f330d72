"""What people look at while a run trains and when it ends: a standing in, a panel or a table out."""

import time

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fcn_dist.errors import counted
from fcn_dist.sizes import show_size
from fcn_dist.training.standing import Standing

SPARKS, SPARK_POINTS = "▁▂▃▄▅▆▇█", 24
TWO_COLUMNS_FROM, WIDEST = 78, 100  # characters


def panel(standing: Standing, headline: str, bar: RenderableType, width: int, sparks: bool = True) -> Panel:
    """The bar, and all figures there are, in two columns where there is room; `sparks` need a screen with Unicode."""
    training, machine, news = _training(standing, sparks), _machine(standing), _news(standing)
    if width >= TWO_COLUMNS_FROM:
        both = Table.grid(padding=(0, 4))
        both.add_row(_rows(training), _rows(machine))
        body: list[RenderableType] = [both, _rows(news)]
    else:
        body = [_rows([*training, *machine, *news])]
    return Panel(
        Group(bar, Text(), *body), title=Text(headline, overflow="ellipsis"), title_align="left", width=min(width, 100)
    )


def _rows(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True, min_width=9)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _training(standing: Standing, sparks: bool) -> list[tuple[str, str]]:
    figures = standing.figures
    if not figures:
        return [("loss", "no step is logged yet")]
    loss = f"{standing.losses[-1]:.4f} smoothed" if standing.losses else "-"
    if standing.losses and sparks:
        loss = f"{loss}  {spark(standing.losses)}"
    if standing.losses and figures["loss"] is None:
        loss = f"not finite; before, {loss}"
    rows = [("epoch", f"{figures['epoch']:.2f}"), ("loss", loss), ("rate", f"{figures['learning_rate']:.2e}")]
    if figures["gradient_norm"] is not None:
        rows.append(("gradient", f"{figures['gradient_norm']:.3g}"))
    if figures["loss_scale"] is not None:
        rows.append(("scale", f"{figures['loss_scale']:,.0f}"))
    return rows


def _machine(standing: Standing) -> list[tuple[str, str]]:
    figures = standing.figures
    if not figures:
        return []
    each = f" ({figures['images_per_second'] / standing.world_size:.1f} a rank)" if standing.world_size > 1 else ""
    rows = [
        ("speed", f"{figures['images_per_second']:.1f} images/s{each}"),
        ("waiting", f"{100 * figures['data_wait']:.0f} % for data"),
        ("memory", show_size(figures["peak_memory"])),
    ]
    if figures["mfu"] is not None:
        rows.append(("MFU", f"{100 * figures['mfu']:.0f} %"))
    return rows


def _news(standing: Standing) -> list[tuple[str, str]]:
    rows = []
    if standing.last_score and standing.best_score:
        (step, score), (best_step, best) = standing.last_score, standing.best_score
        of_best = "the best" if best_step == step else f"the best {100 * best:.2f} % at step {best_step}"
        rows.append(("evaluated", f"{100 * score:.2f} % mean IoU at step {step}, {of_best}"))
    if standing.saved:
        step, when = standing.saved
        rows.append(("saved", f"step {step}, {age(time.time() - when)} ago"))
    if standing.straggler:
        step, what = standing.straggler
        rows.append(("slowest", f"{what} (step {step})"))
    if skipped := standing.skipped():
        rows.append(("skipped", skipped))
    return rows


def spark(values: list[float]) -> str:
    """All values as a line of bars, neighbours averaged where they are more than `SPARK_POINTS`."""
    count = min(len(values), SPARK_POINTS)
    groups = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(SPARKS[min(len(SPARKS) - 1, int(len(SPARKS) * (mean - low) / span))] for mean in means)


def age(seconds: float) -> str:
    """Such as "4 min", or "2 h 10 min"."""
    minutes = int(seconds) // 60
    if minutes < 1:
        return f"{max(0, int(seconds))} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def summary(standing: Standing, sparks: bool = True) -> Table:
    """What came of this start of the run."""
    table = Table(show_header=False, title="summary", title_justify="left")
    trained = counted(standing.step - standing.first_step, "step")
    took = age(time.time() - standing.began)
    table.add_row("trained", f"{trained} in {took}, to step {standing.step} of {standing.steps}")
    for name, value in [*_training(standing, sparks), *_machine(standing), *_news(standing)]:
        table.add_row(name, Text(value))
    return table
