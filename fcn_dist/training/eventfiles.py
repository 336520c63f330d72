"""What a board shows in, TensorBoard's event files out, in RUN/tensorboard.

Steps that are trained again after a restart are shown once.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fcn_dist.errors import UserError
from fcn_dist.training.boards import Shown
from fcn_dist.training.layers import HIGHEST, LOWEST
from fcn_dist.training.runfolder import RunRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BOARD_DIR = "tensorboard"
# Values of each bin of a histogram of magnitudes: from 0 to the first power of 2 that is told, and so on.
LIMITS = [2.0**power for power in range(LOWEST + 1, HIGHEST + 1)]


class EventFiles:
    """A writer of boards."""

    def __init__(self, run_dir: Path, record: RunRecord, first_step: int) -> None:
        """Raises UserError if the extra is not installed."""
        purge = first_step + 1 if first_step else 0  # a run that begins anew may have files of its first start
        self._writer = summary_writer()(str(run_dir / BOARD_DIR), purge_step=purge)
        text = json.dumps(vars(record), indent=2)
        self._writer.add_text("run.json", "".join(f"    {line}\n" for line in text.splitlines()), first_step)

    def write(self, shown: Shown) -> None:
        """Take in one line's."""
        for name, value in shown.figures.items():
            self._writer.add_scalar(name, value, shown.step)
        for name, shares in shown.histograms.items():
            self._histogram(name, shares, shown.step)
        for name, picture in shown.pictures.items():
            self._writer.add_image(name, picture, shown.step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _histogram(self, name: str, shares: NDArray[np.float64], step: int) -> None:
        """The bins are powers of 2, so what is added up of the magnitudes is the middle of each."""
        middles = np.array([0.75 * limit for limit in LIMITS])
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
