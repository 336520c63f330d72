"""A run folder in, what is on record of the run out. Nothing else of the run is known here."""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcn_dist.errors import UserError
from fcn_dist.training.runfolder import METRICS_NAME, RunRecord, parse_line, read_run_record

EVALUATION = "predictions/evaluation.json"
FIGURE = (int, float, type(None))
# What is read of an evaluation, of each of its classes and of each of its scenes.
OF_EVALUATION = {
    **dict.fromkeys(("step", "num_samples", "set_size"), int),
    **dict.fromkeys(("split", "weights"), str),
    **dict.fromkeys(("classes", "scenes", "confusion"), list),
}
OF_CLASS = {"name": str, "iou": FIGURE, "accuracy": FIGURE, "truth_pixels": int}
OF_SCENE = {**dict.fromkeys(("name", "key", "image", "truth", "prediction"), str), "right": int, "labelled": int}
Line = dict[str, Any]
Values = NDArray[np.float64]


@dataclass
class Look:
    """The gradient of each parameter in one step."""

    step: int
    norms: dict[str, float]  # NaN where it was not finite


@dataclass
class RunData:
    """A run."""

    folder: Path
    name: str
    record: RunRecord
    starts: list[Line] = field(default_factory=list)
    trained: list[Line] = field(default_factory=list)  # figures of steps
    scored: list[Line] = field(default_factory=list)  # evaluations
    looks: list[Look] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # other events, and how often
    seconds: float = 0.0  # of all starts, each up to its last line
    last_time: float | None = None  # of the last line, in seconds since 1970
    skipped: list[int] = field(default_factory=list)  # steps that were not finite, and changed no weight
    allowed_skips: int = 0  # so many, when the last of them was
    diverged: bool = False  # one more was not finite, at which training ended
    unread: int = 0  # whole lines that are no event, or have figures that are none
    evaluation: dict[str, Any] | None = None  # what predictions/ holds
    evaluation_unread: bool = False  # there is one, which is damaged or does not fit the run

    @property
    def recorded(self) -> bool:
        """Whether the journal tells of any start or step."""
        return bool(self.starts or self.trained or self.scored)

    @property
    def steps_on_record(self) -> list[int]:
        """Those that figures or scores are of, or that were skipped."""
        return [*(int(line["step"]) for line in (*self.trained, *self.scored)), *self.skipped]

    @property
    def steps(self) -> int:
        """The last step on record."""
        return max(self.steps_on_record, default=0)

    @property
    def finished(self) -> bool:
        """Whether it was trained to its last step."""
        return self.steps >= self.planned

    @property
    def planned(self) -> int:
        """Steps that the run has in all, as its last start said: those may be other than run.json's."""
        return int(next((start["steps"] for start in reversed(self.starts) if "steps" in start), self.record.steps))

    @property
    def classes(self) -> list[str]:
        """Names of labels 1..N."""
        return [str(name) for name in self.record.model["classes"]]


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Each run, under a name of its own. Raises UserError if a folder is none."""
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise UserError(f"{folders[number]} is named twice; different runs are needed; leave one out")
    parts = 1
    while len({folder.parts[-parts:] for folder in resolved}) < len(resolved):
        parts += 1
    return [read_run(folder, "/".join(folder.resolve().parts[-parts:])) for folder in folders]


def read_run(folder: Path, name: str) -> RunData:
    """Raises UserError if `folder` holds no run."""
    run = RunData(folder, name, read_run_record(folder))
    began = None
    for line in _lines(folder / METRICS_NAME, run):
        event, time = line["event"], float(line["time"])
        if event == "start":
            began = run.last_time = time
            run.starts.append(line)
            run.diverged = False
        elif event == "train":
            run.trained.append(line)
            run.diverged = False
        elif event == "evaluate":
            run.scored.append(line)
        elif event == "layers":
            run.looks.append(_look(line))
        else:
            run.others[event] += 1
            if event == "not_finite":
                run.skipped.append(int(line["step"]))
                run.allowed_skips = line["allowed"]
                run.diverged = len(run.skipped) > run.allowed_skips
        run.seconds += max(0.0, time - run.last_time) if began is not None and run.last_time is not None else 0.0
        run.last_time = time
    _read_evaluation(run)
    return run


def _lines(path: Path, run: RunData) -> Iterator[Line]:
    """Events, line by line: looks at layers can take hundreds of megabytes."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if not text.endswith("\n"):
                return  # it is being written, or a kill has cut it
            line = parse_line(text)
            if line is not None and _is_whole(line):
                yield line
            else:
                run.unread += 1


def _is_whole(line: Line) -> bool:
    """Whether what is read of an event is of the types that training writes."""
    match line["event"]:
        case "start":
            numbers = all(isinstance(line.get(key, 1), int) for key in ("world_size", "steps"))
            return numbers and _is_command(line.get("command", ""))
        case "not_finite":
            return isinstance(line.get("allowed"), int)
        case "train":
            return _are_figures(value for key, value in line.items() if key != "event")
        case "evaluate":
            return isinstance(line.get("official"), dict) and _are_figures(line["official"].values())
        case "layers":
            layers = line.get("layers")
            return isinstance(layers, dict) and _are_figures(_norm(seen) for seen in layers.values())
    return True


def _is_command(found: Any) -> bool:
    try:
        return isinstance(found, str) and shlex.split(found) is not None
    except ValueError:  # a quote without its end
        return False


def _are_figures(found: Iterable[Any]) -> bool:
    return all(isinstance(value, FIGURE) and not (value and abs(value) > sys.float_info.max) for value in found)


def _norm(seen: Any) -> Any:
    """Of a layer's gradient; what is no figure where there is none."""
    gradient = seen.get("gradient") if isinstance(seen, dict) else None
    return gradient.get("norm", "") if isinstance(gradient, dict) else ""


def _look(line: Line) -> Look:
    norms = {name: _norm(seen) for name, seen in line["layers"].items()}
    return Look(int(line["step"]), {name: np.nan if norm is None else float(norm) for name, norm in norms.items()})


def _read_evaluation(run: RunData) -> None:
    """What training left of its last evaluation, if it did, and it fits the run."""
    try:
        found = json.loads((run.folder / EVALUATION).read_text())
        if _is_evaluation(found, len(run.classes)):
            run.evaluation = found
    except FileNotFoundError:
        return
    except (OSError, ValueError, OverflowError, RecursionError):
        pass
    run.evaluation_unread = run.evaluation is None


def _is_evaluation(found: Any, num_classes: int) -> bool:
    """Whether it is of such a run, and what is read of it is there, of the types that training writes."""
    if not _has(found, OF_EVALUATION) or len(found["classes"]) != num_classes:
        return False
    classes = all(_has(one, OF_CLASS) and _are_figures((one["iou"], one["accuracy"])) for one in found["classes"])
    counts = np.array(found["confusion"])
    whole = counts.shape == (num_classes + 1, num_classes + 1) and counts.dtype.kind == "i" and counts.min() >= 0
    return classes and bool(whole) and all(_has(one, OF_SCENE) and one["labelled"] > 0 for one in found["scenes"])


def _has(found: Any, types: Mapping[str, Any]) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(key), type_) for key, type_ in types.items())


def values(lines: Sequence[Line], *keys: str) -> Values:
    """One figure of each line, by its path of keys; NaN where it is null or missing."""
    found = []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        found.append(np.nan if value is None else float(value))
    return np.array(found, np.float64)


def last(series: Values) -> float | None:
    """The last that is a number."""
    finite = series[np.isfinite(series)]
    return float(finite[-1]) if len(finite) else None
