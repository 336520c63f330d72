"""The ways to turn a checkpoint into one file, each run in a process of its own: seconds and peak memory out.

Memory is counted by a process beside it that reads /proc/PID/status every millisecond. `anonymous` (RssAnon) is what
the process alone holds: pages of files that it maps, which the system takes back whenever it needs them, are not in
it. `resident` (VmHWM) counts those too. Both are what is above the process with its modules imported.
"""

import gc
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from fcn_dist.files import sync

CONVERT = Path(__file__).resolve().parents[1] / "launch" / "convert.py"
INTERVAL = 0.001  # seconds
ANONYMOUS, RESIDENT, MOST_RESIDENT = "RssAnon", "VmRSS", "VmHWM"


def deepspeed(run: str, out: str, safe: bool = False, flush: bool = False) -> dict[str, Any]:
    """DeepSpeed's converter; `safe`: to safetensors instead of torch's own form; `flush`: until its file is on disk."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    folder = _checkpoint(run)
    with measured() as figures:
        convert_zero_checkpoint_to_fp32_state_dict(
            str(folder), out, max_shard_size=None, safe_serialization=safe, tag="deepspeed"
        )
        if flush:
            for path in Path(out).rglob("*"):
                sync(path)
    return {**figures, **_written(Path(out))}


def unproven(run: str, out: str) -> dict[str, Any]:
    """What ours does of what DeepSpeed's does: the weights, joined and written, and no more."""
    import torch

    from fcn_dist.checkpoints.consolidate import AT_ONCE, Consolidated, consolidate
    from fcn_dist.checkpoints.store import read_state
    from fcn_dist.deploy.modelfile import write_model_file
    from fcn_dist.model.description import ModelDescription

    folder, path = _checkpoint(run), Path(out + ".safetensors")
    with measured() as figures:
        with torch.device("meta"):
            description = ModelDescription.from_dict(read_state(folder).model)
            model = description.build()

        def write(found: Consolidated) -> None:
            runs = {name: tensor.runs(AT_ONCE) for name, tensor in found.split.items()}
            write_model_file(path, runs, description, {}, "float32")

        consolidate(folder / "deepspeed", model, use=write)
    return {**figures, **_written(path)}


def proven(run: str, out: str) -> dict[str, Any]:
    """What the command does."""
    from fcn_dist.deploy.convert import convert

    path = Path(out + ".safetensors")
    with measured() as figures:
        convert(run, path)
    return {**figures, **_written(path)}


def command(run: str, out: str, ours: bool) -> dict[str, Any]:
    """Either command, from its start to its end; `cpu` is of all its threads.

    DeepSpeed's script itself cuts its file up by a package of others, which setup.cfg does not name: its function is
    called instead.
    """
    theirs = (
        "import sys; from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert; "
        "convert(sys.argv[1], sys.argv[2], max_shard_size=None, tag='deepspeed')"
    )
    arguments = [str(CONVERT), run, out + ".safetensors"] if ours else ["-c", theirs, str(_checkpoint(run)), out]
    began = perf_counter()
    subprocess.run([sys.executable, *arguments], check=True)
    seconds, used = perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    path = Path(out + ".safetensors") if ours else Path(out)
    return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, **_written(path)}


def _checkpoint(run: str) -> Path:
    return next((Path(run) / "checkpoints").glob("step-*"))


def _written(path: Path) -> dict[str, Any]:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {"bytes": sum(each.stat().st_size for each in files)}


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """`seconds`, `cpu` seconds, and growth of `anonymous` and `resident` at most; there once the block has ended."""
    figures: dict[str, float] = {}
    gc.collect()
    # The peak so far, of the imports, is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status(os.getpid())
    with most_anonymous() as peak:
        began, cpu = perf_counter(), process_time()
        yield figures
        figures["seconds"], figures["cpu"] = perf_counter() - began, process_time() - cpu
    after = _status(os.getpid())
    figures["anonymous"] = peak[0] - before[ANONYMOUS]
    figures["resident"] = after[MOST_RESIDENT] - before[RESIDENT]


@contextmanager
def most_anonymous() -> Iterator[list[int]]:
    """The most of RssAnon that a forked child sees of this process; there once the block has ended."""
    peak = [0]
    stop_read, stop = os.pipe()
    answer, answer_write = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if not child:
        try:
            os.close(stop)
            os.set_blocking(stop_read, False)
            most = 0
            while _is_open(stop_read):
                most = max(most, _status(parent)[ANONYMOUS])
                time.sleep(INTERVAL)
            os.write(answer_write, str(most).encode())
        finally:
            os._exit(0)
    os.close(stop_read)
    os.close(answer_write)
    try:
        yield peak
    finally:
        os.close(stop)
        peak[0] = int(os.read(answer, 100))
        os.close(answer)
        os.waitpid(child, 0)


def _is_open(pipe: int) -> bool:
    try:
        return bool(os.read(pipe, 1))  # its end is read as nothing
    except BlockingIOError:
        return True


def _status(pid: int) -> dict[str, int]:
    """Bytes by name."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
