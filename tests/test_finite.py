"""Steps that are not finite: real ranks, each ZeRO stage and precision, a NaN or infinity on one rank alone."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch_ranks, run_ranks

from fcn_dist.checkpoints.store import checkpoints_dir, open_checkpoint
from fcn_dist.config import Recipe
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.errors import EXIT_DIVERGED, UserError
from fcn_dist.ranks import BatchPlan
from fcn_dist.training.deepspeed_config import DEFAULT, resolve
from fcn_dist.training.finite import skip_unless_finite
from fcn_dist.training.runfolder import Journal

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
MANY_RUNS = ROOT / "tests" / "not_finite.py"
TIME_LIMIT = 300.0  # seconds a launch, of which an idle machine takes a twentieth
SEED, STEPS, MICRO_BATCH = 5, 4, 2

Case = dict[str, Any]


def case(name: str, stage: int, precision: str, what: str, value: str = "nan", **more: Any) -> Case:
    """A run with a fault on rank 1 in step 2, unless told otherwise; `more` as tests/not_finite.py takes it."""
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if precision == "fp16":
        config["fp16"] |= {"initial_scale_power": 8, **more.pop("fp16", {})}
    config |= more.pop("config", {})
    usual: Case = {"rank": 1, "steps": [2], "micro": 0, "accumulation": 2, "clipping": 1.0}
    return {**usual, "name": name, "what": what, "value": value, "config": config, **more}


def run_cases(cases: list[Case], shards: Path, folder: Path, timeout: float = TIME_LIMIT) -> str:
    (folder / "cases.json").write_text(json.dumps(cases))
    return run_ranks(MANY_RUNS, [str(shards), str(folder), str(folder / "cases.json")], 2, folder, timeout)


def told(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each rank says of its run."""
    return [json.loads((folder / f"{name}-rank{rank}.json").read_text()) for rank in (0, 1)]


def lines(run: Path, event: str) -> list[dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    journal = [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in journal if line["event"] == event]


def assert_skipped(rank: dict[str, Any], skipped: set[int]) -> None:
    """Those steps changed nothing bit for bit, the others something, and nothing that is not finite was left."""
    assert rank["ended"] == "done" and [step["step"] for step in rank["steps"]] == [1, 2, 3, 4]
    for step in rank["steps"]:
        assert step["not_finite"] == []
        # In step 1 there is no engine yet to take digests from.
        assert step["step"] == 1 or (step["before"] == step["after"]) == (step["step"] in skipped)
    for step, following in itertools.pairwise(rank["steps"]):
        # What moves between a step and the next is the average of the weights.
        assert (step["after"] == following["before"]) == (step["step"] in skipped)
    assert rank["steps"][-1]["skipped"] == len(skipped)


def assert_logged(line: dict[str, Any], one: Case, shards: Path) -> None:
    """Rank 1's bad micro-batch and all keys of the global batch, by the plan and the stream themselves."""
    assert line["step"] == 2 and line["ranks"] == [1]
    assert line["what"] == ("gradient" if one["what"] == "gradient" else "loss")
    accumulation = one["accumulation"]
    plan = BatchPlan(2 * accumulation * MICRO_BATCH, MICRO_BATCH, accumulation, 2)
    shard_set = ShardSet.open(shards, "training")
    stream = SampleStream(shard_set, SEED)
    expected = []
    for rank, micro in itertools.product((0, 1), range(accumulation)):
        positions = list(plan.positions(rank, accumulation + micro))
        keys = [shard_set.key(stream.sample(position)) for position in positions]
        bad = rank == 1 and micro == one["micro"]
        expected.append({"rank": rank, "bad": bad, "positions": positions, "keys": keys})
    assert line["micro_batches"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_rank_trains_a_step_in_which_one_met_what_is_not_finite(
    precision: str, shards: Path, tmp_path: Path
) -> None:
    """All ZeRO stages; in the first micro-batch of two, and in the last where the gradient alone would not tell."""
    cases = []
    for stage in range(4):
        clipping = float(stage % 2 == 0)
        cases += [
            case(f"{stage}-gradient", stage, precision, "gradient", clipping=clipping),
            case(f"{stage}-loss", stage, precision, "loss_alone", "inf", micro=1, clipping=clipping),
        ]
    cases.append(case("0-plain", 0, precision, "loss", clipping=0.0, accumulation=1))
    run_cases(cases, shards, tmp_path)
    for one in cases:
        run = tmp_path / one["name"]
        ranks = told(tmp_path, one["name"])
        for rank in ranks:
            assert_skipped(rank, {2})
        if not one["name"].startswith("3"):
            assert [s["weights"] for s in ranks[0]["steps"]] == [s["weights"] for s in ranks[1]["steps"]]
        # An fp16 gradient that overflows is what the loss scale is there for: halved, and no more said.
        usual = precision == "fp16" and one["what"] == "gradient"
        found = lines(run, "not_finite")
        assert len(found) == (0 if usual else 1)
        for line in found:
            assert_logged(line, one, shards)
        train = lines(run, "train")
        assert [line["not_finite_steps"] for line in train] == [0, int(not usual), 0, 0]
        assert [line["loss"] is None for line in train] == [False, not usual, False, False]
        assert [line["skipped_steps"] for line in train] == [0, 1, 1, 1]
        assert train[1]["gradient_norm"] is None
        if precision == "fp16":
            assert train[0]["loss_scale"] == 256 and train[3]["loss_scale"] == (128 if one["name"][0] == "0" else 256)
    for number in range(4):
        # Whatever the fault was, nothing of it is left that would show in later steps.
        both = [told(tmp_path, f"{number}-{name}") for name in ("gradient", "loss")]
        ends = [[rank["steps"][-1]["weights"] for rank in ranks] for ranks in both]
        assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_logged_loss_is_the_mean_of_the_finite_steps_and_their_count_stands_beside_it(
    shards: Path, tmp_path: Path
) -> None:
    cases = [
        case("each", 1, "fp32", "loss"),
        case("window", 1, "fp32", "loss", set=["log.every=4"]),
        case("none", 1, "fp32", "loss", steps=[3, 4], set=["log.every=2"]),
    ]
    output = run_cases(cases, shards, tmp_path)
    each = [line["loss"] for line in lines(tmp_path / "each", "train")]
    (window,) = lines(tmp_path / "window", "train")
    assert window["loss"] == pytest.approx((each[0] + each[2] + each[3]) / 3, rel=1e-6)
    assert window["not_finite_steps"] == 1
    first, second = lines(tmp_path / "none", "train")
    assert first["loss"] > 0 and second["loss"] is None and second["not_finite_steps"] == 2
    assert "loss -  lr" in output


@pytest.mark.slow
def test_an_fp16_overflow_at_the_least_loss_scale_counts_and_ends_all_ranks_together(
    shards: Path, tmp_path: Path
) -> None:
    """Step 1 halves the scale from 8 to 4, the least; steps 2 and 3 can lower it no more. Static scales never can."""
    least = {"initial_scale_power": 3, "min_loss_scale": 4, "hysteresis": 1}
    cases = [
        *(
            case(f"{stage}", stage, "fp16", "gradient", "inf", steps=[1, 2, 3], fp16=least)
            | {"set": ["train.max_skipped_steps=1"]}
            for stage in range(4)
        ),
        case("static", 2, "fp16", "gradient", "inf", fp16={"loss_scale": 16}),
    ]
    run_cases(cases, shards, tmp_path)
    for stage in range(4):
        ended = [rank["ended"] for rank in told(tmp_path, f"{stage}")]
        assert all(text.startswith(f"{EXIT_DIVERGED}: 2 steps were not finite") for text in ended)
        assert "step 3 the last of them: loss scale not finite on rank 1" in ended[0] and "bf16" in ended[0]
        for rank in told(tmp_path, f"{stage}"):
            assert [step["scale"] for step in rank["steps"]] == [4, 4, 4]
            assert all(step["not_finite"] == [] for step in rank["steps"])
            assert rank["steps"][1]["before"] == rank["steps"][2]["after"]
        found = lines(tmp_path / f"{stage}", "not_finite")
        assert [(line["step"], line["what"]) for line in found] == [(2, "loss scale"), (3, "loss scale")]
    assert [line["what"] for line in lines(tmp_path / "static", "not_finite")] == ["loss scale"]
    assert_skipped(told(tmp_path, "static")[1], {2})


# ---- the end of a run, under the real launcher

SPOILT = """
import sys
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from fcn_dist.commands.entry import run_script
from fcn_dist.ranks import Rank
from fcn_dist.training import objective

CPU_Accelerator.is_fp16_supported = lambda self: True
computed, first, bad = 0, {first}, {steps}
cross_entropy = objective.summed_cross_entropy

def spoilt(*arguments):
    global computed
    computed += 1
    loss = cross_entropy(*arguments)
    return loss * float("nan") if Rank.from_environment().index == 1 and first + computed in bad else loss

objective.summed_cross_entropy = spoilt
sys.exit(run_script("train"))
"""

RECIPE = f"""
data: {{crop: [32, 40], workers: 1}}
model: {{width: 0.0625, head_width: 24, dropout: 0.3}}
schedule: {{steps: {STEPS}, learning_rate: 0.002}}
train: {{global_batch: 4, seed: {SEED}, max_skipped_steps: 1}}
evaluate: {{at_end: false}}
checkpoint: {{every: 2}}
log: {{every: 1}}
"""


def spoilt(folder: Path, steps: list[int], first: int = 0) -> Path:
    script = folder / "spoilt.py"
    script.write_text(SPOILT.format(steps=steps, first=first))
    return script


def arguments(folder: Path, shards: Path, config: str) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    named = ["--shards", str(shards), "--output", str(folder / "run"), "--recipe", str(recipe)]
    return [*named, "--deepspeed_config", str(ROOT / "launch" / "zero" / config)]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2_bf16.json", "zero0_fp16.json"])
def test_more_than_the_budget_ends_the_run_with_a_code_of_its_own_and_one_message(
    config: str, shards: Path, tmp_path: Path
) -> None:
    run, command = tmp_path / "run", arguments(tmp_path, shards, config)
    output = launch_ranks(spoilt(tmp_path, [2, 3]), command, 2, tmp_path, TIME_LIMIT, code=EXIT_DIVERGED)
    assert output.count("2 steps were not finite") == 1 and "Traceback" not in output
    assert "step 3 the last of them: loss not finite on rank 1, with samples 'SYN_train_" in output
    assert "train.max_skipped_steps allows 1" in output
    assert "step 2 is the newest checkpoint" in output
    assert [path.name for path in checkpoints_dir(run).glob("*step-*")] == ["step-00000002"]
    assert open_checkpoint(run)[0].state.step == 2
    # The one before the checkpoint still counts after a resume, the one after it only if it comes again.
    again = [*command, "--resume"]
    run_ranks(spoilt(tmp_path, [3], first=2), again, 2, tmp_path, TIME_LIMIT, code=EXIT_DIVERGED)
    assert [line["step"] for line in lines(run, "not_finite")] == [2, 3]
    run_ranks(spoilt(tmp_path, []), again, 2, tmp_path, TIME_LIMIT)
    assert [line["step"] for line in lines(run, "not_finite")] == [2]
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3, 4]


# ---- without ranks


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_plain_optimizer_leaves_all_as_it_is_where_the_norm_is_not_finite(
    kind: type[torch.optim.Optimizer], bad: float
) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    optimizer: Any = kind(parameters, **options | ({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    optimizer.register_step_pre_hook(skip_unless_finite)

    def step(value: float) -> str:
        for parameter in parameters:
            parameter.grad = torch.full((5,), 0.5)
        parameters[1].grad[3] = value  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
        return repr([parameters, optimizer.state_dict()])

    first = repr([parameters, optimizer.state_dict()])
    assert step(bad) == first and optimizer.overflow
    trained = step(0.5)
    assert trained != first and not optimizer.overflow
    assert step(bad) == trained and optimizer.overflow
    assert step(0.5) != trained


def test_a_journal_writes_null_for_what_json_does_not_have(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    journal.write("train", 1, loss=float("nan"), deep={"list": [float("inf"), 1.5, (2, float("-inf"))]}, whole=3)
    (line,) = lines(tmp_path, "train")
    assert line["loss"] is None and line["deep"] == {"list": [None, 1.5, [2, None]]} and line["whole"] == 3


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("section", "key", "precision"),
    [("bf16", "check_grad_overflow", True), ("zero_optimization", "compute_grad_norm", False)],
)
def test_a_configuration_that_would_train_a_nan_is_refused(stage: int, section: str, key: str, precision: bool) -> None:
    values = {**DEFAULT, "bf16": {"enabled": precision}, "zero_optimization": {"stage": stage}}
    recipe = Recipe()
    resolved = {**values, "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    resolve(resolved, recipe, 1)
    refused = {**resolved, section: {**resolved[section], key: False}}
    with pytest.raises(UserError, match=rf"{section}\.{key} is false"):
        resolve(refused, recipe, 1)
