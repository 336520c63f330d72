"""DeepSpeed's checkpoint files to a state dict. The oracle is what the engine itself said its weights were."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_ranks
from safetensors.torch import load_file
from tiny_models import DESCRIPTION
from torch import Tensor

from fcn_dist.checkpoints.consolidate import Consolidated, consolidate
from fcn_dist.checkpoints.restricted import load_restricted
from fcn_dist.deploy import proof
from fcn_dist.deploy.convert import Conversion, convert
from fcn_dist.errors import UserError

SCRIPT = Path(__file__).with_name("save_checkpoints.py")
FROZEN = ("features.0.weight", "features.2.bias")
OPTIMIZER_FILE = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL_FILE = "mp_rank_00_model_states.pt"
CASES = {
    1: ["bf16-0", "bf16-1-accumulate", "fp32-2", "fp16-3"],
    2: [
        *(f"{precision}-{stage}" for precision in ("fp32", "bf16", "fp16") for stage in range(4)),
        *("bf16-1-accumulate", "bf16-2-offload", "bf16-3-offload"),
    ],
    3: ["fp32-1", "bf16-1-accumulate", "bf16-2", "bf16-3", "fp16-3"],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run folder `bf16-2` of two ranks under ZeRO-2 in bf16, and the engine's own weights."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(SCRIPT, [str(folder), "bf16-2"], world_size=2, folder=folder, timeout=120)
    return folder


@pytest.fixture
def files(saved: Path, tmp_path: Path) -> Path:
    """A copy of DeepSpeed's files, to be damaged."""
    return Path(shutil.copytree(deepspeed_files(saved / "bf16-2"), tmp_path / "deepspeed"))


def deepspeed_files(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-00000002" / "deepspeed"


def consolidated(folder: Path) -> Consolidated:
    with torch.device("meta"):
        return consolidate(folder, DESCRIPTION.build(), "trained")


def assert_same_weights(found: Mapping[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor), name


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a file of ours as DeepSpeed would have, but for `edit`."""
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def test_two_ranks_under_zero_2_in_bf16_give_the_engines_float32_masters(saved: Path) -> None:
    weights = consolidated(deepspeed_files(saved / "bf16-2"))
    wanted = load_file(saved / "bf16-2.safetensors")
    assert_same_weights(weights.state, wanted)
    assert (weights.stage, weights.world_size, weights.rounded) == (2, 2, FROZEN)
    trained = wanted["fc6.weight"]
    assert not torch.equal(trained, trained.bfloat16().float())  # the masters hold more than bf16 does


def assert_agrees(conversion: Conversion, precision: str) -> None:
    """With the engine's scores, in its own arithmetic to the bit, and where that is emulated, too."""
    for multiplied in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proof, "multiplies", lambda *_, able=multiplied: able)
            patch.setattr(proof, "OUTPUTS_AT_ONCE", 5)
            found = proof.compare(conversion.path, conversion.checkpoint, conversion.weights, "float32")
        assert found.difference <= found.tolerance
        if multiplied:
            assert found.arithmetic == f"{precision} on cpu" and found.difference <= 1e-3


def test_the_model_file_of_two_bf16_ranks_gives_the_engines_scores(saved: Path, tmp_path: Path) -> None:
    conversion = convert(saved / "bf16-2", tmp_path / "model.safetensors", weights="trained")
    assert_agrees(conversion, "bfloat16")
    assert_same_weights(load_file(conversion.path), load_file(saved / "bf16-2.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", CASES)
def test_every_stage_and_precision_gives_the_engines_masters_and_scores(world_size: int, tmp_path: Path) -> None:
    cases = CASES[world_size]
    run_ranks(SCRIPT, [str(tmp_path), *cases], world_size, tmp_path, timeout=240)
    for case in cases:
        wanted = load_file(tmp_path / f"{case}.safetensors")
        weights = consolidated(deepspeed_files(tmp_path / case))
        assert_same_weights(weights.state, wanted)
        assert weights.rounded == (() if case.startswith("fp32") else FROZEN), case
        trained, averaged = tmp_path / f"{case}.trained", tmp_path / f"{case}.averaged"
        precision = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[case.split("-")[0]]
        assert_agrees(convert(tmp_path / case, trained, weights="trained"), precision)
        conversion = convert(tmp_path / case, averaged)
        assert conversion.weights == "averaged", case
        assert_agrees(conversion, precision)
        assert not torch.equal(load_file(averaged)["fc6.weight"], load_file(trained)["fc6.weight"]), case
        if case.count("-") == 1 and not case.endswith("0"):
            assert_deepspeed_agrees(deepspeed_files(tmp_path / case), weights.state)


def assert_deepspeed_agrees(folder: Path, state: Mapping[str, Tensor]) -> None:
    """DeepSpeed's own converter, where it works: stages 1 (but for frozen parameters), 2 and 3."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    for name, tensor in theirs.items():
        assert torch.equal(state[name], tensor.float()), name


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE.format(1)])
def test_a_malicious_pickle_is_refused_by_name_and_never_run(files: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {marker}",)

    change(files / name, lambda content: content.update(harmless=Payload()))
    with pytest.raises(UserError, match=rf"{name} carries posix\.system, which could run code"):
        consolidated(files)
    assert not marker.exists()
    torch.load(files / name, weights_only=False)
    assert marker.exists()  # it would have run


def test_deepspeeds_classes_are_read_as_inert_stand_ins(files: Path) -> None:
    state = load_restricted(files / OPTIMIZER_FILE.format(0))["optimizer_state_dict"]
    assert type(state["loss_scaler"]).__module__ == "fcn_dist.checkpoints.restricted"
    assert type(state["zero_stage"]) is int


def test_a_missing_rank_is_named(files: Path) -> None:
    (files / OPTIMIZER_FILE.format(0)).unlink()
    with pytest.raises(UserError, match="lacks the files of rank 0"):
        consolidated(files)


def test_too_few_ranks_are_counted(files: Path) -> None:
    (files / OPTIMIZER_FILE.format(1)).unlink()
    with pytest.raises(UserError, match="files of 1 ranks, and was saved by 2"):
        consolidated(files)


def test_a_folder_without_a_model_file_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no mp_rank_00_model_states\.pt"):
        consolidated(tmp_path)


def test_a_short_partition_is_an_error_that_names_the_parameter(files: Path) -> None:
    def cut(content: dict[str, Any]) -> None:
        groups = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        groups[-1] = groups[-1][:-3].clone()

    change(files / OPTIMIZER_FILE.format(1), cut)
    with pytest.raises(UserError, match=r"the part of score_pool3\.bias on rank 1 is cut short"):
        consolidated(files)


def test_a_part_that_no_rank_holds_is_an_error_that_names_the_parameter(files: Path) -> None:
    def grow(content: dict[str, Any]) -> None:
        content["param_shapes"][2]["score_pool3.weight"] = torch.Size((50, 8, 1, 1))

    change(files / MODEL_FILE, grow)
    with pytest.raises(UserError, match=r"the parts of score_pool3\.weight are .* do not make up its 400 elements"):
        consolidated(files)


def test_files_of_two_saves_are_not_mixed(files: Path) -> None:
    change(files / MODEL_FILE, lambda content: content["module"]["fc7.weight"].mul_(1.01))
    with pytest.raises(UserError, match=r"not the optimizer's masters rounded, for fc7\.weight"):
        consolidated(files)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda module: module.pop("features.0.weight"), r"features\.0\.weight is missing"),
        (lambda module: module.update(extra=torch.zeros(1)), r"extra is not part of the model"),
        (
            lambda module: module.update({"auxiliary.pool4.bias": torch.zeros(5)}),
            r"auxiliary\.pool3\.weight is missing",
        ),
        (lambda module: module.update({"features.0.weight": torch.zeros(2)}), r"is \(2,\), not \(8, 3, 3, 3\)"),
    ],
)
def test_what_is_missing_unexpected_or_of_another_shape_is_named(
    files: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    change(files / MODEL_FILE, lambda content: edit(content["module"]))
    with pytest.raises(UserError, match=message):
        consolidated(files)


@pytest.mark.parametrize("size", [0, 100, 20000])
def test_a_truncated_file_is_a_clear_error(files: Path, size: int) -> None:
    os.truncate(files / MODEL_FILE, size)
    with pytest.raises(UserError, match="cannot be read"):
        consolidated(files)


def test_a_file_of_another_form_is_a_clear_error(files: Path) -> None:
    change(
        files / OPTIMIZER_FILE.format(0), lambda content: content["optimizer_state_dict"].pop("base_optimizer_state")
    )
    with pytest.raises(UserError, match=r"not what DeepSpeed 0\.19 writes \(KeyError\('base_optimizer_state'\)\)"):
        consolidated(files)
