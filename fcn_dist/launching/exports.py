"""Which environment variables go along to other hosts."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from fcn_dist.errors import UserError

FILE_NAME = ".deepspeed_env"
# Settings of libraries that must be alike on all hosts. DeepSpeed sends some of them; gloo's and torch's are as needed.
_FAMILIES = ("NCCL_", "GLOO_", "TORCH_", "UCX_", "MV2_", "MLFLOW_", "OMP_", "PYTHON", "DEEPSPEED_")
# What the launcher gives to each rank, and what would make a host run other code than this one.
_REFUSED = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"),
    *("LD_PRELOAD", "LD_AUDIT", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "BASH_ENV", "ENV", "IFS", "SHELLOPTS"),
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_OTHERS_MAY_WRITE = 0o022


def of_families(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that every host should have alike."""
    return {name: value for name, value in environment.items() if name.startswith(_FAMILIES) and name != "PYTHONPATH"}


def read_export_files(folders: list[Path]) -> dict[str, str]:
    """The variables of the `.deepspeed_env` files in `folders`, a later one over an earlier.

    Raises UserError for a file that someone else could have written, and for a line or a variable that does not belong.
    """
    variables: dict[str, str] = {}
    for path in (folder / FILE_NAME for folder in folders):
        if path.is_file():
            variables |= _read(path)
    return variables


def _read(path: Path) -> dict[str, str]:
    facts = path.stat()
    if facts.st_uid not in (os.geteuid(), 0) or facts.st_mode & _OTHERS_MAY_WRITE:
        raise UserError(
            f"{path} would set variables on all hosts, and others than you may write it; it must be yours alone; "
            "look at it, then chown it to yourself and chmod go-w, or start in another folder"
        )
    variables = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, separator, value = (part.strip() for part in line.partition("="))
        if not name and not separator:
            continue
        if not separator or not _NAME.fullmatch(name):
            raise UserError(f"{path} line {number}: {line!r} is no NAME=VALUE")
        if name in _REFUSED or name.startswith("FCN_DIST_"):
            raise UserError(
                f"{path} line {number}: {name} is not taken to other hosts, as it decides which code or rank runs "
                "there; take it out"
            )
        variables[name] = value
    return variables
