"""How well each class is found, and which are taken for which, of what an evaluation has left."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcn_dist.deploy.confusion import row_shares
from fcn_dist.deploy.pictures import short_name
from fcn_dist.errors import counted
from fcn_dist.reporting.charts import MUTED, TEXT, drawing, new_chart, to_svg
from fcn_dist.reporting.markup import Html, element, figure, join, note, table
from fcn_dist.reporting.rundata import EVALUATION, RunData

SIDE = 4.0  # inches of the confusion matrix
NAMED = 40  # classes that can have their names beside the matrix
CONFUSIONS = 10  # that are named
TICKS = (0, 5, 20, 50, 100)  # per cent


@dataclass(frozen=True)
class Confusion:
    """Pixels of one class that were taken for another."""

    truth: str
    taken_for: str
    pixels: int
    of_class: float  # share of the true class's pixels
    of_all: float  # share of all labelled pixels


def shown_names(classes: Sequence[str]) -> list[str]:
    """Short names; whole ones where the short ones of different classes would be alike."""
    short = {name: short_name(name) for name in classes}
    shared = Counter(short.values())
    return [short[name] if shared[short[name]] == 1 else name for name in classes]


def no_evaluation(run: RunData) -> Html:
    """Why there are no classes and scenes of a run."""
    if not run.evaluation_unread:
        return note("No evaluation has left its classes and scenes in the run folder: an evaluation in training does.")
    return note(
        f"{run.folder / EVALUATION} is there and cannot be read: it is damaged, or of other classes than the run's. "
        "The next evaluation in training replaces it."
    )


def per_cent(share: float | None, digits: int = 1) -> str:
    """As people read it; "-" for what there is not."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def bars(evaluation: dict[str, Any]) -> Html:
    """Classes by IoU, each with a bar and its share of the labelled pixels; those that are nowhere come last."""
    classes = sorted(evaluation["classes"], key=lambda one: -1.0 if one["iou"] is None else one["iou"], reverse=True)
    labelled = sum(one["truth_pixels"] for one in classes) or 1
    names = shown_names([one["name"] for one in classes])
    rows = [
        (
            name,
            bar(one["iou"]),
            per_cent(one["iou"]),
            per_cent(one["accuracy"]),
            per_cent(one["truth_pixels"] / labelled, 2),
        )
        for one, name in zip(classes, names, strict=True)
    ]
    head = ("class", "IoU", None, "found", "pixels")
    return figure(
        "IoU of each class",
        table(head, rows, class_="bars"),
        '"Found" is the share of a class\'s pixels that are labelled as it, "pixels" its share of all labelled ones; '
        "classes without an IoU occur neither in truth nor in predictions.",
    )


def bar(share: float | None) -> Html:
    """As long as the share."""
    width = 0.0 if share is None else 100 * share
    return element("span", element("span", style=f"width:{width:.2f}%"), class_="bar")


def confusions(counts: NDArray[np.int64], classes: Sequence[str], most: int = CONFUSIONS) -> list[Confusion]:
    """The pairs of classes that cost the most pixels, of (N + 1, N + 1) counts; truth "other" is not scored."""
    names = ["other", *shown_names(classes)]
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    wrong[0] = 0
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(names)) for place in order]
    labelled = int(counts[1:].sum())
    return [
        Confusion(
            names[truth],
            names[taken],
            int(wrong[truth, taken]),
            int(wrong[truth, taken]) / int(counts[truth].sum()),
            int(wrong[truth, taken]) / labelled,
        )
        for truth, taken in pairs
        if wrong[truth, taken]
    ]


def confusion(run: RunData, evaluation: dict[str, Any]) -> Html:
    """The matrix, and in words what costs most."""
    counts = np.array(evaluation["confusion"], np.int64)
    worst = confusions(counts, run.classes)
    rows = [(f"{one.truth} → {one.taken_for}", per_cent(one.of_class), per_cent(one.of_all, 2)) for one in worst]
    named = (
        table(("truth → taken for", "of the class", "of all pixels"), rows, class_="figures")
        if rows
        else "Not one pixel is wrong."
    )
    many = len(run.classes) > NAMED
    return join(
        [
            figure(
                "What classes are taken for",
                matrix(counts, run.classes, run.name),
                "Each row is a class of the truth, each column what its pixels are labelled as; colours grow with the "
                "square root of the share, since most confusions are a few per cent. Gray rows do not occur in the "
                f"truth.{' Classes are in the order of their labels, too many to be named here.' if many else ''}",
            ),
            figure(f"The {counted(len(rows), 'costliest confusion')}", named, "The first costs the most pixels."),
        ]
    )


def matrix(counts: NDArray[np.int64], classes: Sequence[str], name: str) -> Html:
    """Shares of rows; "other" is shown if anything is predicted to be it."""
    first = 0 if counts[1:, 0].any() else 1
    names = ["other", *shown_names(classes)][first:]
    shares = np.sqrt(row_shares(counts[first:, first:]))
    with drawing(f"confusion {name}"):
        drawn, axes = new_chart(0.9 * SIDE, SIDE)
        axes.grid(False)
        axes.patch.set_facecolor(MUTED)
        axes.patch.set_alpha(0.35)
        axes.spines[:].set_visible(False)
        image = axes.imshow(np.ma.masked_invalid(shares), interpolation="none", vmin=0, vmax=1, cmap="viridis")
        bar = drawn.colorbar(
            image, ax=axes, pad=0.02, shrink=0.5, aspect=18, ticks=[(tick / 100) ** 0.5 for tick in TICKS]
        )
        bar.ax.set_yticklabels([f"{tick} %" for tick in TICKS])
        bar.outline.set_edgecolor(MUTED)
        if len(names) <= NAMED:
            size = min(TEXT, 220 / len(names))
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
            axes.set_yticks(range(len(names)), names, fontsize=size)
            axes.xaxis.tick_top()
            axes.xaxis.set_label_position("top")
            axes.tick_params(length=0)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        axes.set_xlabel("labelled as")
        axes.set_ylabel("truth")
        told = "; ".join(f"{one.truth} taken for {one.taken_for}" for one in confusions(counts, classes, 3))
        return to_svg(drawn, f"Confusion matrix. {told}")
