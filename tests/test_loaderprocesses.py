"""Loader processes that are killed: the ranks end together, and the run goes on where it was."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from colour_scenes import write_colour_scenes
from launching import launch_ranks, run_alone, run_ranks

from fcn_dist.checkpoints.store import open_checkpoint
from fcn_dist.config import DataConfig
from fcn_dist.data.loader import Batch, build_loader, build_scene_loader
from fcn_dist.data.loaderprocesses import ended_with_the_block
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.errors import EXIT_REQUEUE, EarlyEnd
from fcn_dist.ranks import BatchPlan, Rank

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
TIME_LIMIT = 300.0
STEPS = 40

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    pack(write_colour_scenes(root / "scenes", 12), root / "shards", ["training"], samples_per_shard=4, workers=1)
    return root / "shards"


def batches_of(shards: Path, steps: int = 1000, workers: int = 2) -> Iterator[Batch]:
    shard_set = ShardSet.open(shards, "training")
    config = DataConfig(crop=(40, 56), workers=workers)
    return build_loader(shard_set, SampleStream(shard_set, 3), BatchPlan(2, 2, 1, 1), config, 0, range(steps))


def first_of(items: Iterator[Any]) -> list[BaseProcess]:
    """Take the first of the items, which starts their processes, and return these."""
    before = multiprocessing.active_children()
    next(items)
    return [process for process in multiprocessing.active_children() if process not in before]


def kill(victim: BaseProcess, number: signal.Signals) -> None:
    assert victim.pid
    os.kill(victim.pid, number)
    victim.join(30)
    assert victim.exitcode == -number


@pytest.mark.timeout(60)
def test_a_killed_process_ends_the_loader_at_the_next_batch_by_name(shards: Path) -> None:
    batches = batches_of(shards)
    handler = signal.getsignal(signal.SIGCHLD)
    processes = first_of(batches)
    assert signal.getsignal(signal.SIGCHLD) == handler
    kill(processes[1], signal.SIGKILL)
    # Batches that other processes have ready are not waited for: the sooner the ranks know, the better.
    with pytest.raises(EarlyEnd, match="one of the 2 loader processes of rank 0 was killed by SIGKILL"):
        next(batches)


@pytest.mark.timeout(60)
def test_a_process_killed_while_a_batch_is_waited_for_is_named_too(shards: Path) -> None:
    batches = batches_of(shards, workers=1)
    (victim,) = first_of(batches)
    assert victim.pid
    os.kill(victim.pid, signal.SIGSTOP)
    taken = time.monotonic()

    def kill_once_nothing_comes() -> None:
        while time.monotonic() - taken < 1:
            time.sleep(0.05)
        os.kill(victim.pid or 0, signal.SIGKILL)

    with ThreadPoolExecutor() as pool, pytest.raises(EarlyEnd, match="killed by SIGKILL") as caught:
        pool.submit(kill_once_nothing_comes)
        for _ in batches:  # what was ready
            taken = time.monotonic()
    assert caught.value.code == EXIT_REQUEUE


@pytest.mark.timeout(60)
def test_one_that_ends_in_another_way_is_a_bug(shards: Path) -> None:
    batches = batches_of(shards)
    kill(first_of(batches)[0], signal.SIGSEGV)
    with pytest.raises(RuntimeError, match=f"a loader process ended with exit code -{int(signal.SIGSEGV)}"):
        next(batches)


@pytest.mark.timeout(60)
def test_none_outlives_its_block_and_others_do(shards: Path) -> None:
    others = first_of(others_batches := batches_of(shards))
    with pytest.raises(KeyboardInterrupt), ended_with_the_block():
        batches = batches_of(shards)
        own = first_of(batches)
        for process in own:
            assert process.pid
            os.kill(process.pid, signal.SIGSTOP)  # it takes no SIGTERM now
        raise KeyboardInterrupt
    for process in own:
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    assert all(process.is_alive() for process in others) and next(others_batches)


@pytest.mark.timeout(60)
def test_processes_that_are_done_are_no_failure(shards: Path) -> None:
    batches = batches_of(shards, 5)
    assert len(list(batches)) == 5


@pytest.mark.timeout(60)
def test_an_evaluation_is_told_as_well(shards: Path) -> None:
    scenes = build_scene_loader(ShardSet.open(shards, "training"), Rank(), 2)
    kill(first_of(scenes)[0], signal.SIGKILL)
    with pytest.raises(EarlyEnd, match="killed by SIGKILL"):
        list(scenes)


# ---- with real ranks

RECIPE = f"""
data: {{crop: [32, 40], scale: [0.5, 1.5], jitter: 0.2, workers: 2}}
model: {{width: 0.0625, head_width: 24, dropout: 0.3}}
schedule: {{steps: {STEPS}, learning_rate: 0.002}}
train: {{global_batch: 4, seed: 5}}
evaluate: {{at_end: false}}
checkpoint: {{every: 10}}
log: {{every: 1}}
"""


def arguments(folder: Path, shards: Path, run: Path) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    named = ["--shards", str(shards), "--output", str(run), "--recipe", str(recipe)]
    return [*named, "--deepspeed_config", str(ROOT / "launch" / "zero" / "zero2_fp32.json")]


def lines(run: Path, event: str) -> list[dict[str, Any]]:
    journal = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in journal if line["event"] == event]


def processes_of(run: Path) -> dict[int, tuple[int, str]]:
    """Living processes whose command names `run`: their parents, and the RANK they were given."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(run).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                rank = [v for v in (folder / "environ").read_text().split("\0") if v.startswith("RANK=")]
                if fields[0] != "Z":
                    found[int(folder.name)] = (int(fields[1]), rank[0] if rank else "")
    return found


def kill_a_loader_process_of_rank_1(run: Path) -> float:
    """After step 14: between two checkpoints."""
    deadline = time.monotonic() + TIME_LIMIT
    journal = run / "metrics.jsonl"
    while not (journal.exists() and '"train", "step": 14,' in journal.read_text()):
        assert time.monotonic() < deadline, "the run has not come to it"
        time.sleep(0.02)
    processes = processes_of(run)
    # A loader process is forked from its rank: its parent has the same RANK.
    victims = [pid for pid, (parent, rank) in processes.items() if rank == "RANK=1" and processes[parent][1] == rank]
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    return time.monotonic()


@pytest.mark.slow
def test_a_killed_loader_process_of_one_rank_ends_all_and_a_resume_trains_what_it_would_have(
    shards: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = arguments(tmp_path, shards, run)
    with ThreadPoolExecutor() as pool:
        killing = pool.submit(kill_a_loader_process_of_rank_1, run)
        output = launch_ranks(TRAIN, command, 2, tmp_path, TIME_LIMIT, code=EXIT_REQUEUE)
        assert time.monotonic() - killing.result() < 30
    assert output.count("one of the 2 loader processes of rank 1 was killed by SIGKILL") == 1
    assert "Traceback" not in output
    assert not processes_of(run)
    saved = open_checkpoint(run)[0].state.step
    assert 10 <= saved < STEPS and saved % 10 == 0
    assert f"continuing after step {saved}" in run_ranks(TRAIN, [*command, "--resume"], 2, tmp_path, TIME_LIMIT)
    run_ranks(TRAIN, arguments(tmp_path, shards, whole), 2, tmp_path, TIME_LIMIT)
    losses = [[line["loss"] for line in lines(one, "train")] for one in (run, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


@pytest.mark.slow
def test_a_loader_process_killed_in_training_without_a_launcher_ends_it_alike(shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "killing.py"
    script.write_text(
        "import multiprocessing, os, signal, sys\n"
        "from fcn_dist.commands.entry import run_script\n"
        "from fcn_dist.training.loop import Meter\n"
        "add_step = Meter.add_step\n"
        "def kill(meter, finite):\n"
        "    add_step(meter, finite)\n"
        "    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)\n"
        "Meter.add_step = kill\n"
        "sys.exit(run_script('train'))\n"
    )
    command = arguments(tmp_path, shards, tmp_path / "run")
    output = run_alone(script, command, tmp_path, TIME_LIMIT, code=EXIT_REQUEUE)
    assert output.count("was killed by SIGKILL") == 1 and "Traceback" not in output
