"""Training jobs of real processes, to be watched, signalled and killed while they run."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import free_port

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
STARTS_WITHIN = 150.0  # seconds, on a busy machine
ENDS_WITHIN = 30.0  # seconds from the end of a launcher until nothing is left: what is promised
ENDLESS = 1_000_000  # steps

# Everything random is on: crops, mirroring, jitter, dropout.
RECIPE: dict[str, Any] = {
    "data": {"crop": [32, 40], "scale": [0.5, 1.5], "jitter": 0.2, "workers": 1},
    "model": {"width": 0.0625, "head_width": 24, "dropout": 0.3},
    "schedule": {"steps": ENDLESS, "kind": "constant", "learning_rate": 0.002},
    "train": {"global_batch": 4, "seed": 5},
    "evaluate": {"at_end": False},
    "checkpoint": {"every": 0},
    "log": {"every": 1},
}

_numbers = itertools.count(1)


@dataclass(frozen=True)
class RunningJob:
    """A command, and what it has started."""

    process: "subprocess.Popen[bytes]"
    run: Path
    log: Path
    mark: bytes  # in the environment of all that it has started, whatever group or session that is in

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The run's journal."""
        return journal(self.run, event)

    def until(self, condition: Callable[[], bool], seconds: float = STARTS_WITHIN) -> None:
        """Wait for something to become true while the job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it has not come to it\n{self.output()}"
            assert self.process.poll() is None or condition(), f"it ended before\n{self.output()}"
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        """Wait until so many steps are trained."""
        self.until(lambda: any(line["step"] >= step for line in self.lines("train")))

    def members(self) -> list[int]:
        """The command and all that it has started and that still runs."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # of zombies, the environment is empty
                if self.mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by their rank."""
        found = {}
        for pid in self.members():
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                words, parent = process.cmdline(), process.parent()
                # A loader process is a fork of its rank and looks like it.
                if not parent or "launch" in words or any("launcher" in word or "torchrun" in word for word in words):
                    continue
                if any(word.endswith(".py") for word in words) and parent.cmdline() != words:
                    found[int(process.environ().get("RANK", 0))] = process
        return [found[rank] for rank in sorted(found)]

    def launcher(self) -> psutil.Process:
        """DeepSpeed's launcher child."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "deepspeed.launcher.launch" in child.cmdline())

    def ended(self, within: float = ENDS_WITHIN) -> int:
        """The command's exit code, once it and all it has started are gone."""
        try:
            code = self.process.wait(STARTS_WITHIN)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it has not ended\n{self.output()}")
        deadline = time.monotonic() + within
        while left := self.members():
            assert time.monotonic() < deadline, f"{[psutil.Process(pid).cmdline() for pid in left]}\n{self.output()}"
            time.sleep(0.1)
        return code

    def output(self) -> str:
        """All that was printed."""
        return self.log.read_text(errors="replace")[-8000:]


@contextmanager
def running(command: Sequence[str], run: Path, environment: dict[str, str] | None = None) -> Iterator[RunningJob]:
    """A command in a process group of its own, of which nothing is left after the block."""
    number = next(_numbers)
    log = run.with_name(f"{run.name}-{number}.log")
    mark = f"FCN_DIST_TEST_JOB={os.getpid()}-{number}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=run.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {}), **dict([mark.split("=")])},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            job = RunningJob(process, run, log, mark.encode())
            yield job
        finally:
            while left := job.members():
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()


def train_command(
    shards: Path, run: Path, *more: str, ranks: int = 0, config: str = "zero1_fp32", script: Path = TRAIN
) -> list[str]:
    """`deepspeed --num_gpus RANKS launch/train.py ...`, or without a launcher if `ranks` is 0."""
    python = [sys.executable, "-u"]
    if ranks:
        python += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", free_port()]
    return [*python, str(script), *train_arguments(shards, run, *more, config=config)]


def train_arguments(shards: Path, run: Path, *more: str, config: str = "zero1_fp32") -> list[str]:
    """Of launch/train.py, for the small recipe."""
    recipe = run.with_name("recipe.json")  # JSON is YAML
    recipe.write_text(json.dumps(RECIPE))
    arguments = ["--shards", str(shards), "--output", str(run), "--recipe", str(recipe)]
    zero = ROOT / "launch" / "zero" / f"{config}.json"
    return [*arguments, "--deepspeed_config", str(zero), *more]


def journal(run: Path, event: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that tell of `event`; its last line may be half written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in whole if line["event"] == event]
