"""A checkpoint's files: copies that training does not change, and hashes of what is on disk."""

import errno
import os
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from fcn_dist.checkpoints.restricted import load_restricted
from fcn_dist.files import sha256
from fcn_dist.training.snapshot import Snapshots, host_copy
from fcn_dist.training.writing import Writing, write_file


def content() -> dict[str, object]:
    flat = torch.arange(1000.0)
    return {
        "flat": flat,
        "view": flat[10:20],
        "same": flat,
        "module": OrderedDict(weight=torch.ones(3, dtype=torch.bfloat16), step=torch.tensor(7)),
        "groups": [{"params": [0, 1], "betas": (0.9, 0.99)}],
        "scaler": DynamicLossScaler(8.0, 10, 1.0, 1, False),
    }


def test_a_copy_is_not_changed_by_training_and_keeps_what_is_one() -> None:
    state = content()
    copied = host_copy(state)
    state["flat"].zero_()  # type: ignore[attr-defined]
    state["scaler"].cur_scale = 1.0  # type: ignore[attr-defined]
    state["groups"][0]["params"].append(2)  # type: ignore[index]
    assert torch.equal(copied["flat"], torch.arange(1000.0)) and copied["same"] is copied["flat"]
    assert torch.equal(copied["view"], torch.arange(10.0, 20.0))
    assert copied["view"].untyped_storage().nbytes() == 40, "of a view, its own elements alone"
    assert copied["scaler"].cur_scale == 8.0 and copied["groups"][0] == {"params": [0, 1], "betas": (0.9, 0.99)}
    assert isinstance(copied["module"], OrderedDict) and copied["module"]["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("background", [True, False])
def test_what_is_written_is_what_torch_reads_and_what_was_hashed(tmp_path: Path, background: bool) -> None:
    paths = {tmp_path / "state.pt": content(), tmp_path / "probe.safetensors": b"probe"}
    writing = Writing(paths, background)
    writing.wait()
    assert writing.over and writing.failure is None and set(writing.files) == set(paths)
    for path, file in writing.files.items():
        assert (path.stat().st_size, sha256(path)) == (file.size, file.sha256)
    read = Snapshots().load(str(tmp_path / "state.pt"))
    assert torch.equal(read["flat"], torch.arange(1000.0)) and read["scaler"].cur_scale == 8.0


def test_an_enumeration_is_read_back_as_its_value_whatever_python_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Python 3.11.2 has it, and 3.11.7 does not any more.
    monkeypatch.setattr(Enum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    write_file(tmp_path / "state.pt", host_copy({"stages": [ZeroStageEnum.gradients]}))
    for read in (Snapshots().load(str(tmp_path / "state.pt")), load_restricted(tmp_path / "state.pt")):
        assert read == {"stages": [2]} and type(read["stages"][0]) is int


def test_a_file_that_is_there_already_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"older")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "state.pt", content())
    assert (tmp_path / "state.pt").read_bytes() == b"older"


@pytest.mark.parametrize("what", ["tensors", "bytes"])
def test_a_full_disk_is_told_with_its_path_and_the_rest_is_not_tried(
    tmp_path: Path, small_disk: Callable[[int], Path], what: str
) -> None:
    disk = small_disk(64)
    large = torch.zeros(100_000) if what == "tensors" else bytes(400_000)
    writing = Writing({tmp_path / "later.pt": b"", disk / "state.pt": large}, background=True)
    writing.wait()
    assert isinstance(writing.failure, OSError) and writing.failure.errno == errno.ENOSPC
    assert str(disk / "state.pt") in str(writing.failure)
    assert not (tmp_path / "later.pt").exists()


def test_nothing_in_a_file_is_run_when_it_is_loaded(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "mark"),)

    torch.save({"module": Planted()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="mkdir"):
        Snapshots().load(str(tmp_path / "state.pt"))
    assert not (tmp_path / "mark").exists()
