"""The journal of a run in, the same for TensorBoard out: figures, histograms, and pictures of the last evaluation.

RUN/tensorboard holds its event files. Steps that are trained again after a restart are shown once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcn_dist.data.decoders import decode_image, decode_mask
from fcn_dist.errors import UserError
from fcn_dist.training.gallery import EVALUATION_NAME, PREDICTIONS_DIR
from fcn_dist.training.layers import HIGHEST, LOWEST
from fcn_dist.training.runfolder import RunRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BOARD_DIR = "tensorboard"
RIGHT, WRONG, UNLABELLED = (60, 60, 60), (230, 40, 60), (0, 0, 0)
# Values of each bin of a histogram of magnitudes: from 0 to the first power of 2 that is told, and so on.
LIMITS = [2.0**power for power in range(LOWEST + 1, HIGHEST + 1)]


class TensorBoard:
    """Takes in a run's journal line by line, from the first that is new; `multipliers` are those of learning rates."""

    def __init__(self, run_dir: Path, record: RunRecord, first_step: int, multipliers: Mapping[str, float]) -> None:
        """Raises UserError if the extra is not installed."""
        self._predictions, self._multipliers, self._first_step = run_dir / PREDICTIONS_DIR, multipliers, first_step
        self._classes = [str(name) for name in record.model["classes"]]
        self._colours = np.array([(0, 0, 0), *record.model["colours"]], np.uint8)
        purge = first_step + 1 if first_step else None
        self._writer = summary_writer()(str(run_dir / BOARD_DIR), purge_step=purge)
        text = json.dumps(vars(record), indent=2)
        self._writer.add_text("run.json", "".join(f"    {line}\n" for line in text.splitlines()), first_step)

    def hear(self, line: Mapping[str, Any]) -> None:
        """A line of the journal, of a step after `first_step`."""
        step = int(line["step"])
        if step <= self._first_step:
            return
        match line["event"]:
            case "train":
                self._figures("train", {key: value for key, value in line.items() if key != "learning_rate"}, step)
                for name, multiplier in self._multipliers.items():
                    self._writer.add_scalar(f"learning_rate/{name}", line["learning_rate"] * multiplier, step)
            case "evaluate":
                for family in ("official", "paper"):
                    self._figures(f"validation/{family}", line[family], step)
                self._pictures(step)
            case "layers":
                for name, seen in line["layers"].items():
                    for what, told in seen.items():
                        self._histogram(f"{what}/{name}", told, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _figures(self, prefix: str, figures: Mapping[str, Any], step: int) -> None:
        for key, value in figures.items():
            if isinstance(value, (int, float)) and key not in ("step", "time"):
                self._writer.add_scalar(f"{prefix}/{key}", value, step)

    def _histogram(self, name: str, told: Mapping[str, Any], step: int) -> None:
        """Of magnitudes; the bins are powers of 2, so what is added up of them is the middle of each."""
        if told["norm"] is None:
            return
        shares = np.array(told["histogram"]) * (1 - told["zeros"])
        shares[0] += told["zeros"]
        middles = np.array([0.75 * limit for limit in LIMITS])
        self._writer.add_scalar(f"norm of {name}", told["norm"], step)
        self._writer.add_histogram_raw(
            name,
            min=0.0,
            max=LIMITS[int(np.flatnonzero(shares).max(initial=0))],
            num=1.0,
            sum=float(shares @ middles),
            sum_squares=float(shares @ middles**2),
            bucket_limits=LIMITS,
            bucket_counts=shares.tolist(),
            global_step=step,
        )

    def _pictures(self, step: int) -> None:
        """Of the scenes that the evaluation of `step` has left, and its confusion matrix."""
        path = self._predictions / EVALUATION_NAME
        evaluation: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if evaluation.get("step") != step:  # it could not be written, which was said
            return
        shares = of_rows(np.asarray(evaluation["confusion"], np.float64))
        gray = np.repeat(np.round(255 * np.sqrt(shares))[..., None], 3, axis=2).astype(np.uint8)
        size = max(1, 480 // len(gray))
        self._writer.add_image("confusion", gray.repeat(size, 0).repeat(size, 1), step, dataformats="HWC")
        for scene in evaluation["scenes"]:
            files = [(self._predictions / scene[kind]).read_bytes() for kind in ("image", "truth", "prediction")]
            image, truth, prediction = decode_image(files[0]), decode_mask(files[1]), decode_mask(files[2])
            assert image is not None and truth is not None and prediction is not None, scene
            title = f"scenes/{scene['name']}"
            self._writer.add_image(title, panel(image, truth, prediction, self._colours), step, dataformats="HWC")


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


def summary_writer() -> type["SummaryWriter"]:
    """Raises UserError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"log.tensorboard is set, and tensorboard cannot be imported ({error}); the extra of that name is needed: "
            "pip install 'fcn-dist[tensorboard]', or leave the setting out"
        ) from error
    return SummaryWriter
