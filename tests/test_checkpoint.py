"""Checkpoints as files: whole or not there, and whatever is damaged is passed over with the reason."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from committing import commit_folder

from fcn_dist import files
from fcn_dist.checkpoints import commit as commit_module
from fcn_dist.checkpoints import store
from fcn_dist.checkpoints.commit import WrittenFile, discard_all, prepare, set_aside
from fcn_dist.checkpoints.retention import retain
from fcn_dist.checkpoints.store import CheckpointState, checkpoints_dir, open_checkpoint, step_name
from fcn_dist.config import CheckpointConfig
from fcn_dist.errors import UserError
from fcn_dist.files import OBSTACLES


def state_of(step: int) -> CheckpointState:
    recipe = {"data": {"crop": (64, 48)}, "schedule": {"learning_rate": 0.1, "epochs": None}}
    return CheckpointState(step, 6 * step, 2, 1, "bfloat16", {"classes": ("a", "ü")}, recipe, {"x": 1}, "ab", None)


def write(folder: Path, step: int) -> None:
    for number in range(2):
        (folder / "deepspeed" / f"rank_{number}.pt").write_bytes(os.urandom(2000 + step % 100))
    (folder / "probe.safetensors").write_bytes(b"probe")


def save(run_dir: Path, step: int) -> Path:
    folder = prepare(run_dir, step)
    write(folder, step)
    return commit_folder(folder, state_of(step))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_commit_makes_the_checkpoint_and_latest_appear_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = save(tmp_path, 5)
    assert target == tmp_path / "checkpoints" / "step-00000005"
    assert names(tmp_path) == ["latest", "step-00000005"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"
    found, damages = open_checkpoint(tmp_path)
    assert found.dir == target and damages == []
    # What went in comes out, but for tuples, which JSON does not have.
    assert found.state == CheckpointState(**json.loads(json.dumps(vars(state_of(5)))))


def test_the_manifest_lists_every_file_with_its_size_and_hash(tmp_path: Path) -> None:
    target = save(tmp_path, 5)
    manifest = json.loads((target / "manifest.json").read_text())
    listed = {name: record["size"] for name, record in manifest["files"].items()}
    assert listed == {"deepspeed/rank_0.pt": 2005, "deepspeed/rank_1.pt": 2005, "probe.safetensors": 5}
    expected = hashlib.sha256(b"probe").hexdigest()
    assert manifest["files"]["probe.safetensors"]["sha256"] == expected
    assert manifest["state"]["position"] == 30


def test_what_is_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    write(prepare(tmp_path, 10), 10)
    found, damages = open_checkpoint(tmp_path)
    assert found.state.step == 5 and damages == []
    with pytest.raises(UserError, match=r"no checkpoint of step 10; it has step-00000005"):
        open_checkpoint(tmp_path, 10)


@pytest.mark.parametrize("moment", ["sync", "write_text", "rename"])
def test_a_crash_before_the_rename_leaves_the_older_checkpoint_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, 5)
    folder = prepare(tmp_path, 10)
    write(folder, 10)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "rename":
            patch.setattr(Path, "rename", crash)
        else:
            patch.setattr(commit_module, moment, crash)
        with pytest.raises(KeyboardInterrupt):
            commit_folder(folder, state_of(10))
    assert open_checkpoint(tmp_path)[0].state.step == 5
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"
    save(tmp_path, 10)  # and what the crash left is no obstacle
    discard_all(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000010"]
    assert open_checkpoint(tmp_path)[0].state.step == 10


def test_the_manifest_goes_in_after_every_file_is_on_disk_and_latest_moves_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_rename = Path.rename

    def sync(path: Path) -> None:
        events.append(f"sync {path.name}")
        files.sync(path)

    def write_text(path: Path, text: str) -> None:
        events.append(f"write {path.name}")
        files.write_text(path, text)

    def rename(path: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        return real_rename(path, target)

    monkeypatch.setattr(commit_module, "sync", sync)
    monkeypatch.setattr(commit_module, "write_text", write_text)
    monkeypatch.setattr(Path, "rename", rename)
    save(tmp_path, 5)
    order = ["write manifest.json", "rename step-00000005", "sync checkpoints", "write latest"]
    assert [event for event in events if event in order] == order
    between = events[events.index("write manifest.json") : events.index("rename step-00000005")]
    assert "sync deepspeed" in between, "the names of the ranks' files are on disk before the checkpoint appears"


def test_a_file_that_rank_zero_does_not_find_in_its_size_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    folder = prepare(tmp_path, 5)
    write(folder, 5)
    files = {"deepspeed/rank_1.pt": WrittenFile(9999, "0" * 64)}
    with pytest.raises(OSError, match=r"rank_1.pt has 2005 bytes, and 9999 were written"):
        commit_module.commit(folder, state_of(5), files)
    (folder / "deepspeed" / "rank_1.pt").unlink()
    with pytest.raises(OSError, match=r"No such file.*rank_1.pt"):
        commit_module.commit(folder, state_of(5), files)
    assert not (checkpoints_dir(tmp_path) / step_name(5)).exists()


# ---- damage


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x01
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda d: flip(d / "deepspeed" / "rank_1.pt"), "rank_1.pt differs from its SHA-256"),
    "a cut file": (lambda d: os.truncate(d / "deepspeed" / "rank_0.pt", 100), "rank_0.pt has 100 bytes, 2010 are"),
    "an empty file": (lambda d: os.truncate(d / "probe.safetensors", 0), "probe.safetensors has 0 bytes"),
    "a longer file": (lambda d: (d / "probe.safetensors").write_bytes(b"probe2"), "has 6 bytes, 5 are needed"),
    "a file that is gone": (lambda d: (d / "deepspeed" / "rank_0.pt").unlink(), "rank_0.pt is missing"),
    "a folder that is gone": (lambda d: shutil.rmtree(d / "deepspeed"), "rank_0.pt is missing"),
    "a manifest that is gone": (lambda d: (d / "manifest.json").unlink(), "manifest.json"),
    "a cut manifest": (lambda d: os.truncate(d / "manifest.json", 200), ""),
    "an empty manifest": (lambda d: os.truncate(d / "manifest.json", 0), ""),
    "a manifest of another form": (lambda d: (d / "manifest.json").write_text("[]"), ""),
    "a manifest of another version": (lambda d: (d / "manifest.json").write_text('{"format_version": 9}'), "version 9"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_older_one_with_the_reason(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 5)
    target = save(tmp_path, 10)
    damage, reason = DAMAGES[kind]
    damage(target)
    found, damages = open_checkpoint(tmp_path)
    assert found.state.step == 5
    assert [one.dir for one in damages] == [target]
    assert damages[0].reason and reason in damages[0].reason


def test_a_flip_anywhere_in_the_manifest_is_noticed_or_harmless(tmp_path: Path) -> None:
    target = save(tmp_path, 10)
    path = target / "manifest.json"
    whole = path.read_bytes()
    expected = open_checkpoint(tmp_path)[0]
    noticed = 0
    for at in range(0, len(whole), 3):
        for bit in (0x01, 0x04):
            data = bytearray(whole)
            data[at] ^= bit
            path.write_bytes(data)
            try:
                # A flip between JSON's words changes nothing that is read.
                assert open_checkpoint(tmp_path)[0] == expected
            except UserError:
                noticed += 1
    assert noticed > len(whole) / 3


def test_a_manifest_that_is_nested_without_end_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "manifest.json").write_text("[" * 100_000)
    found, damages = open_checkpoint(tmp_path)
    assert found.state.step == 5 and "nested too deeply" in damages[0].reason


def test_two_damaged_checkpoints_are_passed_over_newest_first(tmp_path: Path) -> None:
    targets = {step: save(tmp_path, step) for step in (5, 10, 15)}
    for step in (10, 15):
        flip(targets[step] / "probe.safetensors")
    found, damages = open_checkpoint(tmp_path)
    assert found.state.step == 5
    assert [one.dir for one in damages] == [targets[15], targets[10]]


def test_none_whole_is_refused_with_every_reason(tmp_path: Path) -> None:
    for step in (5, 10):
        flip(save(tmp_path, step) / "probe.safetensors")
    with pytest.raises(UserError, match=r"no whole checkpoint \(step-00000010: probe.* step-00000005: probe"):
        open_checkpoint(tmp_path)


def test_a_step_that_is_asked_for_is_not_replaced_by_another(tmp_path: Path) -> None:
    save(tmp_path, 5)
    target = save(tmp_path, 10)
    assert open_checkpoint(tmp_path, 5)[0].state.step == 5
    flip(target / "probe.safetensors")
    with pytest.raises(UserError, match="no whole checkpoint"):
        open_checkpoint(tmp_path, 10)


def test_a_run_without_checkpoints_and_no_run_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no checkpoint yet"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"no run folder .*nowhere"):
        open_checkpoint(tmp_path / "nowhere")


def test_latest_missing_or_wrong_does_not_hide_a_whole_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000099\n")
    assert open_checkpoint(tmp_path)[0].state.step == 5
    (tmp_path / "checkpoints" / "latest").unlink()
    assert open_checkpoint(tmp_path)[0].state.step == 5


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 5)
    shutil.copytree(tmp_path / "checkpoints" / "step-00000005", tmp_path / "checkpoints" / "step-00000010")
    found, damages = open_checkpoint(tmp_path)
    assert found.state.step == 5
    assert [(damage.dir.name, damage.reason) for damage in damages] == [
        ("step-00000010", "its manifest is of step 5"),
    ]


@pytest.mark.parametrize("number", sorted(OBSTACLES))
def test_what_may_be_whole_and_cannot_be_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # Training goes on from what is found, and puts aside what is damaged.
    save(tmp_path, 5)
    target = save(tmp_path, 10) / "probe.safetensors"

    def refuse(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(store, "sha256", refuse)
    with pytest.raises(UserError, match=rf"step-00000010/.* cannot be read here \({re.escape(os.strerror(number))}\)"):
        open_checkpoint(tmp_path)
    monkeypatch.undo()
    target.unlink()
    assert open_checkpoint(tmp_path)[0].state.step == 5


@pytest.mark.parametrize("part", ["checkpoints", "checkpoints/step-00000005", "checkpoints/step-00000005/deepspeed"])
def test_a_part_of_a_run_is_told_from_a_run(tmp_path: Path, part: str) -> None:
    save(tmp_path, 5)
    with pytest.raises(UserError, match=rf"is a part of a run; give the run itself, {tmp_path}, and choose"):
        open_checkpoint(tmp_path / part)


# ---- again, and how many


def test_a_step_saved_again_replaces_what_was_there(tmp_path: Path) -> None:
    flip(save(tmp_path, 5) / "probe.safetensors")
    save(tmp_path, 5)
    found, damages = open_checkpoint(tmp_path)
    assert found.state.step == 5 and damages == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        newest = save(tmp_path, step)
        retain(tmp_path, newest, CheckpointConfig(keep=2))
    assert names(tmp_path) == ["latest", "step-00000015", "step-00000020"]
    assert retain(tmp_path, newest, CheckpointConfig(keep=3)) == []
    assert names(tmp_path) == ["latest", "step-00000015", "step-00000020"]


def scored(run_dir: Path, step: int, mean_iou: float, measured_at: int | None = None) -> Path:
    folder = prepare(run_dir, step)
    write(folder, step)
    official = {"pixel_accuracy": 1 - mean_iou, "mean_iou": mean_iou, "score": 0.5}
    scores = {"step": measured_at or step, "official": official}
    return commit_folder(folder, replace(state_of(step), scores=scores))


def kept(run_dir: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(run_dir) if name != "latest"]


def test_the_best_by_a_score_are_kept_besides_the_newest(tmp_path: Path) -> None:
    for step, score in ((5, 0.3), (10, 0.9), (15, 0.5), (20, 0.4), (25, 0.1)):
        retain(tmp_path, scored(tmp_path, step, score), CheckpointConfig(keep=1, keep_best=2))
    assert kept(tmp_path) == [10, 15, 25]


def test_the_best_by_another_score_and_of_equals_the_later(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=1, keep_best=1, best_by="pixel_accuracy")
    for step, score in ((5, 0.3), (10, 0.1), (15, 0.1), (20, 0.4)):
        retain(tmp_path, scored(tmp_path, step, score), config)
    assert kept(tmp_path) == [15, 20]


def test_a_score_of_another_step_is_not_the_checkpoints_own(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=1, keep_best=1)
    retain(tmp_path, scored(tmp_path, 5, 0.3), config)
    retain(tmp_path, scored(tmp_path, 10, 0.9, measured_at=8), config)
    retain(tmp_path, save(tmp_path, 15), config)
    assert kept(tmp_path) == [5, 15]


def test_one_that_may_be_the_best_and_cannot_be_read_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CheckpointConfig(keep=1, keep_best=1)
    retain(tmp_path, scored(tmp_path, 5, 0.9), config)
    newest, read_text = scored(tmp_path, 10, 0.3), Path.read_text

    def refuse(path: Path) -> str:
        if path.parent.name == "step-00000005":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        retain(tmp_path, newest, config)
    monkeypatch.undo()
    assert kept(tmp_path) == [5, 10]


def test_what_could_not_be_removed_is_removed_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CheckpointConfig(keep=1)
    save(tmp_path, 5)

    def fail(folder: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))

    newest = save(tmp_path, 10)
    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(OSError, match="busy"):
        retain(tmp_path, newest, config)
    monkeypatch.undo()
    going, *others = names(tmp_path)  # which no reader takes for a checkpoint, whatever of it is left
    assert going.startswith(".step-00000005.") and others == ["latest", "step-00000010"]
    retain(tmp_path, save(tmp_path, 15), config)
    assert names(tmp_path) == ["latest", "step-00000015"]


def test_checkpoints_that_cannot_be_looked_for_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)

    def refuse(path: Path) -> None:  # for root, all can be read
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PermissionError, match="checkpoints"):
        open_checkpoint(tmp_path)


def test_every_nth_is_kept_for_good(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25):
        retain(tmp_path, save(tmp_path, step), CheckpointConfig(keep=1, keep_every=10))
    assert kept(tmp_path) == [10, 20, 25]


def test_a_damaged_checkpoint_set_aside_takes_no_place(tmp_path: Path) -> None:
    save(tmp_path, 5)
    aside = set_aside(save(tmp_path, 10))
    assert aside.name == "damaged-step-00000010" and aside.is_dir()
    assert open_checkpoint(tmp_path)[0].state.step == 5
    set_aside(save(tmp_path, 10))  # once more
    retain(tmp_path, save(tmp_path, 15), CheckpointConfig(keep=2))
    assert names(tmp_path) == ["damaged-step-00000010", "latest", "step-00000005", "step-00000015"]


def test_a_damaged_newer_checkpoint_does_not_crowd_out_whole_ones(tmp_path: Path) -> None:
    # Steps 10 and 15 were damaged, so the run went on from step 5 and has now saved step 7.
    save(tmp_path, 5)
    for step in (10, 15):
        flip(save(tmp_path, step) / "probe.safetensors")
    retain(tmp_path, save(tmp_path, 7), CheckpointConfig(keep=1))
    found, damages = open_checkpoint(tmp_path)
    assert found.state.step == 7
    assert len(damages) == 2
    assert not (tmp_path / "checkpoints" / "step-00000005").exists()


def test_a_copy_kept_beside_a_checkpoint_is_neither_opened_nor_removed(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "step-00000005", checkpoints / "step-00000005.mine")
    retain(tmp_path, checkpoints / "step-00000010", CheckpointConfig(keep=1))
    assert names(tmp_path) == ["latest", "step-00000005.mine", "step-00000010"]
    flip(checkpoints / "step-00000010" / "probe.safetensors")
    with pytest.raises(UserError, match="no whole checkpoint"):
        open_checkpoint(tmp_path)


def test_newest_is_by_number_when_numbers_grow_longer(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    assert open_checkpoint(tmp_path)[0].state.step == 100_000_000
