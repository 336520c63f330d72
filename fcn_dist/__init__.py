"""Distributed training of fully convolutional networks for semantic segmentation.

The names below are imported on first use, so that `import fcn_dist` needs neither torch nor deepspeed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "pack": "fcn_dist.data.packing.run",
    "merge": "fcn_dist.data.packing.merge",
    "ShardSet": "fcn_dist.data.shardset",
    "SampleStream": "fcn_dist.data.stream",
    "FCN": "fcn_dist.model.fcn",
    "train": "fcn_dist.training.run",
    "evaluate": "fcn_dist.scoring.evaluate",
    "convert": "fcn_dist.deploy.convert",
    "Predictor": "fcn_dist.deploy.predict",
    "UserError": "fcn_dist.errors",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from fcn_dist.data.packing.merge import merge as merge
    from fcn_dist.data.packing.run import pack as pack
    from fcn_dist.data.shardset import ShardSet as ShardSet
    from fcn_dist.data.stream import SampleStream as SampleStream
    from fcn_dist.deploy.convert import convert as convert
    from fcn_dist.deploy.predict import Predictor as Predictor
    from fcn_dist.errors import UserError as UserError
    from fcn_dist.model.fcn import FCN as FCN
    from fcn_dist.scoring.evaluate import evaluate as evaluate
    from fcn_dist.training.run import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fcn_dist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
