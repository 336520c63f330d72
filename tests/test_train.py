"""Training with the real launcher, real ranks and real shards."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_contents import contents, differences
from launching import launch_alone, launch_ranks, run_alone, run_ranks
from safetensors.torch import load_file

from fcn_dist.checkpoints.store import DEEPSPEED_TAG, checkpoints_dir, committed, open_checkpoint, step_of
from fcn_dist.commands.entry import run_script
from fcn_dist.sizes import show_size

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
EVALUATE = ROOT / "launch" / "evaluate.py"
TIME_LIMIT = 200.0  # seconds a launch

# Everything random is on: crops, mirroring, jitter, dropout. Nothing of it may depend on ranks or restarts.
RECIPE = """
data: {crop: [32, 40], scale: [0.5, 1.5], jitter: 0.2, workers: 1}
model: {width: 0.0625, head_width: 24, dropout: 0.3}
schedule: {steps: 4, learning_rate: 0.002, warmup_steps: 2, bias_multiplier: 2, head_multiplier: 3}
train: {global_batch: 4, seed: 5}
evaluate: {at_end: false}
checkpoint: {every: 2}
log: {every: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def arguments(shards: Path, run: Path, recipe: Path, config: Path, *more: str) -> list[str]:
    return [
        *("--shards", str(shards), "--output", str(run), "--recipe", str(recipe)),
        *("--deepspeed_config", str(config), *more),
    ]


def zero_config(stage: int, precision: str = "fp32") -> Path:
    return ROOT / "launch" / "zero" / f"zero{stage}_{precision}.json"


def config_with(tmp_path: Path, base: Path, **values: Any) -> Path:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({**json.loads(base.read_text()), **values}))
    return path


def weights(run: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of a run's newest checkpoint, by way of the model file."""
    path = folder / f"{run.name}.safetensors"
    assert run_script("convert", [str(run), str(path)]) == 0
    return dict(load_file(path))


def lines(run: Path, event: str) -> list[dict[str, Any]]:
    journal = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in journal if line["event"] == event]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run, "train")]


def test_one_process_without_a_launcher_trains_on_one_device(shards: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = launch_alone(TRAIN, arguments(shards, run, recipe, zero_config(1)), tmp_path, TIME_LIMIT)
    assert "1 rank x micro-batch 4" in output
    record = json.loads((run / "run.json").read_text())
    assert record["global_batch"] == 4 and record["deepspeed"]["train_micro_batch_size_per_gpu"] == 4
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3, 4]
    memory = [line["peak_memory"] for line in lines(run, "train")]
    assert memory == sorted(memory) and memory[0] > 100e6 and memory[-1] < 10e9
    assert f"memory {show_size(memory[-1])}" in output and lines(run, "train")[-1]["mfu"] is None
    # Warm-up over two steps, then poly from the peak: by hand, 0.002 * (1 - k / 2) ** 0.9.
    rates = [line["learning_rate"] for line in lines(run, "train")]
    assert rates == pytest.approx([0.001, 0.002, 0.002, 0.002 * 0.5**0.9])
    checkpoint, damages = open_checkpoint(run)
    assert checkpoint.state.step == 4 and checkpoint.state.position == 16 and not damages
    assert not list(checkpoint.dir.rglob("*.py"))


def test_two_ranks_train_evaluate_convert_and_predict(shards: Path, recipe: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model.safetensors"
    shared = set(Path("/dev/shm").iterdir())
    more = ["--set", "evaluate.at_end=true", "--set", "evaluate.every=2"]
    launch_ranks(TRAIN, arguments(shards, run, recipe, zero_config(2, "bf16"), *more), 2, tmp_path, TIME_LIMIT)
    assert [line["step"] for line in lines(run, "evaluate")] == [2, 4]
    assert all(np.isfinite(losses(run)))
    assert set(Path("/dev/shm").iterdir()) <= shared, "a finished run leaves no shared memory behind"
    assert run_script("convert", [str(run), str(model)]) == 0
    scores = tmp_path / "scores.json"
    sheet = tmp_path / "sheet.png"
    evaluate = ["--model", str(model), "--shards", str(shards), "--json", str(scores), "--sheet", str(sheet)]
    assert run_script("evaluate", evaluate) == 0
    assert json.loads(scores.read_text())["num_samples"] == 5 and sheet.stat().st_size > 0
    images = shards.parent / "scenes" / "images" / "validation"
    assert run_script("predict", [str(model), str(images), "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").rglob("*_overlay.png"))) == 5


@pytest.mark.slow
def test_ranks_and_accumulation_make_the_same_update_from_the_same_global_batch(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    """Labelled pixels differ from crop to crop, so averaging the ranks' own means would be seen here."""
    found = {}
    for name, ranks, accumulation in (("one", 1, 1), ("two", 2, 1), ("accumulated", 2, 2), ("four", 1, 4)):
        config = config_with(tmp_path, zero_config(1), gradient_accumulation_steps=accumulation)
        run = tmp_path / name
        run_ranks(TRAIN, arguments(shards, run, recipe, config), ranks, tmp_path, TIME_LIMIT)
        found[name] = (weights(run, tmp_path), losses(run))
    reference, reference_losses = found.pop("one")
    assert len(set(reference_losses)) == 4
    for name, (other, other_losses) in found.items():
        assert other_losses == pytest.approx(reference_losses, rel=2e-5), name
        for key, tensor in reference.items():
            # Adam divides by the gradient's own size, so rounding of near-zero gradients is seen at the scale of
            # the learning rate: a small share of it is allowed, a different loss would move all of it.
            worst = float((other[key] - tensor).abs().max())
            assert worst < 1e-4, f"{name}: {key} differs by {worst}"


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_recomputation_trains_the_same(stage: int, shards: Path, recipe: Path, tmp_path: Path) -> None:
    """All stages of the network, image by image where that can be, with accumulation and dropout."""
    config = config_with(tmp_path, zero_config(stage), gradient_accumulation_steps=2)
    found = {}
    for name, stages in (("plain", 0), ("recomputed", 6)):
        run = tmp_path / name
        more = ["--set", f"train.recompute_stages={stages}", "--set", "train.recompute_images=1"]
        run_ranks(TRAIN, arguments(shards, run, recipe, config, *more), 2, tmp_path, TIME_LIMIT)
        found[name] = (losses(run), weights(run, tmp_path))
    assert found["recomputed"][0] == pytest.approx(found["plain"][0], rel=1e-6)
    for key, tensor in found["plain"][1].items():
        assert float((found["recomputed"][1][key] - tensor).abs().max()) < 2e-5, key


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_optimizer_state_and_losses_of_one_that_never_stopped(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    """Stopped after step 2 of 4: in the middle of an epoch, of the schedule and of Adam's bias correction.

    Here by the commands as users give them; test_stages.py has all stages and precisions.
    """
    config = zero_config(2, "bf16")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    launch_ranks(TRAIN, arguments(shards, whole, recipe, config), 2, tmp_path, TIME_LIMIT)
    shutil.copytree(whole, resumed)
    shutil.rmtree(checkpoints_dir(resumed) / "step-00000004")
    output = launch_ranks(TRAIN, arguments(shards, resumed, recipe, config, "--resume"), 2, tmp_path, TIME_LIMIT)
    assert "continuing after step 2" in output
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    expected, found = weights(whole, tmp_path), weights(resumed, tmp_path)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    one, other = (contents(open_checkpoint(run)[0].dir / DEEPSPEED_TAG) for run in (whole, resumed))
    assert differences(one, other) == []
    kinds = {where.rpartition("/")[2] for where in one if "_optim_states" in where.partition("/")[0]}
    assert {"exp_avg", "exp_avg_sq", "step"} <= kinds


@pytest.mark.slow
def test_a_finished_run_is_trained_on_with_more_steps_and_nothing_else_repeated(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    """Without a recipe, a resumed run keeps its own: the default crop would be another."""
    run = tmp_path / "run"
    run_alone(TRAIN, arguments(shards, run, recipe, zero_config(1)), tmp_path, TIME_LIMIT)
    resume = ["--shards", str(shards), "--output", str(run), "--resume"]
    output = run_alone(TRAIN, resume, tmp_path, TIME_LIMIT, code=2)
    assert "trained to step 4 already" in output
    run_alone(TRAIN, [*resume, "--steps", "6"], tmp_path, TIME_LIMIT)
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3, 4, 5, 6]
    assert open_checkpoint(run)[0].state.recipe["data"]["crop"] == [32, 40]


@pytest.mark.slow
def test_the_best_checkpoints_of_a_run_outlive_newer_ones(shards: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["--steps", "6", "--set", "evaluate.every=1", "--set", "evaluate.at_end=true", "--set", "checkpoint.every=1"]
    more += ["--set", "checkpoint.keep=1", "--set", "checkpoint.keep_best=2", "--set", "checkpoint.keep_every=3"]
    run_alone(TRAIN, arguments(shards, run, recipe, zero_config(1), *more), tmp_path, TIME_LIMIT)
    scores = {line["step"]: line["official"]["mean_iou"] for line in lines(run, "evaluate")}
    assert list(scores) == [1, 2, 3, 4, 5, 6]
    best = sorted(scores, key=lambda step: (-scores[step], -step))
    assert {step_of(folder) for folder in committed(run)} == {*best[:2], 3, 6}


@pytest.mark.slow
def test_evaluation_gives_the_same_matrix_on_one_two_and_three_ranks(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_ranks(TRAIN, arguments(shards, run, recipe, zero_config(3)), 2, tmp_path, TIME_LIMIT)
    matrices = []
    for ranks in (1, 2, 3):
        out = tmp_path / f"scores{ranks}.json"
        evaluate = ["--run", str(run), "--shards", str(shards), "--json", str(out)]
        run_ranks(EVALUATE, evaluate, ranks, tmp_path, TIME_LIMIT)
        matrices.append(json.loads(out.read_text())["confusion"])
    assert matrices[0] == matrices[1] == matrices[2]
    assert np.sum(matrices[0]) > 5 * 30 * 40


@pytest.mark.slow
def test_a_rank_without_samples_does_not_hang_the_evaluation_of_a_zero_3_run(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    """Five samples on two ranks, then trained on: the third round has a sample for one rank alone."""
    run = tmp_path / "run"
    more = ["--set", "evaluate.every=1"]
    run_ranks(TRAIN, arguments(shards, run, recipe, zero_config(3), *more), 2, tmp_path, TIME_LIMIT)
    assert [line["num_samples"] for line in lines(run, "evaluate")] == [5, 5, 5]


@pytest.mark.slow
def test_a_run_continues_on_other_ranks_with_no_word_on_how_to_cut_it(
    shards: Path, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_ranks(TRAIN, arguments(shards, run, recipe, zero_config(2)), 1, tmp_path, TIME_LIMIT)
    whole = losses(run)
    shutil.rmtree(checkpoints_dir(run) / "step-00000004")
    output = run_ranks(TRAIN, ["--shards", str(shards), "--output", str(run), "--resume"], 2, tmp_path, TIME_LIMIT)
    assert "the checkpoint was cut for 1 rank x accumulation 1 x up to 4 images, ZeRO stage 2" in output
    assert "the run is cut for 2 ranks x accumulation 1 x up to 2 images, ZeRO stage 2" in output
    assert losses(run) == pytest.approx(whole, rel=2e-5) and len(whole) == 4
