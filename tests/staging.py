"""What the pages' commands find: a folder a page, with the checkout's scripts and small inputs by the pages' own names.

Commands run as they stand, in a network of their own where one can be made, so that the ports they name are free.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import cv2
import numpy as np
import pytest
import torch
from launching import run_alone

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 200.0  # seconds, of one command
CLASSES = ("road", "car", "sky")
RECIPE = """\
data: {crop: [32, 32], workers: 0}
model: {width: 0.0625, head_width: 8}
schedule: {steps: 80, learning_rate: 0.01}
train: {global_batch: 2, ema: 0.9}
evaluate: {every: 40}
checkpoint: {every: 40}
log: {every: 1, layers: 10}
"""
# By page: what lies in its folder before the first command. The names on the right are those of the kit.
PREPARED = {
    "README.md": {
        "ADEChallengeData2016": "scenes",
        "camvid": "scenes",
        "runs/fcn8s": "run",
        "photos": "photos",
        "more/places": "photos",
    },
    "docs/clusters.md": {"SHARDS": "shards", "RECIPE": "recipe.yaml"},
    "docs/dataset.md": {"street": "street", "street.yaml": "recipe.yaml", "photos": "photos"},
    "docs/evaluating.md": {
        "shards-ade": "shards",
        "runs/fcn8s": "run",
        "fcn8s.safetensors": "model.safetensors",
        "photos": "photos",
    },
    "docs/formats.md": {"RUN": "run"},
    "docs/modelfile.md": {"RUN": "run", "photos": "photos"},
    "docs/origins.md": {"fcn8s.pth": "theirs.pth", "classes.txt": "classes.txt"},
    "docs/resuming.md": {"SHARDS": "shards", "RECIPE": "recipe.yaml"},
    "docs/serving.md": {"fcn8s.safetensors": "model.safetensors", "scene.jpg": "photos/scene.jpg"},
    "docs/shards.md": {"SCENES": "scenes"},
    "docs/report.md": {"runs/fcn8s": "run", "runs/one": "run", "runs/two": "run"},
    "docs/watching.md": {"SHARDS": "shards", "RUN": "stopped"},
}
# Commands that run until they are told to end, and what they print once they can be used.
SERVERS = {"python launch/serve.py": "http://", "tensorboard ": "http://"}
# A job of an array of Slurm's is one of several; here they come one after the other.
ARRAY_VARIABLE, ARRAY_TASKS = "SLURM_ARRAY_TASK_ID", (1, 2, 3, 4)


def make_kit(folder: Path) -> Path:
    """Scenes, shards, a run that is trained to its end and one that was stopped in its middle, a model, photos."""
    folder.mkdir(exist_ok=True)
    shell = Shell(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    shell.run("python shards/synthesize.py scenes --training 8 --validation 4 --size 48x64")
    shell.run("python shards/create.py scenes shards --samples-per-shard 4")
    shell.run("python launch/train.py --shards shards --output run --recipe recipe.yaml")
    shell.run("python launch/convert.py run model.safetensors")
    stop_in_its_middle(folder / "run", folder / "stopped")
    shutil.copytree(folder / "scenes" / "images" / "validation", folder / "photos")
    shutil.copy(next((folder / "photos").iterdir()), folder / "photos" / "scene.jpg")
    make_street(folder / "street")
    from test_pytorch_fcn import NAMES, state_dict

    torch.save(state_dict(), folder / "theirs.pth")
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def stop_in_its_middle(run: Path, stopped: Path) -> None:
    """The run as it was when it had its first checkpoint."""
    shutil.copytree(run, stopped)
    checkpoints = stopped / "checkpoints"
    first, last = sorted(checkpoints.glob("step-*"))
    shutil.rmtree(last)
    (checkpoints / "latest").write_text(first.name)
    journal = (stopped / "metrics.jsonl").read_text().splitlines()
    upto = int(first.name.removeprefix("step-"))
    kept = [line for line in journal if json.loads(line).get("step", 0) <= upto]
    (stopped / "metrics.jsonl").write_text("\n".join(kept) + "\n")


def make_street(folder: Path) -> None:
    """A data set of three classes of one's own: a road, a sky, cars, and a frame that has no label."""
    rng = np.random.default_rng(0)
    rows = "".join(f"{index}\t0.3\t6\t2\t{name}\n" for index, name in enumerate(CLASSES, 1))
    for split, count in (("training", 6), ("validation", 2)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            labels = np.zeros((48, 64), np.uint8)
            labels[2:24, 2:-2], labels[24:-2, 2:-2] = 3, 1
            left = int(rng.integers(4, 40))
            labels[22:36, left : left + 16] = 2
            colours = np.array([[0, 0, 0], [90, 90, 90], [30, 30, 200], [230, 180, 120]], np.int64)
            image = (colours[labels] + rng.integers(0, 25, (48, 64, 3))).astype(np.uint8)
            cv2.imwrite(str(folder / "images" / split / f"{number:03d}.jpg"), image)
            cv2.imwrite(str(folder / "annotations" / split / f"{number:03d}.png"), labels)
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)


def lay_out(page: str, kit: Path, folder: Path) -> None:
    """The page's folder: scripts of the checkout, and copies of what the page's commands begin with."""
    for name in ("launch", "shards", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".curlrc").write_text("fail\n")  # a refusal by the server is a command that failed
    for name, origin in PREPARED.get(page, {}).items():
        put(kit / origin, folder / name)


def put(origin: Path, target: Path) -> None:
    """A copy in place of what was there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    if origin.is_dir():
        shutil.copytree(origin, target)
    else:
        shutil.copy(origin, target)


@dataclass
class Shell:
    """Runs commands as they stand, one after the other, in one folder."""

    folder: Path
    inside: list[str] = field(default_factory=list)  # what brings a command into the page's own network
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, command: str, **variables: str) -> str:
        """All that it prints; fails the test unless it ends with 0.

        One that starts a script of ours, and needs no shell, is a process that begins where the imports end.
        """
        if plain := re.fullmatch(r"python ((?:launch|shards)/\w+\.py)((?: [^$`;|&<>]+)?)", command):
            return run_alone(ROOT / plain[1], shlex.split(plain[2]), self.folder, TIME_LIMIT)
        log = self.folder / ".output.log"
        with log.open("w") as output:
            process = self._start(command, output, variables)
            try:
                code: int | None = process.wait(TIME_LIMIT)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_group(process)
        text = log.read_text()
        if code != 0:
            pytest.fail(f"$ {command}\n{'no end' if code is None else f'exit code {code}'}\n{text[-8000:]}")
        return text

    def serve(self, command: str, ready: str) -> None:
        """Start it and return once it prints `ready`; it is ended with the shell."""
        log = self.folder / f".server-{len(self.servers)}.log"
        with log.open("w") as output:
            process = self._start(command, output, {})
        self.servers.append(process)
        deadline = time.monotonic() + TIME_LIMIT
        while ready not in log.read_text():
            if time.monotonic() > deadline or process.poll() is not None:
                pytest.fail(f"$ {command}\nit did not come up\n{log.read_text()[-8000:]}")
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)

    def end_servers(self) -> None:
        """As ^C does, which must be a good end, or, of a server that is not ours, an end."""
        for process in self.servers:
            os.killpg(process.pid, signal.SIGINT)
            try:
                ours = "launch/" in str(process.args)
                assert process.wait(TIME_LIMIT) in ((0,) if ours else (0, -signal.SIGINT)), process.args
            finally:
                end_group(process)
        self.servers.clear()

    def _start(self, command: str, output: TextIO, variables: dict[str, str]) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            **variables,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # several ranks need a device each, and the CPU has room for all
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "CURL_HOME": str(self.folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            [*self.inside, "bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            text=True,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end_group(process: subprocess.Popen[str]) -> None:
    """Launchers leave processes behind where they are stopped."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def shell_in(folder: Path) -> Iterator[Shell]:
    """A shell whose loopback is its own, where this account can make one."""
    holder = subprocess.Popen(
        ["unshare", "--net", "bash", "-c", "ip link set lo up && echo ready && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert holder.stdin and holder.stdout
    own = holder.stdout.readline() == "ready\n"
    shell = Shell(folder, ["nsenter", f"--net=/proc/{holder.pid}/ns/net"] if own else [])
    try:
        yield shell
        shell.end_servers()
    finally:
        for process in shell.servers:
            end_group(process)
        with suppress(BrokenPipeError):
            holder.stdin.close()
        holder.wait()


def server_of(command: str) -> str | None:
    """What a command prints once it serves; None for one that comes to its end by itself."""
    return next((ready for start, ready in SERVERS.items() if command.startswith(start)), None)


def tasks_of(command: str) -> list[dict[str, str]]:
    """The variables of each time that a command runs."""
    if re.search(rf"\${ARRAY_VARIABLE}\b", command):
        return [{ARRAY_VARIABLE: str(task)} for task in ARRAY_TASKS]
    return [{}]
