"""Training on what a stream can bring: windows and lanes, remote shards, damaged samples; with the real launcher."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from launching import launch_ranks, run_alone, run_ranks
from shard_server import serving_folder

from fcn_dist.data.packing.run import pack
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.stream import SampleStream
from fcn_dist.data.synthetic import render

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
TIME_LIMIT = 200.0
SEED, STEPS, GLOBAL_BATCH = 5, 4, 4

RECIPE = f"""
data: {{crop: [32, 40], scale: [0.5, 1.5], jitter: 0.2, workers: 1}}
model: {{width: 0.0625, head_width: 24, dropout: 0.3}}
schedule: {{steps: {STEPS}, learning_rate: 0.002}}
train: {{global_batch: {GLOBAL_BATCH}, seed: {SEED}}}
evaluate: {{at_end: false}}
checkpoint: {{every: 2}}
log: {{every: 1}}
"""

# launch/train.py that lists position and key of each sample before it is trained.
LISTING = """
import json, sys
from pathlib import Path
from fcn_dist.commands.entry import run_script
from fcn_dist.data.crops import trained_samples
from fcn_dist.data.shardset import ShardSet
from fcn_dist.training.loop import Trainer

steps, train_steps = [], Trainer.train_steps

def listing(trainer, first_step):
    shards = ShardSet.open(sys.argv[sys.argv.index("--shards") + 1], "training")
    take = trainer.intake.take
    def listed():
        taken = take()
        steps.append([])
        for batch in taken:
            samples = trained_samples(trainer.job.stream, batch.positions, batch.bad_samples)
            steps[-1] += [(p, shards.key(i)) for p, i in zip(batch.positions, samples)]
        return taken
    trainer.intake.take = listed
    done = train_steps(trainer, first_step)
    Path(f"rank{trainer.job.rank.index}.json").write_text(json.dumps(steps))
    return done

Trainer.train_steps = listing
sys.exit(run_script("train"))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven scenes in four shards, of which the last is short."""
    folder = tmp_path_factory.mktemp("shards")
    render(folder / "scenes", training=11, validation=2, size=(48, 64), seed=3)
    pack(folder / "scenes", folder / "packed", samples_per_shard=3)
    return folder / "packed"


def arguments(tmp_path: Path, shards: Path | str, run: Path, *settings: str) -> list[str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    config = ROOT / "launch" / "zero" / "zero1_fp32.json"
    named = ["--shards", str(shards), "--output", str(run), "--recipe", str(recipe), "--deepspeed_config", str(config)]
    return [*named, *(word for setting in settings for word in ("--set", setting))]


def lines(run: Path, event: str) -> list[dict[str, Any]]:
    journal = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in journal if line["event"] == event]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run, "train")]


def test_windows_and_lanes_train_the_same_on_one_rank_and_on_two(shards: Path, tmp_path: Path) -> None:
    settings = ("data.window=2", "data.lanes=2")
    run_alone(TRAIN, arguments(tmp_path, shards, tmp_path / "one", *settings), tmp_path, TIME_LIMIT)
    run_ranks(TRAIN, arguments(tmp_path, shards, tmp_path / "two", *settings), 2, tmp_path, TIME_LIMIT)
    run_alone(TRAIN, arguments(tmp_path, shards, tmp_path / "plain"), tmp_path, TIME_LIMIT)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    # In another order; the first loss is that of scores of 0, whatever the samples.
    assert losses(tmp_path / "plain")[1:] != pytest.approx(losses(tmp_path / "one")[1:], rel=1e-3)


def test_two_ranks_train_and_evaluate_from_a_url_as_from_disk(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FCN_DIST_CACHE", str(tmp_path / "unused"))
    evaluating = "evaluate.at_end=true"
    with serving_folder(shards) as server:
        settings = (evaluating, f"data.cache_dir={tmp_path / 'cache'}", "data.cache_limit=50MB")
        run_ranks(TRAIN, arguments(tmp_path, server.url, tmp_path / "remote", *settings), 2, tmp_path, TIME_LIMIT)
        tars = [path.name for path in shards.rglob("*.tar")]
        assert {name: server.whole_reads(name) for name in tars} == dict.fromkeys(tars, 1)
    run_ranks(TRAIN, arguments(tmp_path, shards, tmp_path / "local", evaluating), 2, tmp_path, TIME_LIMIT)
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    remote, local = (lines(tmp_path / name, "evaluate")[0] for name in ("remote", "local"))
    assert {**remote, "time": 0} == {**local, "time": 0}
    assert not (tmp_path / "unused").exists()
    assert json.loads((tmp_path / "remote" / "run.json").read_text())["shards"] == server.url


# ---- damaged samples


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Two samples of the first steps damaged, met by one rank of two each; the shard folder and the samples' keys."""
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    shard_set = ShardSet.open(folder, "training")
    stream = SampleStream(shard_set, SEED)
    keys = []
    for position in (1, GLOBAL_BATCH * (STEPS // 2) + 2):  # of rank 0 in the first step, of rank 1 in the third
        shard, record = shard_set.locate(stream.sample(position))
        data = bytearray(shard.path.read_bytes())
        data[int(record["image_offset"]) + 200] ^= 1
        shard.path.write_bytes(data)
        keys.append(record["key"].decode())
    assert len(set(keys)) == 2
    return folder, keys


def test_the_first_damaged_sample_ends_a_run_by_default(damaged: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, keys = damaged
    output = run_ranks(TRAIN, arguments(tmp_path, folder, tmp_path / "run"), 2, tmp_path, TIME_LIMIT, code=2)
    assert f"sample {keys[0]!r}: its image does not have the checksum" in output and "Traceback" not in output


def test_within_the_budget_they_are_replaced_counted_over_ranks_and_listed_also_after_a_resume(
    damaged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, keys = damaged
    run = tmp_path / "run"
    command = arguments(tmp_path, folder, run, "data.max_bad_samples=2")
    first = run_ranks(TRAIN, [*command, "--steps", "2"], 2, tmp_path, TIME_LIMIT)
    assert f"1 damaged sample replaced: {keys[0]!r} in " in first
    second = run_ranks(TRAIN, [*command, "--resume"], 2, tmp_path, TIME_LIMIT)
    assert f"2 damaged samples replaced: {keys[0]!r} in " in second and f"{keys[1]!r} in " in second
    assert [(line["step"], line["key"]) for line in lines(run, "bad_sample")] == [(1, keys[0]), (3, keys[1])]
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3, 4]


def test_replaced_samples_of_one_rank_leave_both_with_the_same_global_batches_as_one_rank(
    damaged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """By keys, as each rank was about to train them, and by the losses."""
    folder, keys = damaged
    script = tmp_path / "listing.py"
    script.write_text(LISTING)
    batches = {}
    for world_size in (1, 2):
        run = tmp_path / f"run{world_size}"
        run_ranks(script, arguments(tmp_path, folder, run, "data.max_bad_samples=2"), world_size, tmp_path, TIME_LIMIT)
        seen = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
        assert [len(steps) for steps in seen] == [STEPS] * world_size
        batches[world_size] = [sorted(sample for steps in seen for sample in steps[step]) for step in range(STEPS)]
    assert batches[1] == batches[2]
    assert [position for step in batches[2] for position, _ in step] == list(range(STEPS * GLOBAL_BATCH))
    trained = {key for step in batches[2] for _, key in step}
    assert len(lines(tmp_path / "run2", "bad_sample")) == 2 and not trained & set(keys)
    assert losses(tmp_path / "run2") == pytest.approx(losses(tmp_path / "run1"), rel=2e-5)


def test_one_more_than_the_budget_ends_the_run_on_all_ranks_together(
    damaged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, keys = damaged
    command = arguments(tmp_path, folder, tmp_path / "run", "data.max_bad_samples=1")
    output = launch_ranks(TRAIN, command, 2, tmp_path, TIME_LIMIT, code=2)
    assert "error: 2 samples are damaged" in output and "data.max_bad_samples allows 1" in output
    assert all(repr(key) in output for key in keys) and "Traceback" not in output
    # What was trained before is not lost.
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


def test_a_damaged_sample_ends_an_evaluation_on_all_ranks_together(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    shard_set = ShardSet.open(folder, "validation")
    shard, record = shard_set.locate(1)  # of rank 1
    data = bytearray(shard.path.read_bytes())
    data[int(record["mask_offset"]) + 60] ^= 1
    shard.path.write_bytes(data)
    command = arguments(tmp_path, folder, tmp_path / "run", "evaluate.at_end=true")
    output = run_ranks(TRAIN, command, 2, tmp_path, TIME_LIMIT, code=2)
    assert f"sample {record['key'].decode()!r}: its mask does not have the checksum" in output
    assert "Traceback" not in output
