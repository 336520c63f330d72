"""launch/train.py with one rank hindered, as HINDER says: RANK:WHERE:SECONDS[:CALLS], such as 1:forward:0.2.

The rank sleeps for so long in each call after the first CALLS. WHERE is `data` (in its loader processes), `forward`,
`backward`, `evaluate` (each sample), or `save` (it writes 1 MiB more a tenth of a second, as a slow disk would take it).
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fcn_dist.checkpoints import store
from fcn_dist.commands.entry import run_script
from fcn_dist.data.crops import CropReader
from fcn_dist.model.fcn import FCN
from fcn_dist.scoring import evaluate
from fcn_dist.training import loop

RANK, WHERE, SECONDS, *CALLS = os.environ["HINDER"].split(":")
left = int(CALLS[0]) if CALLS else 0


def hinder(*_: object) -> None:
    global left
    if left > 0:
        left -= 1
    elif WHERE == "save":
        write_slowly(Path(os.environ["SLOW_FILE"]), float(SECONDS))
    else:
        time.sleep(float(SECONDS))


def write_slowly(path: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    with path.open("wb", buffering=0) as file:
        while time.monotonic() < end:
            file.seek(0)
            file.write(bytes(1 << 20))
            time.sleep(0.1)


def before(action: Callable[..., Any]) -> Callable[..., Any]:
    def hindered(*arguments: Any, **options: Any) -> Any:
        hinder()
        return action(*arguments, **options)

    return hindered


def slow_backward(action: Callable[..., Any]) -> Callable[..., Any]:
    def hindered(*arguments: Any, **options: Any) -> Any:
        loss = action(*arguments, **options)
        loss.register_hook(hinder)
        return loss

    return hindered


PLACES: dict[str, tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "data": (CropReader, "fill", before),
    "forward": (FCN, "forward", before),
    "backward": (loop, "summed_cross_entropy", slow_backward),
    "evaluate": (evaluate, "argmax_upsampled", before),
    "save": (store, "commit", before),
}

if __name__ == "__main__":
    if os.environ.get("RANK", "0") == RANK:
        owner, name, change = PLACES[WHERE]
        setattr(owner, name, change(getattr(owner, name)))
    sys.exit(run_script("train"))
