"""launch/slurm/train.sbatch on a real Slurm: preempted, requeued, cancelled."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hosts import ROOT, Cluster, cluster
from jobs import RECIPE, journal

from fcn_dist.checkpoints.store import open_checkpoint
from fcn_dist.data.packing.run import pack
from fcn_dist.data.synthetic import render

BATCH_FILE = ROOT / "launch" / "slurm" / "train.sbatch"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
LIMIT = 200.0  # seconds for whatever is waited for
ENDLESS = 1_000_000  # steps

# cred_expire: a requeued job waits for so many seconds, and for 120 unless told.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=h1
SlurmUser=root
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=h1 NodeAddr=127.0.0.1 Port=7001 CPUs=1
NodeName=n2 NodeHostname=h1 NodeAddr=127.0.0.1 Port=7002 CPUs=1
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=n1,n2 PriorityTier=10
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Slurm:
    """A controller and two nodes on one host."""

    hosts: Cluster

    @property
    def folder(self) -> Path:
        """What nodes and tests share."""
        return self.hosts.folder

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands in the shared folder."""
        enter = self.hosts.command(self.hosts.hosts[0], ["env", "-C", str(self.folder), *command])
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(enter, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def submit(self, arguments: Sequence[str], *options: str) -> str:
        """Queue the batch file on both nodes; returns the job's number."""
        size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
        return self.call("sbatch", "--parsable", *size, *options, str(BATCH_FILE), *arguments)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED ..."""
        shown = self.call("scontrol", "show", "job", job, "--oneliner")
        return shown.partition("JobState=")[2].split()[0]

    def restarts(self, job: str) -> int:
        """How often a job was requeued."""
        return int(self.call("scontrol", "show", "job", job, "--oneliner").partition("Restarts=")[2].split()[0])

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something to become true."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, f"not in {LIMIT:g} s: {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in NEEDED if not shutil.which(name, path=path)]:
        pytest.skip(f"{', '.join(missing)} not installed; run tests/cluster/packages.sh")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    with cluster(folder, 1) as hosts:
        with (folder / "hosts").open("a") as names:
            names.write("127.0.0.1 n1 n2\n")
        made = Slurm(hosts)
        made.call("sh", str(ROOT / "tests" / "cluster" / "slurm.sh"), str(folder))
        made.until(
            lambda: made.call("sinfo", "--noheader", "--format=%T", "--partition=low") == "idle", "two idle nodes"
        )
        yield made


@pytest.fixture(scope="module")
def shards(slurm: Slurm) -> Path:
    render(slurm.folder / "scenes", training=11, validation=1, size=(48, 64), seed=3)
    pack(slurm.folder / "scenes", slurm.folder / "packed", samples_per_shard=4)
    return slurm.folder / "packed"


def arguments(shards: Path, run: Path, recipe: Path) -> list[str]:
    zero = ROOT / "launch" / "zero" / "zero1_fp32.json"
    given = ["--shards", str(shards), "--output", str(run), "--recipe", str(recipe)]
    return [*given, "--deepspeed_config", str(zero)]


def write_recipe(path: Path, steps: int) -> Path:
    values: dict[str, Any] = {**RECIPE, "schedule": {**RECIPE["schedule"], "steps": steps}}
    path.write_text(json.dumps(values))
    return path


def steps(run: Path) -> list[int]:
    return [line["step"] for line in journal(run, "train")]


def test_a_job_is_preempted_and_signalled_and_requeued_until_it_has_finished(slurm: Slurm, shards: Path) -> None:
    run, recipe = slurm.folder / "run", write_recipe(slurm.folder / "recipe.json", ENDLESS)
    job = slurm.submit(arguments(shards, run, recipe))
    slurm.until(lambda: len(steps(run)) >= 3, "three steps")

    urgent = slurm.call("sbatch", "--parsable", "--partition=high", "--nodes=2", "--wrap=true")
    slurm.until(lambda: slurm.restarts(job) == 1, "a requeue after the preemption")
    trained = steps(run)
    saved = open_checkpoint(run)[0].state.step
    assert trained == list(range(1, saved + 1)), "what was trained was saved, and nothing was lost"
    slurm.until(lambda: slurm.state(urgent) == "COMPLETED", "the end of the job that was in a hurry")

    slurm.until(lambda: len(steps(run)) >= saved + 3, "three steps more")
    # What --signal=USR1@300 does five minutes before the job's time is up.
    slurm.call("scancel", "--signal=USR1", job)
    slurm.until(lambda: slurm.restarts(job) == 2, "a requeue after the signal")
    trained, saved = steps(run), open_checkpoint(run)[0].state.step
    assert trained == list(range(1, saved + 1))

    write_recipe(recipe, saved + 500)  # read as the job begins again
    slurm.until(lambda: slurm.state(job) == "COMPLETED", "the end")
    assert steps(run) == list(range(1, saved + 501))
    begun = [line["step"] for line in journal(run, "start")]
    assert len(begun) == 3 and begun[0] == 0 and begun[2] == saved, "no step was trained twice"
    for rank in range(2):
        assert (slurm.folder / f"fcn-dist-{job}-rank-{rank}.log").exists()
    assert "2 ranks x" in (slurm.folder / f"fcn-dist-{job}-rank-0.log").read_text()


def test_a_cancelled_job_saves_and_stays_away(slurm: Slurm, shards: Path) -> None:
    run, recipe = slurm.folder / "cancelled", write_recipe(slurm.folder / "recipe2.json", ENDLESS)
    job = slurm.submit(arguments(shards, run, recipe))
    slurm.until(lambda: len(steps(run)) >= 3, "three steps")
    slurm.call("scancel", job)
    slurm.until(
        lambda: (
            slurm.call("squeue", "--noheader", "--jobs", job, "--states=all") == ""
            or slurm.call("squeue", "--noheader", "--jobs", job) == ""
        ),
        "an empty queue",
    )
    assert slurm.state(job) == "CANCELLED" and slurm.restarts(job) == 0
    assert open_checkpoint(run)[0].state.step == len(steps(run))


def test_what_a_user_can_fix_is_not_requeued(slurm: Slurm, shards: Path) -> None:
    run, recipe = slurm.folder / "wrong", write_recipe(slurm.folder / "recipe3.json", ENDLESS)
    job = slurm.submit([*arguments(shards, run, recipe), "--set", "model.wdth=1"])
    slurm.until(lambda: slurm.state(job) == "FAILED", "a failure")
    assert slurm.restarts(job) == 0
    assert "ExitCode=2:0" in slurm.call("scontrol", "show", "job", job, "--oneliner")
    assert "unknown recipe key model.wdth" in (slurm.folder / f"fcn-dist-{job}-rank-0.log").read_text()
