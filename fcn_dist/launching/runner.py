"""The command line and environment of DeepSpeed's own runner, with nothing in them that a shell would act on."""

import os
import re
import site
import sys
from pathlib import Path

import fcn_dist
from fcn_dist.errors import UserError
from fcn_dist.launching.hostfile import Host, write_hostfile
from fcn_dist.outcome import JOB_VARIABLE

# What DeepSpeed's pdsh runner writes into a command line as it is. '%' has a meaning to pdsh.
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*", re.ASCII)
# Variables that DeepSpeed exports to other hosts by their first letters; they travel in the order instead.
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
LONGEST_ORDER = 100_000  # bytes; Linux takes no argument over 128 KiB


def python_path() -> str:
    """PYTHONPATH for the job's processes: this package first where it is not installed but a checkout."""
    root = Path(fcn_dist.__file__).resolve().parents[1]
    given = os.environ.get("PYTHONPATH", "")
    if str(root) in (*site.getsitepackages(), site.getusersitepackages()):
        return given
    return os.pathsep.join([str(root), *([given] if given else [])])


def check_plain(value: str, what: str) -> None:
    """Raise UserError if DeepSpeed's launcher would hand `value` to a remote shell in a form that it acts on."""
    if not _PLAIN.fullmatch(value):
        raise UserError(
            f"{what} is {value!r}, which a shell on the other hosts would take apart; only letters, digits and "
            "_@+=:,./- are possible there; move or rename it"
        )


def local_command(ranks: int, visible_devices: str, port: int, order: str) -> list[str]:
    """Start `ranks` ranks here, on the first of the CUDA devices that CUDA_VISIBLE_DEVICES allows.

    Raises UserError if it names them by more than numbers.
    """
    devices = [f"--num_gpus={ranks}"]  # without a GPU, so many ranks on the CPU
    if visible_devices:
        names = visible_devices.split(",")
        if not all(name.strip().isdecimal() for name in names):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES is {visible_devices!r}; DeepSpeed's launcher needs device numbers; set it to "
                "numbers such as 0,1"
            )
        # --num_gpus counts from device 0, whatever is visible.
        devices = ["--include=localhost:" + ",".join(name.strip() for name in names[:ranks])]
    # An empty hostfile: DeepSpeed would look for one in /job.
    return [*_runner(), "--hostfile=", *devices, f"--master_port={port}", *_program(order)]


def hosts_command(hosts: list[Host], folder: Path, master_addr: str | None, port: int, order: str) -> list[str]:
    """Start ranks on `hosts` through pdsh; `folder` takes the hostfile."""
    check_plain(sys.executable, "the path of Python")
    if len(order) > LONGEST_ORDER:
        raise UserError(f"arguments and environment take {len(order)} bytes, and {LONGEST_ORDER} are possible")
    path = folder / "hostfile"
    write_hostfile(path, hosts)
    address = [f"--master_addr={master_addr}"] if master_addr else []
    # --force_multi: with one host, DeepSpeed would start the ranks here, whatever the host's name.
    return [*_runner(), f"--hostfile={path}", "--force_multi", *address, f"--master_port={port}", *_program(order)]


def _runner() -> list[str]:
    # Its log would hide what the ranks print: the whole encoded order, several times.
    return [sys.executable, "-P", "-m", "deepspeed.launcher.runner", "--log_level=critical"]


def _program(order: str) -> list[str]:
    return ["--no_local_rank", "--module", "fcn_dist.launching.start", order]


def runner_mark(job: Path) -> str:
    """What the runner of several hosts, pdsh and ssh have in place of the job's name.

    They relay the output of ranks that an agent on this host lets save, and must outlive them.
    """
    return f"{job}-runner"


def local_environment(job: Path) -> dict[str, str]:
    """All that this process has, for the runner and its ranks."""
    return {**os.environ, "PYTHONPATH": python_path(), JOB_VARIABLE: str(job)}


def hosts_environment(job: Path, folder: Path) -> dict[str, str]:
    """For the runner of several hosts: what it exports is plain, and its export file is ours, written to `folder`.

    So .deepspeed_env files are not read by DeepSpeed; `exported` reads them.
    """
    path = python_path()
    check_plain(path, "PYTHONPATH")
    (folder / "environment").write_text(f"{JOB_VARIABLE}={job}\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_EXPORTED)}
    return {**kept, "PYTHONPATH": path, JOB_VARIABLE: runner_mark(job), "DS_ENV_FILE": str(folder / "environment")}
