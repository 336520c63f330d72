"""How a run's figures went with its steps, or those of several runs in one picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fcn_dist.reporting.charts import INK, MUTED, SERIES, drawing, logarithmic, new_chart, to_svg
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
        parts.append(note(f"Not on record: {'; '.join(missing)}."))
    if not any(run.scored for run in runs):
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
        low, high = axes.get_xlim()
        if high - low < 2:  # one step alone, around which a chart would have fractions of steps
            axes.set_xlim(round((low + high) / 2) - 1, round((low + high) / 2) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        if curve.from_zero:
            axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
        if curve.logarithmic:
            logarithmic(axes)
        if len(runs) == 1:
            _restarts(axes, runs[0])
            if curve.name == MARKED:
                marks = [int(line["step"]) for line in runs[0].scored]
                axes.plot(
                    marks, [0.03] * len(marks), "^", color=INK, markersize=4, transform=axes.get_xaxis_transform()
                )
        return to_svg(drawn, describe(curve, runs))


def _line(axes: Axes, curve: Curve, run: RunData, colour: str, dashed: bool) -> None:
    steps, figures = thinned(*curve.series(run))
    dots = "o" if np.isfinite(figures).sum() <= 25 else None
    if curve.smoothed and len(figures) >= SMOOTHED_FROM:
        axes.plot(steps, figures, color=colour, alpha=0.3, linewidth=0.8)
        figures, dots = smooth(figures, len(figures) // 20), None
    axes.plot(steps, figures, color=colour, marker=dots, markersize=3, linestyle=DASHES if dashed else "-")


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
    if curve.smoothed and any(min(len(curve.lines(run)), POINTS) >= SMOOTHED_FROM for run in runs):
        said.append("Faint: as logged; strong: mean of neighbours.")
    nulls = sum(int(np.isnan(curve.series(run)[1]).sum()) for run in runs)
    if nulls:
        said.append(f"{nulls} figures are null on record, or not above 0, and left out.")
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
