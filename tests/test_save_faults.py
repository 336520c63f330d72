"""Saves that end badly: killed at every phase, on a disk without room, in a folder that another job has."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import ROOT, TRAIN, journal, running, train_arguments, train_command
from launching import run_ranks

from fcn_dist.checkpoints.store import committed, open_checkpoint, step_of
from fcn_dist.errors import EXIT_REQUEUE, UserError

KILL = ROOT / "tests" / "kill_in_save.py"
ON_EVERY_RANK = ["taking copies", "in a file", "all written"]
ON_RANK_ZERO = [  # the only one that writes several files, and that commits
    "between files",
    "before the manifest",
    "before the rename",
    "before latest",
    "before old ones go",
    "while old ones go",
]
TRIALS = [
    (phase, rank, background)
    for background in (True, False)
    for phase, ranks in (*((p, (0, 1)) for p in ON_EVERY_RANK), *((p, (0,)) for p in ON_RANK_ZERO))
    for rank in ranks
]
EVERY = ("--set", "checkpoint.every=2", "--set", "checkpoint.keep=2")


FAILURE = "could not be written"
TIME_LIMIT = 200.0  # seconds of a job


def failures_told(output: str) -> int:
    """By rank 0, which speaks for all; another rank that is not ended within its grace tells its own error as well."""
    return sum(FAILURE in line and not line.startswith("error (rank 1): ") for line in output.splitlines())


def train(shards: Path, run: Path, *more: str, config: str = "zero1_fp32", script: Path = TRAIN, code: int = 0) -> str:
    """Train on two ranks; returns what they print."""
    return run_ranks(script, train_arguments(shards, run, *more, config=config), 2, run.parent, TIME_LIMIT, code)


def losses(run: Path) -> dict[int, float]:
    """By step; of a step that was trained twice, the later."""
    return {line["step"]: line["loss"] for line in journal(run, "train")}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_rank_killed_at_any_phase_of_a_save_loses_no_more_than_the_steps_since(shards: Path, tmp_path: Path) -> None:
    """Each of the 24 jobs continues what the one before it left, and is killed in its second save."""
    run, found = tmp_path / "run", 0
    for phase, rank, background in TRIALS:
        options = [*EVERY, "--auto-resume", "--set", f"checkpoint.background={str(background).lower()}"]
        arguments = [phase, str(rank), "2", *train_arguments(shards, run, *options, config="zero2_fp32")]
        output = run_ranks(KILL, arguments, 2, tmp_path, TIME_LIMIT, code=-signal.SIGKILL)
        checkpoint, damages = open_checkpoint(run)
        # The save before is whole at least, whatever the phase; only what was being removed may be half there.
        assert checkpoint.state.step >= found + 2, f"{phase} on rank {rank}\n{output}"
        assert not damages
        found = checkpoint.state.step
    assert len(TRIALS) == 24

    train(shards, run, "--resume", "--steps", str(found + 1))
    leftovers = [path.name for path in (run / "checkpoints").iterdir() if path.name.endswith(".partial")]
    assert leftovers == []
    undisturbed = tmp_path / "undisturbed"
    train(shards, undisturbed, "--steps", str(found + 1))
    assert losses(run) == losses(undisturbed)


# ---- damage ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 2 and 4, as two ranks write them."""
    run = tmp_path_factory.mktemp("saved") / "run"
    train(shards, run, *EVERY, "--steps", "4", config="zero2_bf16")
    return run


def damage(path: Path, kind: str, draw: random.Random) -> None:
    """Change a file for certain."""
    size = path.stat().st_size
    if kind == "flip":
        with path.open("r+b") as file:
            at = draw.randrange(size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    elif kind == "truncate":
        os.truncate(path, draw.randrange(size))
    elif kind == "extend":
        with path.open("ab") as file:
            file.write(draw.randbytes(draw.randrange(1, 100)))
    else:
        path.unlink()


@pytest.mark.slow
def test_of_two_hundred_random_damages_every_one_is_noticed_and_named(saved: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    newest = run / "checkpoints" / "step-00000004"
    whole = {path: path.read_bytes() for path in sorted(newest.rglob("*")) if path.is_file()}
    assert len(whole) == 5  # DeepSpeed's model file and two optimizer files, probe and manifest
    manifest = json.loads((newest / "manifest.json").read_text())
    kinds = ["flip", "truncate", "extend", "delete"]
    for trial in range(200):
        path, kind = draw.choice(list(whole)), draw.choice(kinds)
        damage(path, kind, draw)
        if path.name == "manifest.json" and kind in ("flip", "extend"):
            try:
                harmless = json.loads(path.read_text()) == manifest  # in the space between JSON's words
            except ValueError:
                harmless = False
            if harmless:
                path.write_bytes(whole[path])
                continue
        checkpoint, damages = open_checkpoint(run)
        assert checkpoint.state.step == 2, f"trial {trial}: {kind} of {path.name} was not noticed"
        assert [one.dir for one in damages] == [newest]
        if path.name != "manifest.json":
            assert path.name in damages[0].reason, damages[0].reason
        path.write_bytes(whole[path])
    assert open_checkpoint(run)[0].state.step == 4


@pytest.mark.slow
@pytest.mark.parametrize("pointer", ["removed", "empty", "dangling", "older"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_training_goes_on_from_the_one_before(
    pointer: str, saved: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    damage(run / "checkpoints" / "step-00000004" / "probe.safetensors", "flip", random.Random(1))
    latest = run / "checkpoints" / "latest"
    if pointer == "removed":
        latest.unlink()
    else:
        latest.write_text({"empty": "", "dangling": "step-00000009\n", "older": "step-00000002\n"}[pointer])
    output = train(shards, run, "--resume", "--steps", "5", config="zero2_bf16")
    assert "step-00000004: probe.safetensors differs from its SHA-256" in output
    assert "continuing after step 2" in output
    assert [step_of(folder) for folder in committed(run)] == [5, 2]
    assert (run / "checkpoints" / "damaged-step-00000004").is_dir()
    assert latest.read_text() == "step-00000005\n"
    before, after = losses(saved), losses(run)
    assert [after[step] for step in (3, 4)] == [before[step] for step in (3, 4)]


@pytest.mark.slow
def test_auto_resume_never_begins_anew_where_checkpoints_have_been(saved: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    for folder in committed(run):
        shutil.rmtree(folder)
    output = train(shards, run, "--auto-resume", config="zero2_bf16", code=2)
    assert "has no checkpoint any more, and it had" in output
    assert losses(run) == losses(saved), "nothing is lost"


# ---- disks without room ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_is_borne_for_some_saves_and_then_ends_the_run_with_its_path(
    background: str, small_disk: Callable[[int], Path], shards: Path, tmp_path: Path
) -> None:
    run = small_disk(4000) / "run"  # room for one checkpoint of the tiny network, not for two
    more = ["--set", "checkpoint.every=2", "--set", "checkpoint.max_failures=2"]
    more += ["--set", f"checkpoint.background={background}", "--set", "model.head_width=64"]
    arguments = train_arguments(shards, run, *more, config="zero2_fp32")
    output = run_ranks(TRAIN, arguments, 2, tmp_path, TIME_LIMIT, code=2)
    assert failures_told(output) == 3 and "training goes on (2 of 2 failures allowed)" in output
    assert "No space left on device" in output and str(run / "checkpoints") in output
    checkpoint, damages = open_checkpoint(run)
    assert (checkpoint.state.step, damages) == (2, [])
    assert "step 2 is the newest checkpoint" in output
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000002"]


@pytest.mark.slow
def test_a_limit_on_file_size_on_one_rank_alone_is_met_by_all_together(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = tmp_path / "limited.py"
    script.write_text(
        "import os, resource, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from fcn_dist.commands.entry import run_script\n"
        "if os.environ['RANK'] == '1':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(run_script('train'))\n"
    )
    more = ["--set", "checkpoint.every=2", "--set", "checkpoint.max_failures=1"]
    output = train(shards, run, *more, config="zero2_fp32", script=script, code=2)
    assert failures_told(output) == 2 and "rank 1: [Errno 27] File too large" in output
    # What came of step 4's is agreed on after a step that finds it over, at the latest when step 6 is to be saved.
    assert [line["step"] for line in journal(run, "train")] in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])
    with pytest.raises(UserError, match="no checkpoint yet"):
        open_checkpoint(run)
    # It is provably fresh, so the same command may begin anew.
    train(shards, run, "--auto-resume", "--steps", "2")


# ---- two jobs, one folder --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_job_in_one_run_folder_is_refused_until_the_first_is_gone(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = train_command(shards, run, "--auto-resume", "--set", "checkpoint.every=2")
    with running(command, run) as first:
        first.until(lambda: bool(first.lines("checkpoint")))
        with running(train_command(shards, run, "--resume"), run) as second:
            assert second.ended() == 2
        assert f"{run} is in use by process {first.ranks()[0].pid} on " in second.output()
        first.until_step(max(line["step"] for line in first.lines("train")) + 2)  # and is not disturbed
        first.process.kill()
        first.ended()
    with running(command, run) as third:
        third.until(lambda: len(third.lines("start")) == 2)
        third.process.terminate()
        assert third.ended() == EXIT_REQUEUE, third.output()


@pytest.mark.slow
def test_ranks_that_do_not_share_the_run_folder_are_refused_before_they_train(shards: Path, tmp_path: Path) -> None:
    """As on nodes whose disks are their own: each rank would keep its part of a checkpoint to itself."""
    run = tmp_path / "run"
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from fcn_dist.commands.entry import run_script\n"
        "from fcn_dist.training import runlock\n"
        "runlock.VISIBLE_WITHIN = 1.0\n"
        "at = sys.argv.index('--output') + 1\n"
        "sys.argv[at] += os.environ['RANK']\n"
        "sys.exit(run_script('train'))\n"
    )
    output = train(shards, run, script=script, code=2)
    assert "rank 1 on " in output and "one folder that all nodes share is needed" in output
    assert not journal(tmp_path / "run0", "start") and not journal(tmp_path / "run1", "start")
