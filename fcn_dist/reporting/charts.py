"""Matplotlib's figures as SVG within a page: text stays text, and colours are the page's, whichever theme it has."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from fcn_dist.errors import UserError
from fcn_dist.reporting.markup import Html

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise UserError(
        f"a report is drawn by matplotlib, which cannot be imported ({error}); install it, with the extra that brings "
        'it: pip install "fcn-dist[report]"'
    ) from error

# Colours that stand for those of the page, see style.py.
INK, MUTED, LINE = "#00f0a0", "#00f0a1", "#00f0a2"
SERIES = tuple(f"#00f0b{number}" for number in range(8))
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES)
}
# Units of an SVG are as large as its place on the page makes them: this many across, text of this size can be read on
# a phone, where a chart is some 330 pixels wide.
WIDTH, TEXT = 3.6, 8.0  # inches of 72 units, units
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called $x$
    "font.size": TEXT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": TEXT - 0.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Figures in the block look alike; `name` is this one's own on the page, so that what it refers to is, too."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user has set for charts of their own
        matplotlib.rcParams.update({**SETTINGS, "svg.hashsalt": name})
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has fonts for more than matplotlib's own does
        yield


def new_chart(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure of so many inches, to be drawn in `drawing`."""
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.add_subplot()


def to_svg(drawn: Figure, description: str) -> Html:
    """The figure as an element of a page; `description` is what a screen reader says of it."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box, head
    # Groups are numbered in each figure alone, and nothing refers to them.
    rest = re.sub(r'<g id="[\w.]+_\d+"(/?)>', r"<g\1>", rest)
    rest = re.sub(r"(fill|stroke): (#00f0[ab]\d)", lambda found: f"{found[1]}: var({VARIABLES[found[2]]})", rest)
    rest = re.sub(r"(font-size: [\d.]+px;) font-family: [^;\"]*;", r"\1", rest)  # the page's own
    rest = re.sub(r"<style.*?</style>", "", rest, flags=re.DOTALL)  # which would be the whole page's
    rest = re.sub(r"\s*\n\s*", " ", rest)
    return Html(f'<svg {box[0]} role="img" aria-label="{escape(description)}">{rest.strip()}')


def steps_below(axes: Axes, first: float, final: float) -> None:
    """Steps on the level axis, from `first` to `final`; whole ones, even around one step alone."""
    margin = 0.05 * (final - first) or 1.0
    axes.set_xlim(first - margin, final + margin)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step")


def logarithmic(axes: Axes) -> None:
    """Powers on the upright axis, with numbers as they are: matplotlib's own would be formulas."""
    low, high = axes.get_ylim()
    axes.set_yscale("log")
    # Within a power or two, tens alone would leave the axis with hardly a number.
    between = (1.0,) if high > 100 * max(low, 1e-300) else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=between, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
