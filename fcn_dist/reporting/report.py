"""One page about a run, or about several side by side: run folders in, an HTML file out that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from fcn_dist.errors import UserError
from fcn_dist.files import write_text
from fcn_dist.reporting.classes import bars, confusion, no_evaluation
from fcn_dist.reporting.compare import classes_side_by_side, differences, side_by_side
from fcn_dist.reporting.curves import curves
from fcn_dist.reporting.depth import depth
from fcn_dist.reporting.history import configuration_table, figures, how_to_run_again, state
from fcn_dist.reporting.markup import Html, Part, element, join
from fcn_dist.reporting.rundata import RunData, read_runs
from fcn_dist.reporting.scenes import gallery
from fcn_dist.reporting.style import css

REPORT_NAME, COMPARISON_NAME = "report.html", "comparison.html"
# No script runs, and nothing is fetched, whatever a run's names might hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of one run, or that which compares several, and return where it lies.

    By default RUN/report.html, or comparison.html in the first of several. Raises UserError if a folder holds no run,
    or the page cannot be written.
    """
    runs = read_runs(folders)
    path = output or folders[0] / (REPORT_NAME if len(runs) == 1 else COMPARISON_NAME)
    text = page(runs)
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); a file in a folder that is there is needed; give another "
            "--output"
        ) from error
    return path


def page(runs: Sequence[RunData]) -> str:
    """The whole document."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", f"{title}: report of a training"),
        element("style", Html(css())),
    )
    main = element("main", element("h1", title), *body)
    document = f"<!DOCTYPE html>\n{element('html', head, element('body', main), lang='en')}\n"
    return document.encode("ascii", "xmlcharrefreplace").decode()  # the same in whatever encoding files have here


def _one(run: RunData) -> list[Part]:
    model = run.record.model["config"]
    tiles = [element("div", element("b", value), element("span", name)) for name, value in figures(run).items()]
    many = len(run.classes)
    what = (
        f"{model['variant']} on {model['backbone']}, {many} class{'' if many == 1 else 'es'}, seed "
        f"{run.record.recipe['train']['seed']}. {state(run)}"
    )
    return [
        element("p", what),
        element("div", *tiles, class_="tiles"),
        _section("Curves", curves([run])),
        _section("What learns when", depth(run)),
        *_evaluated(run),
        _section("How to run it again", how_to_run_again(run)),
        _section("Configuration", configuration_table([run])),
    ]


def _evaluated(run: RunData) -> list[Part]:
    """The classes and scenes of the last evaluation."""
    evaluation = run.evaluation
    if evaluation is None:
        return [_section("Classes and scenes", no_evaluation(run))]
    scored = f"{evaluation['num_samples']} of {evaluation['set_size']} {evaluation['split']} scenes"
    told = [f"Of the evaluation after step {evaluation['step']:,}, {scored}, with the {evaluation['weights']} weights."]
    if run.recorded and evaluation["step"] > run.steps:
        told.append(f"The run has gone back since: step {run.steps:,} is the last on record.")
    of_what = element("p", " ".join(told), class_="small")
    charts = element("div", bars(evaluation), element("div", confusion(run, evaluation)), class_="charts classes")
    return [
        _section("Classes", of_what, charts),
        _section("Scenes", of_what, gallery(run, evaluation)),
    ]


def _several(runs: Sequence[RunData]) -> list[Part]:
    hints = [element("li", run.name, ": ", state(run)) for run in runs]
    parts: list[Part] = [
        element("ul", *hints),
        _section("Final figures", side_by_side(runs)),
        _section("What was set differently", differences(runs)),
        _section("Curves", curves(runs)),
        _section("Classes: IoU in the last evaluation", classes_side_by_side(runs)),
    ]
    parts += [_section(f"What learns when: {run.name}", depth(run)) for run in runs if run.looks]
    parts += [_section(f"How to run it again: {run.name}", how_to_run_again(run)) for run in runs]
    return parts


def _section(title: str, *parts: Part) -> Html:
    return element("section", element("h2", title), join(parts))
