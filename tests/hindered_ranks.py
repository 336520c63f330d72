"""launch/train.py with ranks hindered as HINDER says: RANK:WHERE:SECONDS[:CALLS], such as 1:forward:0.2, by commas.

The rank sleeps for so long in each call after the first CALLS. WHERE is `data` (in its loader processes), `forward`,
`backward`, `evaluate` (each sample), or `save`, where it writes to SLOW_FILE for so long, as to a slow disk.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fcn_dist.commands.entry import run_script
from fcn_dist.data.crops import CropReader
from fcn_dist.model.fcn import FCN
from fcn_dist.scoring import evaluate as scoring
from fcn_dist.training import keeper, objective


class Hinder:
    """What one entry of HINDER asks for."""

    def __init__(self, entry: str) -> None:
        self.rank, self.where, seconds, *calls = entry.split(":")
        self.seconds = float(seconds)
        self.left = int(calls[0]) if calls else 0

    def __call__(self, *_: object) -> None:
        if self.left > 0:
            self.left -= 1
        elif self.where == "save":
            write_slowly(Path(os.environ["SLOW_FILE"]), self.seconds)
        else:
            time.sleep(self.seconds)

    def before(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def hindered(*arguments: Any, **options: Any) -> Any:
            self()
            return action(*arguments, **options)

        return hindered

    def in_backward(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def hindered(*arguments: Any, **options: Any) -> Any:
            loss = action(*arguments, **options)
            loss.register_hook(self)
            return loss

        return hindered


def write_slowly(path: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    with path.open("wb", buffering=0) as file:
        while time.monotonic() < end:
            file.seek(0)
            file.write(bytes(1 << 20))
            time.sleep(0.1)


PLACES: dict[str, tuple[Any, str]] = {
    "data": (CropReader, "fill"),
    "forward": (FCN, "forward"),
    "backward": (objective, "summed_cross_entropy"),
    "evaluate": (scoring, "argmax_upsampled"),
    "save": (keeper, "commit"),
}

if __name__ == "__main__":
    for hinder in map(Hinder, os.environ["HINDER"].split(",")):
        if os.environ.get("RANK", "0") == hinder.rank:
            owner, name = PLACES[hinder.where]
            change = hinder.in_backward if hinder.where == "backward" else hinder.before
            setattr(owner, name, change(getattr(owner, name)))
    sys.exit(run_script("train"))
