"""What DeepSpeed would write to disk in, copies of it on the host out, which training does not change any more."""

import copy
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

# All that DeepSpeed's files name beside tensors and plain values.
DEEPSPEED_TYPES = [LossScaler, DynamicLossScaler, fragment_address]


class Snapshots(CheckpointEngine):  # type: ignore[misc]
    """Where DeepSpeed saves its files to and loads them from: it saves to memory, so that no disk can fail it.

    An error on one rank in the middle of DeepSpeed's saving would leave the others waiting for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[Path, Any] = {}

    def create(self, info: Any) -> None:
        """A checkpoint begins."""
        self.files = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Rank 0 has made the folder."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a copy of what belongs into the file `path`."""
        self.files[Path(path)] = host_copy(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of a file that was saved; nothing in it is run."""
        with torch.serialization.safe_globals(DEEPSPEED_TYPES):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: Any) -> bool:
        """DeepSpeed has given everything; that it is on disk is said elsewhere."""
        return True


def host_copy(state: Any) -> Any:
    """A deep copy with its tensors on the CPU, members of enumerations as their values.

    What is one tensor in two places stays one.
    """
    return _copied(state, {})


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return copies[id(value)]
    if isinstance(value, dict):
        copied = copy.copy(value)  # an OrderedDict with its attributes, and whatever else DeepSpeed uses
        copied.update({key: _copied(item, copies) for key, item in value.items()})
        return copied
    if isinstance(value, Enum):
        # DeepSpeed's ZeRO stage. Python 3.11.2 pickles a member as a call of getattr, which no careful reader makes.
        return value.value
    if type(value) in (list, tuple):
        return type(value)(_copied(item, copies) for item in value)
    return copy.deepcopy(value)
