"""Training over hosts: network namespaces with an sshd each, pdsh between them, the real launcher."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import Cluster, cluster, fcn_dist
from jobs import RECIPE, ROOT, TRAIN
from launching import free_port

from fcn_dist.checkpoints.store import open_checkpoint
from fcn_dist.data.packing.run import pack
from fcn_dist.data.synthetic import render
from fcn_dist.errors import EXIT_REQUEUE, EXIT_STUCK

LIMIT = 240.0  # seconds for a training to start, or to end
END_LIMIT = 30.0  # seconds in which nothing may be left of a job
STEPS = 4
HOST_TIMEOUT = 10.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts."""
    with cluster(tmp_path_factory.mktemp("cluster"), 3) as made:
        yield made


@pytest.fixture(scope="module")
def shards(hosts: Cluster) -> Path:
    """On the disk that the hosts share."""
    render(hosts.folder / "scenes", training=11, validation=1, size=(48, 64), seed=3)
    pack(hosts.folder / "scenes", hosts.folder / "packed", samples_per_shard=4)
    return hosts.folder / "packed"


def arguments(shards: Path, run: Path, *more: str, steps: int = STEPS) -> list[str]:
    recipe = shards.parent / f"recipe-{steps}.json"
    values: dict[str, Any] = {
        **RECIPE,
        "train": {"global_batch": 6, "seed": 5},
        "schedule": {**RECIPE["schedule"], "steps": steps},
    }
    recipe.write_text(json.dumps(values))
    zero = ROOT / "launch" / "zero" / "zero1_fp32.json"
    given = ["--shards", str(shards), "--output", str(run), "--recipe", str(recipe), "--deepspeed_config", str(zero)]
    return [*given, *more]


@contextmanager
def job(hosts: Cluster, command: list[str], folder: Path, on: int = 0) -> Iterator["subprocess.Popen[str]"]:
    """A command on a host, in `folder`; whatever it starts anywhere is gone after the block."""
    where = hosts.hosts[on]
    folder.mkdir(exist_ok=True)
    enter = hosts.command(where, command)
    enter[enter.index(f"--wd={Path.cwd()}")] = f"--wd={folder}"
    with (hosts.folder / "output").open("w") as output:
        process = subprocess.Popen(enter, env=hosts.environment(), stdout=output, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        for host in hosts.hosts:
            for left in host.processes():
                with suppress(psutil.NoSuchProcess):
                    left.kill()
        process.wait()


def output(hosts: Cluster) -> str:
    return (hosts.folder / "output").read_text(errors="replace")


def finished(hosts: Cluster, process: "subprocess.Popen[str]", code: int = 0) -> None:
    """The command ends with `code`, and nothing is left on any host."""
    found = process.wait(LIMIT)
    assert found == code, output(hosts)[-8000:]
    deadline = time.monotonic() + END_LIMIT
    while left := [(host.name, command_of(p)) for host in hosts.hosts for p in host.processes()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def command_of(process: psutil.Process) -> list[str]:
    """Empty for one that has ended since it was listed."""
    with suppress(psutil.NoSuchProcess):
        return list(process.cmdline())
    return []


def losses(run: Path) -> list[float]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    journal = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line["loss"] for line in journal if line["event"] == "train"]


def until_step(hosts: Cluster, process: "subprocess.Popen[str]", run: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT
    while len(losses(run)) < step:
        assert time.monotonic() < deadline and process.poll() is None, output(hosts)[-8000:]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def reference(hosts: Cluster, shards: Path) -> list[float]:
    """The losses of one rank on one host."""
    run = hosts.folder / "reference"
    with job(hosts, [sys.executable, str(TRAIN), *arguments(shards, run)], hosts.folder) as process:
        finished(hosts, process)
    assert len(set(losses(run))) == STEPS
    return losses(run)


def test_three_hosts_train_as_one_does(hosts: Cluster, shards: Path, reference: list[float]) -> None:
    run = hosts.folder / "three"
    start = fcn_dist("train", "--hostfile", str(hosts.hostfile(3, 1)))
    with job(hosts, [*start, *arguments(shards, run)], hosts.folder) as process:
        finished(hosts, process)
    assert losses(run) == pytest.approx(reference, rel=2e-5)
    for host in hosts.hosts:
        assert f"{host.name}: " in output(hosts)


def test_deepspeeds_own_command_trains_on_two_hosts(hosts: Cluster, shards: Path, reference: list[float]) -> None:
    run, folder = hosts.folder / "plain", hosts.folder / "plain-folder"
    folder.mkdir()
    (folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts.hostfile(2, 1))]
    master = ["--master_addr", hosts.hosts[0].address, "--master_port", free_port()]
    with job(hosts, [*start, *master, str(TRAIN), *arguments(shards, run)], folder) as process:
        finished(hosts, process)
    assert losses(run) == pytest.approx(reference, rel=2e-5)


def test_what_a_shell_would_act_on_reaches_the_ranks_of_two_hosts_as_it_is(
    hosts: Cluster, shards: Path, reference: list[float]
) -> None:
    """Folder to work in, run folder and a variable hold all that shells know; the hosts' own shells see none of it."""
    hostile = "a b;touch pwned $(touch pwned) `touch pwned` & \"c\" 'd' | > pwned %n %h \\ $HOME *~!"
    folder = hosts.folder / hostile
    run = folder / f"run {hostile}"
    start = fcn_dist("train", "--hostfile", str(hosts.hostfile(2, 1)))
    folder.mkdir()
    (folder / ".deepspeed_env").write_text(f"FREE_TEXT={hostile}\n")
    seen = []
    with job(hosts, [*start, *arguments(shards, Path(f"run {hostile}"), steps=200)], folder) as process:
        until_step(hosts, process, run, STEPS)
        for host in hosts.hosts[:2]:
            for rank in host.processes():
                with suppress(psutil.Error):
                    if rank.environ().get("FCN_DIST_RANK_PID"):
                        seen.append((rank.cwd(), rank.environ()["FREE_TEXT"]))
        for supervisor in hosts.hosts[0].processes():
            if "--hostfile" in command_of(supervisor):
                supervisor.send_signal(signal.SIGTERM)
        finished(hosts, process, EXIT_REQUEUE)
    assert set(seen) == {(str(folder), hostile)} and len(seen) >= 2
    assert losses(run)[:STEPS] == pytest.approx(reference, rel=2e-5)
    assert open_checkpoint(run)[0].state.step == len(losses(run))
    places = [hosts.folder, Path.home(), Path("/"), Path.cwd()]
    places += [Path(f"/proc/{host.pid}/root/tmp") for host in hosts.hosts]
    assert not [path for place in places for path in (place / "pwned", folder / "pwned") if path.exists()]


def test_a_host_that_is_cut_off_is_named_and_the_run_goes_on_without_it(hosts: Cluster, shards: Path) -> None:
    run = hosts.folder / "cut"
    last = hosts.hosts[2]
    file = hosts.folder / "two-of-three"
    file.write_text(f"h1 slots=1\n{last.name} slots=1\n")
    start = fcn_dist("train", "--hostfile", str(file), "--host_timeout", str(HOST_TIMEOUT), "--grace", "5")
    more = ["--auto-resume", "--set", "checkpoint.every=2"]
    with job(hosts, [*start, *arguments(shards, run, *more, steps=100_000)], hosts.folder) as process:
        until_step(hosts, process, run, 4)
        hosts.cut(last)
        finished(hosts, process, EXIT_STUCK)
    told = [line for line in output(hosts).splitlines() if line.startswith("fcn-dist: ")]
    assert any(f"host {last.name} (ranks 1) does not answer" in line for line in told), told
    trained = len(losses(run))
    saved = open_checkpoint(run)[0].state.step
    assert trained - 4 <= saved <= trained
    left = fcn_dist("train", "--ranks", "2", *arguments(shards, run, *more, steps=saved + 2))
    with job(hosts, left, hosts.folder) as process:
        finished(hosts, process)
    assert len(losses(run)) == saved + 2


def test_a_host_that_ssh_does_not_reach_is_named_before_anything_is_started(hosts: Cluster, shards: Path) -> None:
    file = hosts.folder / "one-unknown"
    file.write_text("h1 slots=1\nh9 slots=1\n")
    start = fcn_dist("train", "--hostfile", str(file))
    with job(hosts, [*start, *arguments(shards, hosts.folder / "never")], hosts.folder) as process:
        finished(hosts, process, 2)
    assert "no answer from host h9" in output(hosts) and "Traceback" not in output(hosts)
    assert not (hosts.folder / "never").exists()


def test_nothing_is_left_on_any_host_when_the_command_is_killed(hosts: Cluster, shards: Path) -> None:
    run = hosts.folder / "killed"
    start = fcn_dist("train", "--hostfile", str(hosts.hostfile(2, 1)))
    with job(hosts, [*start, *arguments(shards, run, steps=100_000)], hosts.folder) as process:
        until_step(hosts, process, run, 2)
        for supervisor in hosts.hosts[0].processes():
            if "--hostfile" in command_of(supervisor):
                supervisor.kill()
        finished(hosts, process, -signal.SIGKILL)  # nsenter ends as what it runs does
    assert open_checkpoint(run)[0].state.step == len(losses(run))
