"""Memory that runs out in a step, for real: two ranks, and a limit on one of them that the kernel keeps."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from launching import run_alone, run_ranks

from fcn_dist.checkpoints.store import open_checkpoint
from fcn_dist.data.crops import BadSample
from fcn_dist.data.loader import Batch
from fcn_dist.data.packing.run import pack
from fcn_dist.data.synthetic import render
from fcn_dist.errors import UserError
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.ranks import BatchPlan, Rank, cut_anew
from fcn_dist.training.deepspeed_config import EngineConfig
from fcn_dist.training.display import TrainingDisplay
from fcn_dist.training.job import Job
from fcn_dist.training.runfolder import RunRecord, environment, read_run_record
from fcn_dist.training.shortage import EVENT, Shortage, halved, pieces

SCRIPT = Path(__file__).with_name("scarce_memory.py")
TIME_LIMIT = 200.0  # seconds a launch
STEPS = 4
SCARCE = "1:3:75"  # on rank 1, from step 3 on, 75 MB; micro-batches of 10 and 5 images take some 85 and 45
RECIPE = f"""
data: {{crop: [256, 256], jitter: 0.2, workers: 1}}
model: {{width: 0.0625, head_width: 24, dropout: 0.3}}
schedule: {{steps: {STEPS}, learning_rate: 0.002}}
train: {{global_batch: 20, seed: 5}}
evaluate: {{at_end: false}}
checkpoint: {{every: 0}}
log: {{every: 1}}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven scenes, half a global batch."""
    folder = tmp_path_factory.mktemp("shards")
    render(folder / "scenes", training=11, validation=2, size=(260, 270), seed=3)
    pack(folder / "scenes", folder / "packed", samples_per_shard=4)
    return folder / "packed"


def config(folder: Path, stage: int, micro_batch: int | str = "auto") -> Path:
    values = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1 << 20, "allgather_bucket_size": 1 << 20},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "gradient_clipping": 1.0,
    }
    path = folder / f"{stage}-{micro_batch}.json"
    path.write_text(json.dumps(values))
    return path


def written_recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def train(folder: Path, shards: Path, name: str, config: Path, *more: str, code: int = 0) -> str:
    arguments = ["--shards", str(shards), "--output", str(folder / name), "--recipe", str(written_recipe(folder))]
    return run_ranks(
        SCRIPT, [*arguments, "--deepspeed_config", str(config), *more], 2, folder, timeout=TIME_LIMIT, code=code
    )


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


@pytest.mark.slow
def test_a_step_that_runs_out_of_memory_on_a_rank_is_trained_in_halves_by_all(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deepspeed = config(tmp_path, 1)
    monkeypatch.setenv("SCARCE", f"1:{STEPS + 1}:0")  # never
    train(tmp_path, shards, "plenty", deepspeed)
    monkeypatch.setenv("SCARCE", SCARCE)
    said = train(tmp_path, shards, "scarce", deepspeed)

    shortages = events(tmp_path / "scarce", EVENT)
    assert (shortages[0]["step"], shortages[0]["ranks"], shortages[0]["micro_batch"]) == (3, [1], 5)
    assert shortages[0]["reason"]
    assert "step 3: out of memory on rank 1; the same global batch again in micro-batches of 5 (before: 10)" in said
    plenty, scarce = ([line["loss"] for line in events(tmp_path / name, "train")] for name in ("plenty", "scarce"))
    assert len(scarce) == STEPS
    assert scarce[:2] == plenty[:2]
    assert scarce == pytest.approx(plenty, rel=1e-4)
    assert len(set(plenty)) == STEPS

    checkpoint, _ = open_checkpoint(tmp_path / "scarce")
    assert checkpoint.state.position == STEPS * 20
    size = shortages[-1]["micro_batch"]
    assert checkpoint.state.deepspeed["train_micro_batch_size_per_gpu"] == size
    monkeypatch.setenv("SCARCE", "1:99:0")
    said = train(tmp_path, shards, "scarce", deepspeed, "--resume", "--steps", str(STEPS + 1))
    assert re.search(rf"x micro-batch ({size - 1} or )?{size} x", said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "micro_batch", "advice"),
    [(2, "auto", "take stage 0 or 1"), (1, 10, 'set it and gradient_accumulation_steps to "auto"')],
)
def test_where_it_cannot_be_halved_the_error_says_what_to_change(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, stage: int, micro_batch: int | str, advice: str
) -> None:
    monkeypatch.setenv("SCARCE", SCARCE)
    said = train(tmp_path, shards, "run", config(tmp_path, stage, micro_batch), code=2)
    assert "error (rank 1): out of memory in step 3, with micro-batches of 10 images (" in said
    assert advice in said


@pytest.mark.slow
def test_a_micro_batch_is_chosen_that_trains_in_the_memory_there_is(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {}
    for name, limit in (("plenty", "0:99:0"), ("scarce", "0:0:420")):
        monkeypatch.setenv("SCARCE", limit)
        more = ["--steps", "2", "--set", "train.global_batch=40", "--set", "data.workers=0"]
        arguments = ["--shards", str(shards), "--output", str(tmp_path / name), *more]
        arguments += ["--recipe", str(written_recipe(tmp_path)), "--deepspeed_config", str(config(tmp_path, 1))]
        run_alone(SCRIPT, arguments, tmp_path, TIME_LIMIT)
        losses[name] = [line["loss"] for line in events(tmp_path / name, "train")]
        assert not events(tmp_path / name, EVENT)
    chosen = {name: read_run_record(tmp_path / name).deepspeed["gradient_accumulation_steps"] for name in losses}
    assert chosen["plenty"] == 1 < chosen["scarce"] < 20
    assert losses["scarce"] == pytest.approx(losses["plenty"], rel=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_a_step_that_runs_out_of_memory_is_trained_in_halves(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {}
    for name, limit in (("plenty", "0:99:0"), ("scarce", "0:3:70")):
        monkeypatch.setenv("SCARCE", limit)
        arguments = [
            "--shards",
            str(shards),
            "--output",
            str(tmp_path / name),
            "--recipe",
            str(written_recipe(tmp_path)),
        ]
        run_alone(SCRIPT, [*arguments, "--deepspeed_config", str(config(tmp_path, 1))], tmp_path, TIME_LIMIT)
        losses[name] = [line["loss"] for line in events(tmp_path / name, "train")]
    (first, *_) = events(tmp_path / "scarce", EVENT)
    assert (first["step"], first["micro_batch"]) == (3, 10)
    assert losses["scarce"] == pytest.approx(losses["plenty"], rel=0.01)  # TF32, and other algorithms


def cases() -> list[dict[str, Any]]:
    found = []
    for stage in (0, 1):
        for precision in ("fp32", "bf16", "fp16"):
            config: dict[str, Any] = {"zero_optimization": {"stage": stage}}
            if precision != "fp32":
                config[precision] = {"enabled": True}
            if precision == "fp16":
                config["fp16"]["initial_scale_power"] = 10  # the usual first scale overflows for some steps
            places = [("backward", 0, 1), ("forward", 1, 2)]
            for where, micro, accumulation in places + [("transfer", 0, 1)] * (precision == "bf16"):
                name = f"{precision}-{stage}-{where}"
                found.append(
                    {"name": name, "config": config, "where": where, "micro": micro, "accumulation": accumulation}
                )
    return found


@pytest.mark.slow
def test_nothing_of_the_failed_attempt_is_left_in_any_stage_and_precision(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(cases()))
    script = SCRIPT.with_name("short_of_memory.py")
    said = run_ranks(script, [str(shards), str(tmp_path), str(tmp_path / "cases.json")], 2, tmp_path, TIME_LIMIT)
    for case in cases():
        name = case["name"]
        plenty, short = (
            [(line["loss"], line["gradient_norm"] or 0) for line in events(tmp_path / run, "train")]
            for run in (name, f"{name}-short")
        )
        (event,) = events(tmp_path / f"{name}-short", EVENT)
        assert (event["step"], event["ranks"], event["micro_batch"]) == (2, [1], 4 // case["accumulation"]), name
        assert not events(tmp_path / name, EVENT)
        tolerance = 1e-5 if name.startswith("fp32") else 0.02
        for undisturbed, found in zip(plenty, short, strict=True):
            assert found == pytest.approx(undisturbed, rel=tolerance), name
        for rank in range(2):
            trained = [(tmp_path / f"{run}-rank{rank}.json").read_text() for run in (name, f"{name}-short")]
            assert trained == ["32.0", "32.0"], name
    assert said.count("out of memory on rank 1") == len(cases())


@pytest.mark.parametrize(("total", "micro_batch", "ranks"), [(15, 8, 2), (64, 8, 8), (17, 17, 1), (31, 4, 3)])
def test_halving_again_and_again_keeps_every_image_of_the_global_batch_on_its_rank(
    total: int, micro_batch: int, ranks: int
) -> None:
    loaded = plan = cut_anew(total, micro_batch, ranks)
    while (smaller := halved(plan)) is not None:
        assert smaller.accumulation == 2 * plan.accumulation
        plan = smaller
        for rank in range(ranks):
            found = pieces([batch(loaded, rank, part) for part in range(loaded.accumulation)], loaded, plan, rank)
            assert [piece.positions for piece in found] == [
                plan.positions(rank, part) for part in range(plan.accumulation)
            ]
            for piece in found:
                assert piece.images[:, 0, 0, 0].tolist() == list(piece.positions)
                assert piece.labelled == int((piece.targets != IGNORE_LABEL).sum())
                assert [bad.position for bad in piece.bad_samples] == [p for p in piece.positions if p % 5 == 0]
    assert plan.chunks * 2 > total
    assert plan != loaded


def batch(plan: BatchPlan, rank: int, part: int) -> Batch:
    """Images that tell their positions; each fifth stands for a damaged sample."""
    positions = plan.positions(rank, part)
    images = torch.tensor(positions, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
    targets = torch.zeros(len(positions), 2, 2, dtype=torch.uint8)
    targets[::2, 0] = IGNORE_LABEL
    bad = tuple(BadSample("shard", "key", "reason", position) for position in positions if position % 5 == 0)
    return Batch(images, targets, int((targets != IGNORE_LABEL).sum()), positions, bad)


def alone(tmp_path: Path) -> tuple[Shortage, Any]:
    """One rank whose global batch is 8 images, and the engine it trains, of which nothing but its calls is there."""
    optimizer = SimpleNamespace(zero_grad=lambda: None)
    engine = SimpleNamespace(
        optimizer=optimizer,
        micro_steps=0,
        _config=SimpleNamespace(),
        zero_grad=lambda: None,
        zero_optimization_stage=lambda: 1,
        is_gradient_accumulation_boundary=lambda: True,
        allreduce_gradients=lambda: None,
    )
    config = EngineConfig({}, BatchPlan(8, 8, 1, 1), 0.1, "float32", 1, automatic=True)
    job = cast(Job, SimpleNamespace(config=config, rank=Rank(), device=torch.device("cpu")))
    forgetting = cast(Any, SimpleNamespace(forget_step=lambda: None))
    record = RunRecord({}, {}, {}, "", {}, 1, 1, 8, "", "", **dict.fromkeys(environment(), cast(Any, "")))
    progress = TrainingDisplay(1, 0, shown=False)
    return Shortage(job, engine, forgetting, forgetting, tmp_path, record, progress, None), engine


def test_memory_that_runs_out_in_the_update_cannot_be_helped_by_halves(tmp_path: Path) -> None:
    shortage, engine = alone(tmp_path)
    seen = []

    def accumulate(micro_batches: list[Batch]) -> None:
        seen.append(len(micro_batches))
        engine.allreduce_gradients()
        raise MemoryError

    with pytest.raises(UserError, match="in the update, which is as large for any micro-batch"):
        shortage.train(1, [batch(BatchPlan(8, 8, 1, 1), 0, 0)], accumulate)
    assert seen == [1]


def test_it_halves_down_to_single_images_and_then_says_so_and_passes_other_errors_on(tmp_path: Path) -> None:
    shortage, _ = alone(tmp_path)
    seen = []

    def accumulate(micro_batches: list[Batch]) -> None:
        seen.append([len(piece.positions) for piece in micro_batches])
        raise MemoryError

    micro_batches = [batch(BatchPlan(8, 8, 1, 1), 0, 0)]
    with pytest.raises(UserError, match=r"micro-batches of 1 images \(no memory\); take a smaller data\.crop"):
        shortage.train(1, micro_batches, accumulate)
    assert seen == [[8], [4] * 2, [2] * 4, [1] * 8]

    def fails(_: list[Batch]) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        shortage.train(2, micro_batches, fails)
