"""Entering a run folder: what each way of starting finds, and that nothing begins anew by accident."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from committing import commit_folder

from fcn_dist.checkpoints.commit import prepare, set_aside
from fcn_dist.checkpoints.store import CheckpointState, checkpoints_dir, committed
from fcn_dist.config import Recipe
from fcn_dist.errors import UserError
from fcn_dist.training.entry import Start, clear, enter
from fcn_dist.training.runfolder import METRICS_NAME, RUN_NAME, RunRecord, read_run_record, write_run_record
from fcn_dist.training.runlock import RunLock, sees

RECORD = RunRecord(
    recipe=Recipe().as_dict(),
    deepspeed={},
    model={},
    shards="shards",
    index_sha256={"training": "ab"},
    world_size=2,
    steps=10,
    global_batch=4,
    command="train.py",
    folder="/",
    versions={},
    git={},
    machine={},
)


def save(run: Path, step: int) -> Path:
    folder = prepare(run, step)
    (folder / "deepspeed" / "state.pt").write_bytes(b"state")
    return commit_folder(folder, CheckpointState(step, 4 * step, 2, 1, "float32", {}, {}, {}, "ab", None))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run of ten steps with checkpoints of steps 2 and 4."""
    run = tmp_path / "run"
    run.mkdir()
    write_run_record(run, RECORD)
    save(run, 2)
    save(run, 4)
    return run


@pytest.mark.parametrize("start", [Start.NEW, Start.AUTO])
def test_a_new_run_begins_in_a_folder_that_holds_nothing_but_its_lock(tmp_path: Path, start: Start) -> None:
    (tmp_path / ".lock").touch()
    entry = enter(tmp_path, start, RECORD)
    assert entry.checkpoint is None and not entry.finished
    assert read_run_record(tmp_path).steps == 10


@pytest.mark.parametrize("start", list(Start))
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path, start: Start) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"exists and is no run"):
        enter(tmp_path, start, RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_not_begun_over_another(begun: Path) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        enter(begun, Start.NEW, RECORD)


@pytest.mark.parametrize("start", [Start.RESUME, Start.AUTO])
def test_a_run_is_continued_from_its_newest_checkpoint(begun: Path, start: Start) -> None:
    entry = enter(begun, start, RECORD)
    assert entry.checkpoint and entry.checkpoint.state.step == 4
    assert not entry.damages and not entry.finished


def test_a_finished_run_has_nothing_left_to_do_and_resume_says_what_would(begun: Path) -> None:
    save(begun, 10)
    assert enter(begun, Start.AUTO, RECORD).finished
    with pytest.raises(UserError, match="trained to step 10 already"):
        enter(begun, Start.RESUME, RECORD)
    assert not enter(begun, Start.AUTO, replace(RECORD, steps=11)).finished


def test_damaged_checkpoints_are_set_aside_once_the_run_goes_on(begun: Path) -> None:
    (begun / "checkpoints" / "step-00000004" / "deepspeed" / "state.pt").write_bytes(b"stat!")
    prepare(begun, 6)
    entry = enter(begun, Start.AUTO, RECORD)
    assert entry.checkpoint and entry.checkpoint.state.step == 2
    assert "differs from its SHA-256" in entry.damages[0].reason
    assert len(committed(begun)) == 2, "until the state is loaded nothing is touched"
    clear(begun, entry)
    names = sorted(path.name for path in checkpoints_dir(begun).iterdir())
    assert names == ["damaged-step-00000004", "latest", "step-00000002"]


def test_a_run_that_never_had_a_checkpoint_may_begin_anew(tmp_path: Path) -> None:
    write_run_record(tmp_path, replace(RECORD, steps=7))
    (tmp_path / METRICS_NAME).write_text('{"event": "start", "step": 0}\n{"event": "train", "st')
    prepare(tmp_path, 2)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        enter(tmp_path, Start.RESUME, RECORD)
    assert enter(tmp_path, Start.AUTO, RECORD).checkpoint is None
    assert read_run_record(tmp_path).steps == 10
    assert list(checkpoints_dir(tmp_path).iterdir()) == []


@pytest.mark.parametrize("trace", ["journal", "latest", "damaged"])
def test_a_run_whose_checkpoints_are_gone_never_begins_anew(tmp_path: Path, trace: str) -> None:
    write_run_record(tmp_path, RECORD)
    if trace == "journal":
        (tmp_path / METRICS_NAME).write_text(json.dumps({"event": "checkpoint", "step": 2, "time": 1.0}) + "\n")
    else:
        folder = save(tmp_path, 2)
        set_aside(folder)
        if trace == "latest":
            (checkpoints_dir(tmp_path) / "damaged-step-00000002").rename(tmp_path / "elsewhere")
        else:
            (checkpoints_dir(tmp_path) / "latest").unlink()
    with pytest.raises(UserError, match="has no checkpoint any more, and it had"):
        enter(tmp_path, Start.AUTO, RECORD)


def test_none_whole_is_refused_by_auto_resume_as_well(begun: Path) -> None:
    for folder in committed(begun):
        (folder / "deepspeed" / "state.pt").unlink()
    with pytest.raises(UserError, match="has no whole checkpoint"):
        enter(begun, Start.AUTO, RECORD)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"global_batch": 8}, "the global batch is 8"),
        ({"index_sha256": {"training": "cd"}}, "the training index's SHA-256 is cd"),
        ({"recipe": {**RECORD.recipe, "train": {**RECORD.recipe["train"], "seed": 1}}}, "train.seed is 1"),
    ],
)
def test_what_decides_the_samples_must_stay(begun: Path, change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        enter(begun, Start.RESUME, replace(RECORD, **change))  # type: ignore[arg-type]


# ---- the lock --------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from fcn_dist.training.runlock import RunLock
lock = RunLock(Path(sys.argv[1]), "train.py --output run")
if sys.argv[2] == "fork":
    import os
    if os.fork() == 0:
        os.setsid()
        sys.stdin.readline()
        os._exit(0)
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["alone", "fork"])
def test_the_lock_dies_with_its_holder_though_loader_processes_live(tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on \S+ \(train.py --output run\)"):
            RunLock(run, "second")
        holder.kill()
        holder.wait()
        lock = RunLock(run, "third")
        assert sees(run, lock.token)
        lock.release()


def test_a_rank_that_does_not_see_the_folder_of_rank_zero_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcn_dist.training.runlock.VISIBLE_WITHIN", 0.0)
    assert not sees(tmp_path, "abc")
    (tmp_path / ".lock").write_text('{"token": "of another job"}')
    assert not sees(tmp_path, "abc")
    assert (tmp_path / RUN_NAME).exists() is False
