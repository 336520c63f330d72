"""A run's journal in; out what boards show of it: figures, histograms, and pictures of the last evaluation.

What a line shows is worked out here; eventfiles.py writes it for TensorBoard, offlinerun.py for Weights & Biases.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.decoders import decode_image, decode_mask
from fcn_dist.training.gallery import EVALUATION_NAME, PREDICTIONS_DIR
from fcn_dist.training.runfolder import RunRecord

RIGHT, WRONG, UNLABELLED = (60, 60, 60), (230, 40, 60), (0, 0, 0)


@dataclass
class Shown:
    """What there is to see of one line of the journal."""

    event: str
    step: int
    time: float  # seconds since 1970
    figures: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # shares of magnitudes, as of layers.py
    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)  # (H, W, 3)


class Writer(Protocol):
    """Puts down what is shown, in the order of the steps."""

    def write(self, shown: Shown) -> None:
        """Take in one line's."""

    def close(self) -> None:
        """Write what is left."""


class Board:
    """Takes in a run's journal line by line; a writer gets what lines after `first_step` show.

    `multipliers` are those of learning rates.
    """

    def __init__(
        self, run_dir: Path, record: RunRecord, first_step: int, multipliers: Mapping[str, float], writer: Writer
    ) -> None:
        self._predictions, self._multipliers, self._first_step = run_dir / PREDICTIONS_DIR, multipliers, first_step
        self._colours = np.array([(0, 0, 0), *record.model["colours"]], np.uint8)
        self._writer = writer

    def hear(self, line: Mapping[str, Any]) -> None:
        """A line of the journal."""
        if line["step"] > self._first_step:
            self._writer.write(self._shown(line))

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _shown(self, line: Mapping[str, Any]) -> Shown:
        shown = Shown(line["event"], int(line["step"]), line["time"])
        match line["event"]:
            case "train":
                rate = line["learning_rate"]
                shown.figures = _figures("train", {key: value for key, value in line.items() if key != "learning_rate"})
                shown.figures |= {f"learning_rate/{name}": rate * by for name, by in self._multipliers.items()}
            case "evaluate":
                for family in ("official", "paper"):
                    shown.figures |= _figures(f"validation/{family}", line[family])
                shown.pictures = dict(self._pictures(shown.step))
            case "layers":
                for name, seen in line["layers"].items():
                    for what, told in seen.items():
                        if told["norm"] is not None:
                            shown.figures[f"norm of {what}/{name}"] = told["norm"]
                            shown.histograms[f"{what}/{name}"] = _shares(told)
        return shown

    def _pictures(self, step: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Of the scenes that the evaluation of `step` has left, and its confusion matrix."""
        path = self._predictions / EVALUATION_NAME
        evaluation: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if evaluation.get("step") != step:  # it could not be written, which was said
            return
        shares = of_rows(np.asarray(evaluation["confusion"], np.float64))
        gray = np.repeat(np.round(255 * np.sqrt(shares))[..., None], 3, axis=2).astype(np.uint8)
        size = max(1, 480 // len(gray))
        yield "confusion", gray.repeat(size, 0).repeat(size, 1)
        for scene in evaluation["scenes"]:
            files = [(self._predictions / scene[kind]).read_bytes() for kind in ("image", "truth", "prediction")]
            image, truth, prediction = decode_image(files[0]), decode_mask(files[1]), decode_mask(files[2])
            assert image is not None and truth is not None and prediction is not None, scene
            yield f"scenes/{scene['name']}", panel(image, truth, prediction, self._colours)


def _figures(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    return {f"{prefix}/{key}": value for key, value in numbers.items() if key not in ("step", "time")}


def _shares(told: Mapping[str, Any]) -> NDArray[np.float64]:
    """Of all values; zeros are in the first bin."""
    shares: NDArray[np.float64] = np.array(told["histogram"], np.float64) * (1 - told["zeros"])
    shares[0] += told["zeros"]
    return shares


def panel(
    image: NDArray[np.uint8], truth: NDArray[np.uint8], prediction: NDArray[np.uint8], colours: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Image, truth, prediction and errors side by side, (H, 4 W, 3); `colours` are those of labels from 0 on."""
    kinds = np.where(truth == 0, 2, truth != prediction)
    errors = np.array([RIGHT, WRONG, UNLABELLED], np.uint8)[kinds]
    return np.concatenate([image, colours[truth], colours[prediction], errors], axis=1)


def of_rows(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each count as a share of its row's."""
    shares: NDArray[np.float64] = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    return shares
