"""Training states saved, placed into engines that are cut otherwise, and saved again at once: the same to the bit.

Real engines on real ranks. What was saved is read back by name, and DeepSpeed's own accessors say beside it what the
engine held, so that one mistake in reading and in writing cannot hide itself.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_ranks
from safetensors.torch import load_file
from save_checkpoints import FROZEN

from fcn_dist.checkpoints.trainingstate import TrainingState, read_training_state
from fcn_dist.checkpoints.zero import GROUPS_KEY
from fcn_dist.errors import UserError

SCRIPT = Path(__file__).with_name("place_states.py")
TIME_LIMIT = 280.0  # seconds a launch
SOURCES = [
    *(f"{precision}-{stage}" for precision in ("fp32", "bf16") for stage in range(4)),
    *(f"fp16-{stage}-dynamic" for stage in range(4)),
    *("bf16-1-accumulate", "bf16-2-roundrobin", "bf16-2-aligned", "fp32-1-elastic", "fp32-1-sgd"),
    *("fp32-0-fused", "bf16-0-fused", "bf16-2-fused", "bf16-2-offload", "bf16-3-offload"),
]
SPECIAL_PAIRS = [
    # bf16 with float32 accumulation has an optimizer of its own.
    *("bf16-1-accumulate:bf16-3", "bf16-3:bf16-1-accumulate"),
    # Parameters in another order, with gaps between them, and an optimizer saved in another form.
    *("bf16-2-roundrobin:bf16-0", "bf16-2:bf16-2-roundrobin"),
    *("bf16-2-aligned:bf16-1", "bf16-3:bf16-2-aligned", "fp32-1-elastic:fp32-2"),
    *("fp32-1-sgd:fp32-3-sgd", "fp32-1-sgd:fp32-0-sgd"),
    # DeepSpeed's own Adam, which counts its steps in the group, and keeps stage 0 in one flat vector.
    *("bf16-0-fused:bf16-3-fused", "bf16-2-fused:bf16-0-fused", "fp32-0-fused:fp32-1-fused"),
    *("bf16-2-fused:bf16-3", "bf16-1:bf16-0-fused"),
    # With a loss scale that moves, from either of its two forms to either.
    *("fp16-0-dynamic:fp16-2-dynamic", "fp16-3-dynamic:fp16-0-dynamic", "fp16-1-dynamic:fp16-3-dynamic"),
]
OTHER_PRECISION = ["fp32-2:bf16-3", "bf16-1-accumulate:fp32-0", "fp16-2-dynamic:bf16-1", "bf16-0:fp16-2-dynamic"]
REFUSED = ["fp32-1-sgd:fp32-1", "fp32-2:bf16-2-offload"]


def every_pair(precision: str) -> list[str]:
    """Each stage to each."""
    return [f"{precision}-{source}:{precision}-{target}" for source in range(4) for target in range(4)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what two ranks trained and saved under every source."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(SCRIPT, [str(folder), *SOURCES], 2, folder, TIME_LIMIT)
    return folder


def state_of(folder: Path, name: str) -> TrainingState:
    return read_training_state(folder / name / "deepspeed")


def assert_the_engine_agrees(folder: Path, name: str) -> None:
    """What is read is what DeepSpeed's accessors gave, and the module computed with it."""
    state = state_of(folder, name)
    engine = load_file(folder / f"{name}.safetensors")
    assert engine or "roundrobin" in name
    for entry, tensor in engine.items():
        parameter, _, key = entry.partition(" ")
        if parameter in state.frozen:
            found = state.frozen[parameter]
        else:
            found = state.trained[parameter].tensors[key] if key else state.trained[parameter].master
        assert torch.equal(found.joined().float(), tensor), f"{name}: {entry}"
    assert json.loads((folder / f"{name}.json").read_text())["rounded"], name


def assert_averaged(folder: Path, name: str) -> None:
    """Every trained parameter has the moving average of its masters."""
    averages = load_file(folder / f"{name}.averages.safetensors")
    trained = state_of(folder, name).trained
    assert averages.keys() == trained.keys() or ("roundrobin" in name and not averages)
    for parameter, average in averages.items():
        found = trained[parameter].tensors["ema"].joined()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), average, rtol=3e-7, atol=1e-9, msg=f"{name}: {parameter}")
        assert not torch.equal(found, trained[parameter].master.joined())


def assert_same_state(first: TrainingState, second: TrainingState, where: str, same_precision: bool = True) -> None:
    assert first.trained.keys() == second.trained.keys()
    for name, trained in first.trained.items():
        other = second.trained[name]
        assert torch.equal(trained.master.joined(), other.master.joined()), f"{where}: {name}"
        assert trained.tensors.keys() == other.tensors.keys() and "ema" in trained.tensors
        for key, tensor in trained.tensors.items():
            assert tensor.joined().any(), f"{where}: {name}: {key} was never trained"
            assert torch.equal(tensor.joined(), other.tensors[key].joined()), f"{where}: {name}: {key}"
    assert set(first.frozen) == set(second.frozen) == set(FROZEN)
    for name, frozen in first.frozen.items():
        rounded = frozen.joined().to(second.frozen[name].dtype)
        assert torch.equal(rounded, second.frozen[name].joined()), f"{where}: {name}"
    assert set(first.buffers) == set(second.buffers) == {"mean", "seen"}
    assert int(first.buffers["seen"]) == int(second.buffers["seen"]) == 2**40
    mean = second.buffers["mean"]
    assert torch.equal(first.buffers["mean"].to(mean.dtype), mean), where
    assert first.scalars == second.scalars and first.counters == second.counters
    assert first.scalars.get("step", 3) == 3 and first.counters["global_steps"] == 3
    if same_precision:
        places = [(s.scale, s.iteration, s.last_overflow) for s in (first.loss_scale, second.loss_scale) if s]
        assert len(set(places)) == (1 if "fp16" in where else 0)
        assert not places or (len(places), places[0][0]) == (2, 32.0)  # 8, raised twice


@pytest.mark.slow
def test_what_is_read_is_what_the_engine_held(saved: Path) -> None:
    for name in SOURCES:
        assert_the_engine_agrees(saved, name)
        assert_averaged(saved, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "again"),
    [
        (every_pair("fp32"), ["fp32-2:fp32-1:fp32-3"]),
        (every_pair("bf16"), ["bf16-0:bf16-3:bf16-2", "bf16-3:bf16-2:bf16-0"]),
        (SPECIAL_PAIRS, []),
    ],
    ids=["fp32", "bf16", "special"],
)
def test_every_stage_to_every_stage_on_three_ranks_and_one_is_exact(
    saved: Path, pairs: list[str], again: list[str]
) -> None:
    run_ranks(SCRIPT, [str(saved), *pairs], 3, saved, TIME_LIMIT)
    # What was laid out over three ranks, one whole.
    if again:
        run_ranks(SCRIPT, [str(saved), *again], 1, saved, TIME_LIMIT)
    for name in pairs + again:
        assert_the_engine_agrees(saved, name)
        assert_same_state(state_of(saved, name.partition(":")[0]), state_of(saved, name), name)


@pytest.mark.slow
def test_another_precision_takes_the_masters_and_what_has_no_place_is_refused(saved: Path) -> None:
    run_ranks(SCRIPT, [str(saved), *OTHER_PRECISION, *REFUSED], 2, saved, TIME_LIMIT)
    for pair in OTHER_PRECISION:
        assert_the_engine_agrees(saved, pair)
        assert_same_state(state_of(saved, pair.partition(":")[0]), state_of(saved, pair), pair, same_precision=False)
    other_optimizer, offload = ((saved / f"{pair}.error").read_text() for pair in REFUSED)
    assert (
        "holds momentum_buffer of its optimizer, and AdamW as configured keeps exp_avg, exp_avg_sq" in other_optimizer
    )
    assert "zero_optimization.offload_optimizer is set" in offload


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def lower_a_step(content: dict[str, Any]) -> None:
    content["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["step"] -= 1


def cut_a_moment(content: dict[str, Any]) -> None:
    state = content["optimizer_state_dict"]["base_optimizer_state"]["state"][2]
    state["exp_avg"] = state["exp_avg"][:-9].clone()


def drop_a_moment(content: dict[str, Any]) -> None:
    del content["optimizer_state_dict"]["base_optimizer_state"]["state"][2]["exp_avg"]


def drop_a_name(content: dict[str, Any]) -> None:
    content[GROUPS_KEY][0].pop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "file", "edit", "message"),
    [
        ("fp32-2", "zero_pp_rank_1_mp_rank_00_optim_states.pt", lower_a_step, r"step is not the same .*\[2\.0, 3\.0\]"),
        ("fp32-2", "zero_pp_rank_1_mp_rank_00_optim_states.pt", cut_a_moment, r"part of \S+ on rank 1 is cut short"),
        ("fp32-2", "zero_pp_rank_0_mp_rank_00_optim_states.pt", drop_a_moment, r"not what DeepSpeed 0\.19 .*'exp_avg'"),
        ("bf16-0", "mp_rank_00_model_states.pt", drop_a_name, r"not what DeepSpeed 0\.19 writes"),
        ("fp32-0", "mp_rank_00_model_states.pt", drop_a_name, r"has 33 tensors, and state of number 33"),
    ],
)
def test_a_state_with_a_gap_is_refused(
    case: str, file: str, edit: Callable[[dict[str, Any]], None], message: str, saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved / case / "deepspeed", tmp_path / "deepspeed"))
    change(folder / file, edit)
    with pytest.raises(UserError, match=message):
        read_training_state(folder)
