"""Files written by torch.save in, plain tensors and containers out; nothing in a file is ever run.

DeepSpeed's files, as a run writes them, name three classes of its own. Each is replaced by an inert stand-in, so that
not even DeepSpeed's code runs (nor is it imported), and whatever else a file names is refused before it is read.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fcn_dist.errors import UserError, named
from fcn_dist.files import obstacle_in


class LossScaler:
    """A constant loss scale, which a run's configuration states as well."""


class DynamicLossScaler:
    """Where a dynamic loss scale stands."""

    cur_scale: float
    cur_iter: int
    last_overflow_iter: int
    cur_hysteresis: int


class Fragment:
    """Where a parameter's part lies in a rank's flat vector; worked out anew, and not read from here."""


# What is built, and where a file names what.
STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
]


class Unreadable(UserError):
    """A file that is none of torch's any more."""


def load_restricted(path: Path) -> dict[str, Any]:
    """The dictionary in `path`, its tensors mapped from the file on the CPU.

    Raises UserError if the file is none of torch.save's, or names anything but tensors and the stand-ins; OSError if
    something else keeps it from being read, such as want of memory.
    """
    content = load_content(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a dictionary as DeepSpeed saves it is needed")
    return content


def load_content(path: Path) -> Any:
    """As `load_restricted`, but whatever was saved."""
    with torch.serialization.safe_globals(STAND_INS):
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if foreign:
                raise UserError(
                    f"{path} carries {named(sorted(foreign))}, which could run code when it is read; a DeepSpeed "
                    "checkpoint holds tensors and plain values; restore the file from a copy you trust"
                )
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except UserError:
            raise
        except Exception as error:  # a damaged file makes the reader trip over anything
            if obstacle := obstacle_in(error):
                raise OSError(obstacle, os.strerror(obstacle), str(path)) from error
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Unreadable(
                f"{path} cannot be read ({reason}); a file as DeepSpeed saved it is needed; restore it from a copy, "
                "or use another step"
            ) from error
