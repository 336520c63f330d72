"""Stragglers: what is found in made-up paces, and in real ranks of which one is slowed down."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from launching import run_ranks

from fcn_dist.training.beats import beat_path
from fcn_dist.training.pace import Pace, find_stragglers

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
HINDERED = ROOT / "tests" / "hindered_ranks.py"
TIME_LIMIT = 200.0  # seconds a launch
SLOWED = 0.2  # seconds a step, by issue 4

RECIPE = """
data: {crop: [32, 40], workers: 1}
model: {width: 0.0625, head_width: 24}
schedule: {steps: 30, learning_rate: 0.002}
train: {global_batch: 6}
evaluate: {at_end: false}
log: {every: 10}
"""


@pytest.mark.parametrize(
    ("paces", "found"),
    [
        pytest.param([(0.0, 0.3), (0.0, 0.31), (0.0, 0.3)], [], id="none"),
        pytest.param([(0.0, 0.3), (0.2, 0.3), (0.0, 0.3)], [(1, True)], id="data"),
        pytest.param([(0.0, 0.3), (0.0, 0.3), (0.0, 0.5)], [(2, False)], id="computing"),
        pytest.param([(0.2, 0.3), (0.2, 0.3), (0.2, 0.5)], [(2, False)], id="computing, and all wait for data"),
        pytest.param([(0.0, 0.1), (0.2, 0.1)], [(1, True)], id="of two ranks"),
        pytest.param([(0.0, 0.3), (0.2, 0.3), (0.0, 0.3), (0.0, 0.6)], [(1, True), (3, False)], id="two of four"),
        pytest.param([(0.0, 0.01), (0.0, 0.05), (0.0, 0.01)], [], id="five times as long, but 40 ms"),
        pytest.param([(0.0, 2.0), (0.2, 2.0), (0.0, 2.0)], [], id="200 ms, but a tenth"),
        pytest.param([(0.3, 0.3)], [], id="alone"),
    ],
)
def test_a_straggler_is_found_with_its_reason(paces: list[tuple[float, float]], found: list[tuple[int, bool]]) -> None:
    stragglers = find_stragglers([Pace(data, computing, 9.0) for data, computing in paces])
    assert [(one.rank, one.waits_for_data) for one in stragglers] == found


def arguments(shards: Path, folder: Path, stage: int) -> list[str]:
    """Of a run in FOLDER/run."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return [
        *("--shards", str(shards), "--output", str(folder / "run"), "--recipe", str(recipe)),
        *("--deepspeed_config", str(ROOT / "launch" / "zero" / f"zero{stage}_fp32.json")),
    ]


def stragglers(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "straggler"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "seconds", "stage", "reason", "words"),
    [
        # Of a sample, two a step: the loader works ahead, so only what is longer than a step is waited for.
        ("data", 3 * SLOWED, 2, "data", "it waits for data"),
        ("forward", SLOWED, 3, "computing", "its computing takes longer"),
        ("backward", SLOWED, 1, "computing", "its computing takes longer"),
    ],
)
def test_a_rank_slowed_by_200_ms_a_step_is_named_once_with_the_reason(
    where: str,
    seconds: float,
    stage: int,
    reason: str,
    words: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three, of micro-batch 2. What other programs do to the machine may bring other ranks into the report too."""
    monkeypatch.setenv("HINDER", f"1:{where}:{seconds}")
    output = run_ranks(HINDERED, [*arguments(shards, tmp_path, stage), "--steps", "20"], 3, tmp_path, TIME_LIMIT)
    of_victim = [line for line in stragglers(tmp_path / "run") if line["rank"] == 1]
    assert [(line["step"], line["reason"]) for line in of_victim] == [(20, reason)]
    (line,) = of_victim
    assert line["computing_seconds"] >= SLOWED if reason == "computing" else line["data_seconds"] > 0.05
    assert f"step 20: rank 1 on {line['host']} slows the others down: {words}" in output


@contextmanager
def in_stops_and_starts(pid: int) -> Iterator[None]:
    """Let a process run for a quarter of the time only."""
    over = threading.Event()

    def beat() -> None:
        with suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.3)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.1)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_a_rank_whose_whole_process_is_slow_is_named(shards: Path, tmp_path: Path) -> None:
    run, victim = tmp_path / "run", 2
    more = ["--steps", "60", "--set", "model.width=0.25", "--set", "data.crop=[96, 128]"]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run_ranks, TRAIN, [*arguments(shards, tmp_path, 2), *more], 3, tmp_path, TIME_LIMIT)
        path = beat_path(run / "ranks", victim)
        while not path.exists():
            assert not job.done(), job.result()
            time.sleep(0.1)
        with in_stops_and_starts(json.loads(path.read_text())["process"]["pid"]):
            job.result()
    assert victim in {line["rank"] for line in stragglers(run)}
