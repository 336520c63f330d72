"""The moving average of the weights: its warm-up, its setting changed in a run, and what evaluation scores.

That it is right under every stage, precision and optimizer, and is carried from each to each, is in test_placement.py;
that it is resumed to the bit, and evaluation leaves no trace, in test_stages.py; skipped steps in test_finite.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import run_alone
from test_train import TIME_LIMIT, TRAIN, arguments, lines, recipe, zero_config
from torch import Tensor, nn

from fcn_dist.checkpoints.store import DEEPSPEED_TAG, checkpoints_dir, step_name
from fcn_dist.checkpoints.trainingstate import Trained, read_training_state
from fcn_dist.commands.entry import run_script
from fcn_dist.errors import UserError
from fcn_dist.training.average import WeightAverage, decay_after

__all__ = ["recipe"]  # a fixture


def engine_of(parameter: nn.Parameter, **zero: Any) -> Any:
    """What is looked at of an engine of stage 0 in which the optimizer has the module's parameters themselves."""
    optimizer = SimpleNamespace(param_groups=[{"params": [parameter]}])
    config = {"zero_optimization": zero}
    return SimpleNamespace(
        optimizer=optimizer, basic_optimizer=optimizer, config=config, param_names={parameter: "weight"}
    )


def test_the_decay_is_small_at_first() -> None:
    assert [decay_after(updates, 0.999) for updates in (1, 2, 80)] == [2 / 11, 3 / 12, 81 / 90]
    assert decay_after(8980, 0.999) < 0.999 == decay_after(9000, 0.999) and decay_after(9, 0.5) == 0.5


def test_masters_that_cannot_be_averaged_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match=r"train\.ema is 0\.9, and zero_optimization\.offload_param moves .* NVMe"):
        WeightAverage(engine_of(weight, offload_param={"device": "nvme"}), 0.9)
    with pytest.raises(UserError, match=r"keeps masters in torch\.bfloat16, .*; set train\.ema=null"):
        WeightAverage(engine_of(nn.Parameter(weight.detach().bfloat16())), 0.9)
    unknown = engine_of(weight)
    unknown.optimizer = SimpleNamespace()
    with pytest.raises(UserError, match=r"made a SimpleNamespace of this .*; set train\.ema=null, or leave out"):
        WeightAverage(unknown, 0.9)


def state_of(run: Path, step: int) -> dict[str, Trained]:
    return dict(read_training_state(checkpoints_dir(run) / step_name(step) / DEEPSPEED_TAG).trained)


def moved(before: Tensor, master: Tensor, decay: float) -> Tensor:
    return (decay * before.double() + (1 - decay) * master.double()).float()


def assert_average(run: Path, step: int, before: dict[str, Tensor], decay: float) -> dict[str, Tensor]:
    """That of `step` is `before`, moved towards the step's masters."""
    averages = {name: trained.tensors["ema"].joined() for name, trained in state_of(run, step).items()}
    for name, trained in state_of(run, step).items():
        wanted = moved(before[name], trained.master.joined(), decay)
        torch.testing.assert_close(averages[name], wanted, rtol=3e-7, atol=1e-7)
    return averages


@pytest.mark.slow
def test_a_run_begins_changes_and_ends_its_average_where_it_is_continued(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def train(steps: int, *more: str) -> str:
        settings = [
            "--set",
            "schedule.warmup_steps=1",
            "--set",
            "checkpoint.every=1",
            "--set",
            "checkpoint.keep=9",
            "--steps",
            str(steps),
            *more,
        ]
        return run_alone(TRAIN, arguments(shards, run, recipe, zero_config(1), *settings), tmp_path, TIME_LIMIT)

    train(2, "--set", "train.ema=null")
    output = train(4, "--resume", "--set", "train.ema=0.35")
    assert "train.ema is 0.35, and was off: the average begins with the weights of step 2" in output
    masters = {name: trained.master.joined() for name, trained in state_of(run, 2).items()}
    averages = assert_average(run, 3, masters, 4 / 13)
    averages = assert_average(run, 4, averages, 0.35)

    # A last step so wide that the network on its way there labels otherwise than there.
    evaluated = ["--set", "evaluate.at_end=true", "--set", "schedule.learning_rate=1"]
    output = train(5, "--resume", "--set", "train.ema=0.39", *evaluated)
    assert "train.ema is 0.39 from here on, and was 0.35 up to step 4" in output
    assert_average(run, 5, averages, 0.39)
    assert_scored(run, shards, tmp_path)

    output = train(6, "--resume", "--set", "train.ema=null", *evaluated)
    assert "train.ema is off, and was 0.39: the averaged weights of step 5 are not carried on" in output
    assert all("ema" not in trained.tensors for trained in state_of(run, 6).values())
    assert [line["weights"] for line in lines(run, "evaluate")] == ["averaged", "trained"]


def assert_scored(run: Path, shards: Path, folder: Path) -> None:
    """The evaluation in training has scored the averaged weights, as `evaluate --run` does."""
    found = {}
    for name, more in (("default", []), ("averaged", ["--weights", "averaged"]), ("trained", ["--weights", "trained"])):
        out = folder / f"{name}.json"
        assert run_script("evaluate", ["--run", str(run), "--shards", str(shards), "--json", str(out), *more]) == 0
        found[name] = json.loads(out.read_text())
    assert found["default"]["confusion"] == found["averaged"]["confusion"] != found["trained"]["confusion"]
    assert found["default"]["model"] == f"{run} step 5 (averaged weights)"
    (line,) = lines(run, "evaluate")
    assert line["official"] == found["averaged"]["official"] != found["trained"]["official"]
