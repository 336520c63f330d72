"""How far into the network training has reached: the gradient of each layer, look by look (event `layers`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator

from fcn_dist.reporting.charts import INK, MUTED, SERIES, drawing, new_chart, steps_below, to_svg
from fcn_dist.reporting.curves import dots_of, thinned
from fcn_dist.reporting.markup import Html, element, figure, note
from fcn_dist.reporting.rundata import Look, RunData, Values

TRUNK = "features."
COLUMNS = 240  # looks that are shown; of more, evenly spread ones
LOWEST = -5  # power of ten of the smallest share that has a colour of its own
ROW = 0.13  # inches
MAP_WIDTH = 3.9  # inches
MAP_COLOURS = "viridis"


@dataclass(frozen=True)
class Layer:
    """A layer with weights, and the parameters that are its."""

    name: str
    parameters: tuple[str, ...]
    in_trunk: bool


def layers_of(looks: Sequence[Look], frozen_stages: int) -> list[Layer]:
    """In the order of the network, named as VGG's authors do: conv4_2 is the second convolution of stage 4.

    The trunk's layers are numbered with those that have no weights: a gap of one (ReLU) is within a stage, a larger one
    has a pooling in it, and there is none before a normalisation, which is counted with its convolution.
    """
    parameters: dict[str, list[str]] = {}
    for look in looks:
        for parameter in look.norms:
            parameters.setdefault(parameter.rpartition(".")[0], [])
            if parameter not in parameters[parameter.rpartition(".")[0]]:
                parameters[parameter.rpartition(".")[0]].append(parameter)
    layers: list[Layer] = []
    stage, place, before = frozen_stages, 0, -10
    for module, own in parameters.items():
        if not module.startswith(TRUNK):
            layers.append(Layer(module, tuple(own), False))
            continue
        number = int(module.removeprefix(TRUNK))
        if number == before + 1:
            layers[-1] = Layer(layers[-1].name, (*layers[-1].parameters, *own), True)
        else:
            stage, place = (stage, place + 1) if number <= before + 2 else (stage + 1, 1)
            layers.append(Layer(f"conv{stage}_{place}", tuple(own), True))
        before = number
    return layers


def shares_of(looks: Sequence[Look], layers: Sequence[Layer]) -> Values:
    """(layers, looks): each layer's share of the squared gradient; NaN in looks where a gradient was not finite."""
    squares = np.array(
        [[sum(look.norms.get(name, 0.0) ** 2 for name in layer.parameters) for look in looks] for layer in layers]
    )
    whole = squares.sum(axis=0)
    shares: Values = squares / np.where(whole > 0, whole, np.nan)
    return shares


def depth(run: RunData) -> Html:
    """The heat map, and the trunk's share beside the head's; or what to set to have them."""
    if not run.looks:
        return note(
            "No looks at the layers are on record. ",
            element("code", "--set log.layers=20"),
            " takes one every 20 steps, and this place then shows which layers learn when.",
        )
    layers = layers_of(run.looks, int(run.record.recipe.get("model", {}).get("frozen_stages", 0)))
    shares = shares_of(run.looks, layers)
    return element(
        "div",
        figure(
            "Share of the squared gradient, by layer and step",
            _heat_map(run.looks, layers, shares, run.name),
            "Each column is a look; its layers, from the image's side down to the scores, add up to 1. Colours are "
            "powers of ten, since the head is that far ahead at first: where the lower rows are bright from the "
            "start and the upper ones brighten later, the head learns first and the trunk follows. Layers that are "
            "frozen have no row.",
        ),
        figure(
            "Head and trunk, % of the squared gradient",
            _head_and_trunk(run.looks, layers, shares, run.name),
            describe(run.looks, layers, shares),
        ),
        class_="charts depth",
    )


def describe(looks: Sequence[Look], layers: Sequence[Layer], shares: Values) -> str:
    """The head's share at the first, middle and last look."""
    head = 100 * _of_head(layers, shares)
    whole = np.flatnonzero(np.isfinite(head))
    if not len(whole):
        return "No look had a finite gradient."
    picked = dict.fromkeys(int(whole[place]) for place in (0, len(whole) // 2, -1))
    told = ", ".join(f"{head[column]:.4g} % at step {looks[column].step}" for column in picked)
    return f"Head: fc6, fc7 and the score layers, {told}. Trunk: the convolutions before them."


def _of_head(layers: Sequence[Layer], shares: Values) -> Values:
    in_head = np.array([not layer.in_trunk for layer in layers])
    found: Values = shares[in_head].sum(axis=0)
    return found


def _heat_map(looks: Sequence[Look], layers: Sequence[Layer], shares: Values, name: str) -> Html:
    columns = np.unique(np.linspace(0, len(looks) - 1, min(COLUMNS, len(looks))).round().astype(int))
    powers = np.log10(np.maximum(shares[:, columns], 10.0**LOWEST))
    with drawing(f"heat {name}"):
        drawn, axes = new_chart(0.75 + ROW * len(layers), MAP_WIDTH)
        axes.grid(False)
        axes.set_facecolor("none")
        image = axes.imshow(
            powers, aspect="auto", interpolation="none", vmin=LOWEST, vmax=0, cmap=MAP_COLOURS, origin="upper"
        )
        axes.set_yticks(range(len(layers)), [layer.name for layer in layers])
        axes.tick_params(axis="y", length=0)
        trunk = sum(layer.in_trunk for layer in layers)
        if 0 < trunk < len(layers):
            axes.axhline(trunk - 0.5, color=INK, linewidth=1.2)
        _columns_below(axes, [looks[column].step for column in columns])
        bar = drawn.colorbar(image, ax=axes, pad=0.02, aspect=30, ticks=range(LOWEST, 1))
        bar.ax.set_yticklabels([f"{10.0**power:g}" for power in range(LOWEST, 1)])
        bar.outline.set_edgecolor(MUTED)
        return to_svg(drawn, f"Share of the squared gradient by layer and step. {describe(looks, layers, shares)}")


def _columns_below(axes: Axes, steps: Sequence[int]) -> None:
    """Columns are looks, whose steps need not be evenly spread."""
    shown = sorted({round(place) for place in np.linspace(0, len(steps) - 1, min(6, len(steps)))})
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.set_xticks(shown, [str(steps[place]) for place in shown])
    axes.set_xlabel("step")


def _head_and_trunk(looks: Sequence[Look], layers: Sequence[Layer], shares: Values, name: str) -> Html:
    steps = np.array([look.step for look in looks], np.float64)
    head = 100 * _of_head(layers, shares)
    with drawing(f"parts {name}"):
        drawn, axes = new_chart(2.1)
        for number, (part, share) in enumerate((("head", head), ("trunk", 100 - head))):
            places, shown = thinned(steps, share)
            marker = dots_of(shown)
            axes.plot(places, shown, color=SERIES[number], marker=marker, markersize=3, clip_on=False, label=part)
        axes.set_ylim(0, 100)
        steps_below(axes, steps[0], steps[-1])
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return to_svg(drawn, describe(looks, layers, shares))
