"""launch/plan.py as people call it."""

import re
from pathlib import Path

import pytest

from fcn_dist.commands.entry import run_script

RECIPE = "model: {width: 0.0625}\ndata: {crop: [32, 40]}\ntrain: {global_batch: 60}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def plan(recipe: Path, *arguments: str) -> int:
    return run_script("plan", ["--recipe", str(recipe), *arguments])


def test_a_table_over_stage_precision_and_recomputation_and_what_follows_from_it(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(recipe, "--gpus", "8", "--gpu-memory", "1GB", "--reserve", "100MB", "--classes", "14") == 0
    text = capsys.readouterr().out
    assert "14 outputs, crops of 32x40; 8 GPUs with 900 MB each" in text and re.search(r" of 8 +in all", text)
    rows = re.findall(r"^([0-3]) +(fp32|bf16) +(-|stages 1-3) .* (\d+) *$", text, re.MULTILINE)
    assert len(rows) == 16 and all(int(row[-1]) > 60 for row in rows)
    assert "no number of GPUs more than" in text
    assert "global batch of 60: 8 GPUs x micro-batch 8 x accumulation 1, ZeRO-0, bf16." in text


def test_averaged_weights_are_part_of_the_optimizer_s_memory(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = []
    for more in ((), ("--set", "train.ema=0.999")):
        assert plan(recipe, "--gpus", "8", "--gpu-memory", "1GB", "--reserve", "100MB", *more) == 0
        text = capsys.readouterr().out.replace("\n", " ")
        saved.append(float(re.search(r"no number of GPUs more than ([\d.]+) MB", text)[1]))  # type: ignore[index]
    assert saved[1] / saved[0] == pytest.approx(16 / 12, rel=0.1)


def test_a_batch_that_does_not_fit_is_accumulated_or_recomputed(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crop = ("--set", "data.crop=[128,160]")
    assert plan(recipe, "--gpus", "1", "--gpu-memory", "41MB", "--reserve", "1MB", *crop) == 0
    text = capsys.readouterr().out.replace("\n", " ")
    assert "On one GPU, ZeRO partitions nothing" in text
    found = re.findall(r"micro-batch (\d+) x accumulation (\d+), ZeRO-0, bf16(, stages 1-3 recomputed)?", text)
    (plain, more, _), (recomputed, fewer, _) = ((int(a), int(b), c) for a, b, c in found)
    assert plain < recomputed and more > fewer >= 1 and plain * more >= 60
    assert [words for *_, words in found] == ["", ", stages 1-3 recomputed"]


def test_what_more_gpus_bring_at_a_speed_that_was_seen(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits = ("--gpus", "6", "--gpu-memory", "1GB", "--reserve", "1MB", "--micro-batch", "10")
    assert plan(recipe, *fits) == 0
    assert "On paper" not in capsys.readouterr().out
    links = ("--link", "1GB", "--network", "100MB", "--gpus-per-host", "4")
    assert plan(recipe, *fits, "--images-per-second", "100", *links) == 0
    text = capsys.readouterr().out
    rows = re.findall(r"^(\d+) +([\d,]+) +(\d+)% +([\d,]+) +(\d+)% *$", text, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2, 4, 6, 8, 16, 32, 64]
    assert rows[0][1:] == ("100", "100", "100", "100")
    _, *others = ([int(cell) for cell in row[2::2]] for row in rows)
    assert all(one < accumulated <= 100 for one, accumulated in others)
    assert "On 6 GPUs with micro-batches of 10," in text and "global batch of 60 is worth up to" in text


def test_where_nothing_fits_it_says_what_to_change(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(recipe, "--gpus", "1", "--gpu-memory", "2MB", "--reserve", "1MB") == 0
    assert "Not one image fits. Take a smaller crop" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0", "--gpu-memory", "12GB"), "--gpus is 0; 1 or more is needed"),
        (("--gpus", "1", "--gpu-memory", "twelve"), "the size 'twelve' is not understood"),
        (("--gpus", "1", "--gpu-memory", "1GB"), "leaves nothing after --reserve 1GB"),
        (("--gpus", "1", "--gpu-memory", "2GB", "--micro-batch", "0"), "--micro-batch is 0; 1 or more is needed"),
        (("--gpus", "1", "--gpu-memory", "2GB", "--images-per-second", "nan"), "--images-per-second is nan; 1 or more"),
        (("--gpus", "1", "--gpu-memory", "2GB", "--link", "fast"), "the size 'fast' is not understood"),
    ],
)
def test_what_cannot_be_is_refused(
    recipe: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(recipe, *arguments) == 2
    assert message in capsys.readouterr().err
