"""Several runs side by side: final figures, classes, and where their configurations differ."""

from collections.abc import Sequence

from fcn_dist.errors import counted
from fcn_dist.reporting.classes import no_evaluation, per_cent, shown_names
from fcn_dist.reporting.history import configuration, figures
from fcn_dist.reporting.markup import Html, element, join, note, table
from fcn_dist.reporting.rundata import RunData

ABSENT = "-"


def side_by_side(runs: Sequence[RunData]) -> Html:
    """A column a run, a row a figure."""
    of_runs = [figures(run) for run in runs]
    rows = [(name, *(found[name] for found in of_runs)) for name in of_runs[0]]
    return table(("", *(run.name for run in runs)), rows, class_="figures")


def differences(runs: Sequence[RunData]) -> Html:
    """The keys that differ, and in each the values that are not the first run's, marked."""
    of_runs = [configuration(run) for run in runs]
    keys = dict.fromkeys(key for found in of_runs for key in found)
    rows = []
    for key in keys:
        values = [found.get(key, ABSENT) for found in of_runs]
        if len(set(values)) > 1:
            rows.append((key, *(value if value == values[0] else element("mark", value) for value in values)))
    if not rows:
        return note("The runs have one configuration.")
    same = counted(len(keys) - len(rows), "further value")
    count = f"The same in all: {same}. Marked is what differs from the first run."
    return Html(table(("key", *(run.name for run in runs)), rows, class_="keys") + note(count))


def classes_side_by_side(runs: Sequence[RunData]) -> Html:
    """IoU of each class in each run's last evaluation."""
    damaged = [no_evaluation(run) for run in runs if run.evaluation_unread]
    shown = [run for run in runs if run.evaluation]
    if not shown:
        return join(damaged or [note("No evaluation has left its classes in any of the run folders.")])
    by_name = [{one["name"]: one["iou"] for one in run.evaluation["classes"]} for run in shown if run.evaluation]
    names = list(dict.fromkeys(name for run in shown for name in run.classes))
    rows = [
        (label, *(per_cent(found.get(name)) for found in by_name))
        for name, label in zip(names, shown_names(names), strict=True)
    ]
    return join([table(("class", *(run.name for run in shown)), rows, class_="figures"), *damaged])
