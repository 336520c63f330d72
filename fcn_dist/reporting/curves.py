"""How a run's figures went with its steps, or those of several runs in one picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from fcn_dist.errors import counted
from fcn_dist.reporting.charts import INK, MUTED, SERIES, drawing, logarithmic, new_chart, steps_below, to_svg
from fcn_dist.reporting.markup import Html, element, figure, join, note
from fcn_dist.reporting.rundata import Line, RunData, Values, values

POINTS = 400  # of a curve; those of longer ones are means of as many neighbours as it takes
SMOOTHED_FROM = 60  # points, from which on a mean of neighbours says more than each
HEIGHT = 2.1  # inches
MARKED = "loss"
DASHES = (0, (4, 2))  # of the runs for which there is no colour left


@dataclass(frozen=True)
class Curve:
    """One chart: which figure of which lines."""

    name: str  # unique on the page
    title: str
    keys: tuple[str, ...]
    evaluated: bool = False  # of evaluations, not of steps
    factor: float = 1.0
    logarithmic: bool = False
    from_zero: bool = False
    smoothed: bool = False

    def lines(self, run: RunData) -> list[Line]:
        return run.scored if self.evaluated else run.trained

    def series(self, run: RunData) -> tuple[Values, Values]:
        """Steps and figures, with gaps where there were none."""
        lines = self.lines(run)
        figures = values(lines, *self.keys) * self.factor
        if self.logarithmic:
            figures[~(figures > 0)] = np.nan
        return values(lines, "step"), figures

    def is_smoothed(self, run: RunData) -> bool:
        """Whether there are so many figures that their mean is drawn before them."""
        return self.smoothed and np.isfinite(thinned(*self.series(run))[1]).sum() >= SMOOTHED_FROM

    def crosses(self, run: RunData) -> Values:
        """Steps that have no figure where others have one: it was not finite.

        A line tells of the loss of several steps, so those that were skipped are told of one by one.
        """
        steps, figures = self.series(run)
        found = np.isfinite(figures)
        if self.name == MARKED:
            return np.union1d(steps[~found], run.skipped)
        return steps[~found] if found.any() else steps[:0]


CURVES = (
    Curve(MARKED, "Loss", ("loss",), smoothed=True),
    Curve("mean-iou", "Validation: mean IoU, %", ("official", "mean_iou"), evaluated=True, factor=100),
    Curve("accuracy", "Validation: pixel accuracy, %", ("official", "pixel_accuracy"), evaluated=True, factor=100),
    Curve("rate", "Learning rate", ("learning_rate",), from_zero=True),
    Curve("norm", "Gradient norm", ("gradient_norm",), logarithmic=True, smoothed=True),
    Curve("speed", "Images per second, all ranks", ("images_per_second",), from_zero=True),
    Curve("memory", "Peak memory of a rank, GB", ("peak_memory",), factor=1e-9, from_zero=True),
    Curve("wait", "Waiting for data, % of the time", ("data_wait",), factor=100, from_zero=True),
)


def curves(runs: Sequence[RunData]) -> Html:
    """All charts; of those that have nothing to show, a line that says so."""
    drawn, missing = [], []
    for curve in CURVES:
        if any(np.isfinite(curve.series(run)[1]).any() for run in runs):
            drawn.append(figure(curve.title, draw(curve, runs), caption(curve, runs)))
        else:
            missing.append(curve.title.partition(",")[0])
    parts = [legend(runs)] if len(runs) > 1 else []
    if drawn:
        parts.append(element("div", *drawn, class_="charts"))
    if missing:
        parts.append(note(f"Without a finite figure on record: {'; '.join(missing)}."))
    if any(run.recorded for run in runs) and not any(run.scored for run in runs):
        setting = element("code", "evaluate.every=N")
        parts.append(note("No evaluation is on record yet; ", setting, " gives one every N steps."))
    return join(parts)


def legend(runs: Sequence[RunData]) -> Html:
    """Which colour is which run."""
    lines = [f"line series-{n % len(SERIES)}{' dashed' * (n >= len(SERIES))}" for n in range(len(runs))]
    entries = [element("li", element("span", class_=line), run.name) for line, run in zip(lines, runs, strict=True)]
    return element("ul", *entries, class_="legend")


def draw(curve: Curve, runs: Sequence[RunData]) -> Html:
    """One chart."""
    with drawing(curve.name):
        drawn, axes = new_chart(HEIGHT)
        for number, run in enumerate(runs):
            _line(axes, curve, run, SERIES[number % len(SERIES)], dashed=number >= len(SERIES))
        # All charts have the same steps, whatever of them there is no figure of.
        every = [step for run in runs for step in run.steps_on_record]
        steps_below(axes, min(every), max(every))
        if curve.from_zero:
            axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
        if curve.logarithmic:
            logarithmic(axes)
        if len(runs) == 1:
            _restarts(axes, runs[0])
            if curve.name == MARKED:
                _marks(axes, values(runs[0].scored, "step"), 0.03, "^", INK)
        return to_svg(drawn, describe(curve, runs))


def _line(axes: Axes, curve: Curve, run: RunData, colour: str, dashed: bool) -> None:
    steps, figures = thinned(*curve.series(run))
    dots = dots_of(figures)
    if curve.is_smoothed(run):
        axes.plot(steps, figures, color=colour, alpha=0.3, linewidth=0.8)
        figures = smooth(figures, len(figures) // 20)
    axes.plot(steps, figures, color=colour, marker=dots, markersize=3, linestyle=DASHES if dashed else "-")
    _marks(axes, curve.crosses(run), 0.97, "x", colour)


def dots_of(figures: Values) -> str | None:
    """The marker of each figure, where there are so few that lines alone may not show them."""
    return "o" if np.isfinite(figures).sum() <= 25 else None


def _marks(axes: Axes, steps: Values, height: float, shape: str, colour: str) -> None:
    """At these steps, at a share of the chart's height."""
    place = axes.get_xaxis_transform()
    axes.plot(steps, np.full(len(steps), height), shape, color=colour, markersize=4, transform=place)


def _restarts(axes: Axes, run: RunData) -> None:
    for start in restarts(run):
        axes.axvline(start["step"], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))


def restarts(run: RunData) -> list[Line]:
    """Starts that went on from a step; a run whose first start left no checkpoint begins anew."""
    return [start for start in run.starts if start["step"]]


def caption(curve: Curve, runs: Sequence[RunData]) -> str | None:
    """What the marks in a chart mean, where there are any."""
    said = []
    if len(runs) == 1 and curve.name == MARKED and runs[0].scored:
        said.append("Triangles: evaluations.")
    if len(runs) == 1 and curve.name == MARKED and restarts(runs[0]):
        said.append("Dotted lines, here and below: restarts.")
    if any(curve.is_smoothed(run) for run in runs):
        said.append("Faint: as logged; strong: mean of neighbours.")
    crosses = sum(len(curve.crosses(run)) for run in runs)
    if crosses:
        above = " above 0" if curve.logarithmic else ""
        said.append(f"Crosses: {counted(crosses, 'step')} without a finite figure{above}.")
    return " ".join(said) or None


def describe(curve: Curve, runs: Sequence[RunData]) -> str:
    """A chart in words."""
    told = []
    for run in runs:
        steps, figures = curve.series(run)
        found = np.isfinite(figures)
        if found.any():
            first, final = figures[found][0], figures[found][-1]
            told.append(
                f"{run.name}: {first:.4g} at step {steps[found][0]:g}, {final:.4g} at step {steps[found][-1]:g}"
            )
        if len(crosses := curve.crosses(run)):
            told.append(f"{counted(len(crosses), 'step')} without a finite figure, the last of them {crosses[-1]:g}")
    return f"{curve.title}. {'; '.join(told)}"


def thinned(steps: Values, figures: Values) -> tuple[Values, Values]:
    """At most `POINTS` of each: means of equally many neighbours, gaps left out."""
    each = math.ceil(len(steps) / POINTS)
    if each <= 1:
        return steps, figures
    starts = range(0, len(steps), each)
    parts = [figures[start : start + each] for start in starts]
    means = [float(np.nanmean(part)) if np.isfinite(part).any() else np.nan for part in parts]
    return np.array([steps[start : start + each].mean() for start in starts]), np.array(means)


def smooth(figures: Values, each: int) -> Values:
    """The mean of the `each` before and after, and itself; of those that there are. A gap stays one."""
    found = np.isfinite(figures)
    sums = np.cumsum(np.concatenate([[0.0], np.where(found, figures, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], found]))
    first = np.maximum(np.arange(len(figures)) - each, 0)
    final = np.minimum(np.arange(len(figures)) + each + 1, len(figures))
    total = counts[final] - counts[first]
    means: Values = (sums[final] - sums[first]) / np.maximum(total, 1)
    means[~found] = np.nan
    return means
