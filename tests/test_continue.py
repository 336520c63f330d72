"""Packing that was interrupted goes on, and ends in the bytes of a run that was not."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import HEIGHT, WIDTH, MakeScenes, save_oriented, smooth, tree_bytes
from launching import group_members

import fcn_dist.files
from fcn_dist.data.packing import pack_shard
from fcn_dist.data.packing import run as packing
from fcn_dist.data.packing.plan import PackOptions, Part
from fcn_dist.data.packing.receipts import WORK_DIR, receipt_path
from fcn_dist.data.packing.run import PackReport, pack, pack_scenes
from fcn_dist.data.packing.unfinished import claimed
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import UserError

REPO = Path(__file__).resolve().parents[1]
CREATE = str(REPO / "shards" / "create.py")
LIMIT = 60.0  # seconds
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def scenes(make_scenes: MakeScenes) -> Path:
    """14 scenes, one of which is converted."""
    scenes = make_scenes(n=14, splits=("training",))
    save_oriented(scenes / "images/training/training_0003.jpg", smooth(WIDTH, HEIGHT), 6)
    return scenes


@pytest.fixture
def whole(scenes: Path, tmp_path: Path) -> dict[str, bytes]:
    """The bytes of the set that an undisturbed run makes."""
    pack(scenes, tmp_path / "whole", ("training",), workers=1, samples_per_shard=2)
    return tree_bytes(tmp_path / "whole")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def report(scenes: Path, out: Path, workers: int = 1, part: Part | None = None) -> PackReport:
    return pack_scenes(scenes, out, ("training",), PackOptions(samples_per_shard=2), workers, part)


def receipts(out: Path) -> list[Path]:
    return sorted((out / "training" / WORK_DIR).glob("training-*.json"))


def end_after(monkeypatch: pytest.MonkeyPatch, shards: int, error: BaseException) -> None:
    """Let packing in this process end with `error` once so many shards are finished."""
    finished = 0

    def counted(*arguments: object) -> object:
        nonlocal finished
        result = original(*arguments)  # type: ignore[arg-type]
        finished += 1
        if finished == shards:
            raise error
        return result

    original = pack_shard.pack_shard
    monkeypatch.setattr(packing, "pack_shard", counted)


# --- killed ---------------------------------------------------------------------------------------------------


@contextmanager
def creating(scenes: Path, out: Path) -> Iterator["subprocess.Popen[str]"]:
    """A real run with two processes, in a process group of its own."""
    command = [sys.executable, CREATE, str(scenes), str(out), "--split", "training", "--samples-per-shard", "2"]
    with subprocess.Popen(
        [*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it has not come to it"


@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_run_that_was_killed_is_continued_to_the_same_bytes(
    scenes: Path, out: Path, whole: dict[str, bytes], after: int, whole_group: bool
) -> None:
    with creating(scenes, out) as process:
        plan = out / "training" / WORK_DIR / "plan.json"
        until(lambda: plan.exists() and len(receipts(out)) >= after)
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: not group_members(process.pid))  # without a parent, workers end by themselves
    kept = len(receipts(out))
    if not plan.exists():
        assert after == 6, "it was quicker than the kill"
        return
    if kept < 7:
        with pytest.raises(UserError, match="is no shard set"):
            ShardSet.open(out, "training")
    assert report(scenes, out, workers=2).kept == kept >= after
    assert tree_bytes(out) == whole


def test_the_same_bytes_come_of_any_number_of_workers_and_interruptions(
    scenes: Path, out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for workers in (2, 5):
        pack(scenes, tmp_path / str(workers), ("training",), workers=workers, samples_per_shard=2)
        assert tree_bytes(tmp_path / str(workers)) == whole
    for finished, error in enumerate((KeyboardInterrupt(), UserError("enough"), RuntimeError("a bug")), 2):
        with monkeypatch.context() as patch:
            end_after(patch, finished, error)
            with pytest.raises(type(error)):
                report(scenes, out)
        assert len(receipts(out)) == finished
        assert not (out / "training" / "index.json").exists()
    done = report(scenes, out, workers=2)
    assert (done.kept, done.shards, done.samples) == (4, 7, 14)
    assert tree_bytes(out) == whole


# --- what is kept, and what is not ----------------------------------------------------------------------------


@pytest.fixture
def begun(scenes: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three finished shards of seven."""
    with monkeypatch.context() as patch:
        end_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            report(scenes, out)
    return out / "training"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage",
    [
        lambda tar: flip(tar),
        lambda tar: flip(tar.with_suffix(".members.npy")),
        lambda tar: tar.unlink(),
        lambda tar: tar.with_suffix(".members.npy").unlink(),
        lambda tar: tar.write_bytes(tar.read_bytes()[:-512]),
        lambda tar: receipt_path(tar).unlink(),
        lambda tar: receipt_path(tar).write_text("{"),
        lambda tar: receipt_path(tar).write_text("[]"),
        lambda tar: receipt_path(tar).write_text(receipt_path(tar).read_text().replace("filesize", "filesiz")),
        lambda tar: receipt_path(tar).write_bytes(receipt_path(tar.with_name("training-000000.tar")).read_bytes()),
    ],
)
def test_a_finished_shard_is_kept_only_if_it_is_what_its_receipt_says(
    scenes: Path, begun: Path, whole: dict[str, bytes], damage: Callable[[Path], object]
) -> None:
    damage(begun / "training-000001.tar")
    assert report(scenes, begun.parent).kept == 2
    assert tree_bytes(begun.parent) == whole


def test_scenes_that_were_repaired_are_packed_again_and_the_others_kept(
    scenes: Path, begun: Path, tmp_path: Path
) -> None:
    pack(scenes, tmp_path / "out2", ("training",), workers=1, samples_per_shard=2)
    key = ShardSet.open(tmp_path / "out2", "training").key(2)
    image = scenes / f"images/training/{key}.jpg"
    facts = image.stat()
    image.write_bytes(image.read_bytes())
    os.utime(image, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert report(scenes, begun.parent).kept == 2
    assert tree_bytes(begun.parent) == tree_bytes(tmp_path / "out2"), "the time stands nowhere"


@pytest.mark.parametrize("options", [{"short_side": 20}, {"quality": 90}, {"max_pixels": 1000}, {"seed": 1}])
def test_another_plan_packs_everything_again(
    scenes: Path, begun: Path, tmp_path: Path, options: dict[str, int]
) -> None:
    changed = PackOptions(samples_per_shard=2, **options)  # type: ignore[arg-type]
    assert pack_scenes(scenes, begun.parent, ("training",), changed, 1).kept == 0
    pack_scenes(scenes, tmp_path / "fresh", ("training",), changed, 1)
    assert tree_bytes(begun.parent) == tree_bytes(tmp_path / "fresh")


def test_a_smaller_plan_leaves_nothing_of_the_larger(scenes: Path, begun: Path, tmp_path: Path) -> None:
    for name in ("training-000006.tar", ".training-000001.tar.17-ab.partial", ".index.json.17-ab.partial"):
        (begun / name).write_text("x")
    (begun / WORK_DIR / ".training-000001.json.17-ab.partial").write_text("x")
    pack(scenes, begun.parent, ("training",), workers=1, samples_per_shard=7)
    pack(scenes, tmp_path / "fresh", ("training",), workers=1, samples_per_shard=7)
    assert tree_bytes(begun.parent) == tree_bytes(tmp_path / "fresh")


def test_problems_in_the_listing_leave_what_was_finished(scenes: Path, begun: Path, whole: dict[str, bytes]) -> None:
    before = tree_bytes(begun)
    extra = scenes / "images/training/alone.jpg"
    extra.write_bytes((scenes / "images/training/training_0000.jpg").read_bytes())
    with pytest.raises(UserError, match="nothing was written"):
        report(scenes, begun.parent)
    assert tree_bytes(begun) == before
    extra.unlink()
    assert report(scenes, begun.parent).kept == 3
    assert tree_bytes(begun.parent) == whole


@pytest.mark.parametrize("at", ["write_index", "close_work"])
@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_run_of_two_splits_that_ended_at_its_last_steps_goes_on(
    make_scenes: MakeScenes, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str, split: str
) -> None:
    scenes = make_scenes(n=3, name="two")
    original = getattr(packing, at)

    def ending(split_dir: Path, *arguments: object) -> None:
        if split_dir.name == split:
            raise KeyboardInterrupt
        original(split_dir, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, at, ending)
        with pytest.raises(KeyboardInterrupt):
            pack(scenes, out, workers=1)
    if (at, split) == ("close_work", "validation"):
        with pytest.raises(UserError, match="training already holds a shard set"):  # both are whole, and this one tidy
            pack(scenes, out, workers=1)
        assert [len(ShardSet.open(out, name)) for name in ("training", "validation")] == [3, 3]
        return
    if at == "close_work":
        with pytest.raises(UserError, match="already holds a shard set"):
            pack(scenes, out, workers=1, seed=1)
    pack(scenes, out, workers=1)
    pack(scenes, tmp_path / "fresh", workers=1)
    assert tree_bytes(out) == tree_bytes(tmp_path / "fresh")


def test_an_overwriting_run_that_was_interrupted_leaves_no_index_on_foreign_shards(
    scenes: Path, out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(scenes, out, ("training",), workers=1, samples_per_shard=3)
    with monkeypatch.context() as patch:
        end_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(scenes, out, ("training",), workers=1, samples_per_shard=2, overwrite=True)
    assert not (out / "training" / "index.json").exists()
    assert report(scenes, out).kept == 1
    assert tree_bytes(out) == whole


# --- one at a time --------------------------------------------------------------------------------------------


def test_a_second_run_into_the_same_folder_is_refused(scenes: Path, out: Path, whole: dict[str, bytes]) -> None:
    with claimed(out / "training", {}, None, overwrite=False):
        for part in (None, Part(1, 2)):
            with pytest.raises(UserError, match=r"out/training is being packed by another run"):
                report(scenes, out, part=part)
    report(scenes, out)
    assert tree_bytes(out) == whole


def test_other_parts_may_be_packed_at_once_but_not_the_same(scenes: Path, out: Path) -> None:
    with claimed(out / "training", {}, Part(1, 2), overwrite=False):
        report(scenes, out, part=Part(2, 2))
        with pytest.raises(UserError, match="is being packed by another run of this part"):
            report(scenes, out, part=Part(1, 2))
        with pytest.raises(UserError, match="is being packed by another run;"):
            report(scenes, out)
    assert len(receipts(out)) == 3


# --- a full disk ----------------------------------------------------------------------------------------------


def full_after(monkeypatch: pytest.MonkeyPatch, name: str, error: int) -> None:
    def sync(path: Path) -> None:
        if path.name.startswith(name):
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcn_dist.files, "sync", sync)
    monkeypatch.setattr(pack_shard, "sync", sync)


@pytest.mark.parametrize("name", [".training-000002.tar", ".training-000002.members", ".index.json"])
def test_a_full_disk_names_the_space_needed_and_keeps_what_is_finished(
    scenes: Path, out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    finished = 7 if "index" in name else 2
    with monkeypatch.context() as patch:
        full_after(patch, name, errno.ENOSPC)
        needed = rf"is full: about [\d.]+ MB are needed for the {7 - finished} of 7 shards .* MB are free; .*goes on"
        with pytest.raises(UserError, match=needed):
            report(scenes, out)
    assert not list(out.rglob("*.partial"))
    assert report(scenes, out).kept == finished
    assert tree_bytes(out) == whole


def test_a_folder_that_cannot_be_written_is_named(scenes: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_after(monkeypatch, ".training-000000.tar", errno.EACCES)
    with pytest.raises(UserError, match=r"out cannot be written \(.*Permission denied"):
        report(scenes, out)
    assert not out.exists()
    (out.parent / "file").write_text("")
    with pytest.raises(UserError, match=r"file/training cannot be written"):
        report(scenes, out.parent / "file")


def test_a_disk_that_is_really_full_is_survived(
    scenes: Path, small_disk: Callable[[int], Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    disk = small_disk(160)
    (disk / "other").write_bytes(bytes(80_000))
    command = [
        sys.executable,
        CREATE,
        str(scenes),
        str(disk / "out"),
        "--split",
        "training",
        "--samples-per-shard",
        "2",
    ]
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"the disk of {disk / 'out'} is full" in done.stderr
    kept = len(receipts(disk / "out"))
    assert 0 < kept < 7 and f"the {kept} finished shards are kept" in done.stderr
    (disk / "other").unlink()
    again = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{kept} of 7 shards were finished before" in again.stdout
    assert tree_bytes(disk / "out") == whole


def test_a_limit_on_the_size_of_files_is_named(scenes: Path, out: Path) -> None:
    command = [sys.executable, CREATE, str(scenes), str(out), "--split", "training", "--samples-per-shard", "14"]
    done = subprocess.run(
        [*command, "--workers", "1"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert done.returncode == 2, done.stderr
    assert "takes no file as large as a shard" in done.stderr and "--samples-per-shard" in done.stderr
    assert not out.exists()
