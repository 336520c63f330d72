"""Damage of a checkpoint, as whoever wants the weights alone meets it: the older one, or the very weights."""

import random
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import pytest
import torch
from safetensors.torch import load_file
from saved_run import save_run

from fcn_dist.checkpoints.records import check_descriptions, check_storages, checking_storages, records_sha256
from fcn_dist.checkpoints.store import open_checkpoint
from fcn_dist.checkpoints.weights import open_run
from fcn_dist.deploy.convert import convert
from fcn_dist.errors import UserError
from fcn_dist.model.fcn import FCN

NAME = "deepspeed/mp_rank_00_model_states.pt"


def saved(run: Path) -> tuple[Path, dict[int, FCN]]:
    """The file of the newer one of two checkpoints."""
    models = {step: save_run(run, step=step, seed=step) for step in (1, 2)}
    return run / "checkpoints" / "step-00000002" / NAME, models


def assert_found(run: Path, models: dict[int, FCN]) -> int:
    """The weights that are opened are those of the step that is named; returns it."""
    opened = open_run(run)
    step = opened.checkpoint.state.step
    wanted = models[step].state_dict()
    assert opened.found.state.keys() == wanted.keys()
    assert all(torch.equal(opened.found.state[name], tensor) for name, tensor in wanted.items())
    assert [damage.dir.name for damage in opened.passed_over] == ["step-00000002"] * (step == 1)
    return step


def where(path: Path, part: str) -> int:
    """A byte in the middle of the largest storage that holds it: of weights, or of moments."""
    content = torch.load(path, weights_only=True)
    tensors = (
        content["module"].values()
        if part == "weights"
        else [s["exp_avg"] for s in content["optimizer"]["state"].values()]
    )
    largest = max(tensors, key=torch.Tensor.numel).untyped_storage()
    begin = path.read_bytes().index(bytes(largest))
    return begin + len(bytes(largest)) // 2


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_bit_of_the_weights_is_missed(tmp_path: Path) -> None:
    path, models = saved(tmp_path)
    flip(path, where(path, "weights"))  # the last bit of a number's mantissa: no score tells
    assert assert_found(tmp_path, models) == 1
    assert "differ from their CRC-32" in open_run(tmp_path).passed_over[0].reason
    with pytest.raises(UserError, match="has no whole checkpoint"):
        open_run(tmp_path, step=2)


def test_a_conversion_that_meets_damage_while_it_writes_begins_again_with_the_checkpoint_before(tmp_path: Path) -> None:
    path, models = saved(tmp_path / "run")
    content, place = bytearray(path.read_bytes()), where(path, "weights")
    content[place : place + 8] = b"\xff" * 8  # no number
    path.write_bytes(content)
    out = tmp_path / "model.safetensors"
    conversion = convert(tmp_path / "run", out)
    assert conversion.checkpoint.state.step == 1 and len(conversion.passed_over) == 1
    assert conversion.parameters == sum(tensor.numel() for tensor in models[1].state_dict().values())
    assert all(torch.equal(load_file(out)[name], tensor) for name, tensor in models[1].state_dict().items())
    assert sorted(found.name for found in tmp_path.iterdir()) == ["model.safetensors", "run"]


def test_damage_is_what_is_told_whatever_came_of_damaged_weights(tmp_path: Path) -> None:
    torch.save({"row": torch.arange(12.0)}, tmp_path / "kept.pt")
    damaged, whole = [torch.arange(12.0) + 1], [torch.arange(12.0)]
    with pytest.raises(ValueError, match="48 bytes of weights in"), checking_storages(damaged, tmp_path):
        raise UserError("the weights are of another step")
    with pytest.raises(UserError, match="of another step"), checking_storages(whole, tmp_path):
        raise UserError("the weights are of another step")


def test_a_bit_of_moments_is_none_of_the_weights_and_yet_nothing_to_continue_from(tmp_path: Path) -> None:
    path, models = saved(tmp_path)
    flip(path, where(path, "moments"))
    assert assert_found(tmp_path, models) == 2
    assert open_checkpoint(tmp_path)[0].state.step == 1


@pytest.mark.slow
def test_a_bit_anywhere_leads_to_the_older_checkpoint_or_is_outside_of_what_is_read(tmp_path: Path) -> None:
    path, models = saved(tmp_path)
    whole, draw = path.read_bytes(), random.Random(0)
    with ZipFile(path) as file:
        places = [info.header_offset + draw.randrange(60) for info in file.infolist()]  # few of all, and not compared
        described = next(info for info in file.infolist() if info.filename.endswith("data.pkl"))
        assert all(info.compress_type == ZIP_STORED for info in file.infolist())
    places += [described.header_offset + 100 + draw.randrange(described.file_size) for _ in range(20)]
    places += [draw.randrange(len(whole)) for _ in range(50)]
    places += [len(whole) - 1 - draw.randrange(4000) for _ in range(50)]  # the list itself
    steps = []
    for place in places:
        flip(path, place, draw.randrange(8))
        steps.append(assert_found(tmp_path, models))
        path.write_bytes(whole)
    assert set(steps) == {1, 2}
    assert assert_found(tmp_path, models) == 2


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_file_that_is_cut_or_gone_leads_to_the_older_checkpoint(tmp_path: Path, share: float) -> None:
    path, models = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert assert_found(tmp_path, models) == 1
    path.write_bytes(whole[: int(share * len(whole))].ljust(len(whole), b"\0"))
    assert assert_found(tmp_path, models) == 1
    path.unlink()
    assert assert_found(tmp_path, models) == 1


def test_a_whole_file_of_another_step_is_not_taken_for_this_one_s(tmp_path: Path) -> None:
    path, models = saved(tmp_path)
    other = tmp_path / "checkpoints" / "step-00000001" / NAME
    assert other.stat().st_size == path.stat().st_size
    path.write_bytes(other.read_bytes())
    assert assert_found(tmp_path, models) == 1
    assert f"the list of records in {NAME} differs" in open_run(tmp_path).passed_over[0].reason


def test_the_probe_is_compared_whole(tmp_path: Path) -> None:
    _, models = saved(tmp_path)
    probe = tmp_path / "checkpoints" / "step-00000002" / "probe.safetensors"
    flip(probe, probe.stat().st_size - 1)
    assert assert_found(tmp_path, models) == 1


def test_a_file_that_someone_has_put_beside_them_is_none_of_the_checkpoint_s(tmp_path: Path) -> None:
    _, models = saved(tmp_path)
    (tmp_path / "checkpoints" / "step-00000002" / "deepspeed" / "notes.pt").write_bytes(b"my own")
    assert assert_found(tmp_path, models) == 2


def test_storages_are_told_by_their_bytes(tmp_path: Path) -> None:
    kept = {"row": torch.arange(12.0), "column": torch.rand(3, 4).T, "none": torch.empty(0)}
    torch.save(kept, tmp_path / "kept.pt")
    check_storages(torch.load(tmp_path / "kept.pt", mmap=True, weights_only=True).values(), tmp_path)
    with pytest.raises(ValueError, match=r"48 bytes of weights in .* differ"):
        check_storages([torch.arange(12.0) + 1], tmp_path)
    first = records_sha256(tmp_path / "kept.pt")
    torch.save(kept | {"row": -kept["row"]}, tmp_path / "kept.pt")
    assert records_sha256(tmp_path / "kept.pt") != first
    (tmp_path / "kept.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"kept\.pt is no whole file of torch's"):
        records_sha256(tmp_path / "kept.pt")


def test_a_bit_anywhere_in_the_list_of_records_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "kept.pt"
    torch.save({"row": torch.arange(12.0), "column": torch.rand(3, 4)}, path)
    whole, wanted = path.read_bytes(), records_sha256(path)
    with ZipFile(path) as file:
        begin = file.start_dir
    for place in range(begin, len(whole)):
        for bit in range(8):
            flip(path, place, bit)
            try:
                assert records_sha256(path) != wanted
            except ValueError as error:
                assert str(error).startswith("kept.pt is no whole file of torch's")
            path.write_bytes(whole)


def test_a_bit_anywhere_in_a_description_is_noticed_or_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "kept.pt"
    kept = {"row": torch.arange(12.0), "column": torch.rand(3, 4)}
    torch.save(kept, path)
    whole, noticed = path.read_bytes(), 0
    with ZipFile(path) as file:
        first = file.infolist()[0]
        assert first.filename.endswith("data.pkl")
    for place in range(first.header_offset, first.header_offset + 100 + first.file_size):
        flip(path, place, place % 8)
        try:
            check_descriptions(path)
            found = torch.load(path, weights_only=True)
            assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
        except ValueError as error:
            assert str(error).startswith("kept.pt: its record ")
            noticed += 1
        path.write_bytes(whole)
    assert noticed > first.file_size / 2
