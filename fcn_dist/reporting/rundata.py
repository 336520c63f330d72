"""A run folder in, what is on record of the run out. Nothing else of the run is known here."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcn_dist.errors import UserError
from fcn_dist.training.runfolder import METRICS_NAME, RunRecord, parse_line, read_run_record

EVALUATION = "predictions/evaluation.json"
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
    def allowed_skips(self) -> int:
        """Steps that may not be finite before training ends."""
        return int(self.record.recipe["train"]["max_skipped_steps"])

    @property
    def diverged(self) -> bool:
        """Whether training ended at a step that was not finite: of that one, which is one too many, no line tells."""
        beyond = bool(self.skipped) and all(line["step"] < self.skipped[-1] for line in self.trained)
        return beyond and len(self.skipped) > self.allowed_skips

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
        elif event == "train":
            run.trained.append(line)
        elif event == "evaluate":
            run.scored.append(line)
        elif event == "layers":
            run.looks.append(_look(line))
        else:
            run.others[event] += 1
            if event == "not_finite":
                run.skipped.append(int(line["step"]))
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
            return all(isinstance(line.get(key, 1), int) for key in ("world_size", "steps"))
        case "train":
            return _are_figures(value for key, value in line.items() if key != "event")
        case "evaluate":
            return isinstance(line.get("official"), dict) and _are_figures(line["official"].values())
        case "layers":
            layers = line.get("layers")
            return isinstance(layers, dict) and _are_figures(_norm(seen) for seen in layers.values())
    return True


def _are_figures(found: Iterable[Any]) -> bool:
    return all(value is None or isinstance(value, (int, float)) for value in found)


def _norm(seen: Any) -> Any:
    """Of a layer's gradient; what is no figure where there is none."""
    gradient = seen.get("gradient") if isinstance(seen, dict) else None
    return gradient.get("norm", "") if isinstance(gradient, dict) else ""


def _look(line: Line) -> Look:
    norms = {name: _norm(seen) for name, seen in line["layers"].items()}
    return Look(int(line["step"]), {name: np.nan if norm is None else float(norm) for name, norm in norms.items()})


def _read_evaluation(run: RunData) -> None:
    """What training left of its last evaluation, if it did, and it fits the run."""
    num_classes = len(run.classes)
    try:
        found = json.loads((run.folder / EVALUATION).read_text())
        whole = np.array(found["confusion"], np.int64).shape == (num_classes + 1, num_classes + 1)
        whole = whole and len(found["classes"]) == num_classes and isinstance(found["scenes"], list)
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if whole:
        run.evaluation = found
    else:
        run.evaluation_unread = True


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
