"""A benchmark that is asked to end, while what it has started runs in a group of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CONTENDER = """
import os, signal
def forever(pipe):
    file = open(pipe, "w")
    print(os.getpid(), file=file, flush=True)
    while True:
        signal.pause()
"""
BENCHMARK = """
import sys
from pathlib import Path
from entry import run_benchmark
from measure import Contender, run_rounds
def main(argv):
    run_rounds([Contender("stuck", "contender:forever", {"pipe": argv[0]})], 1, Path(argv[1]))
sys.exit(run_benchmark(main))
"""


@pytest.mark.timeout(60)
def test_what_a_benchmark_has_started_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "contender.py").write_text(CONTENDER)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    environment = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent), str(tmp_path)]),
    }
    benchmark = subprocess.Popen([sys.executable, "-c", BENCHMARK, str(pipe), str(tmp_path)], env=environment)
    with pipe.open() as told:
        contender = int(told.readline())
        assert os.getpgid(contender) != os.getpgid(benchmark.pid)
        benchmark.terminate()
        assert told.read() == "", "until the contender is gone"
    assert benchmark.wait() == 128 + signal.SIGTERM
    assert not psutil.pid_exists(contender)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "its scratch folder is removed"
