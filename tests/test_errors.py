"""What users get wrong: exit code 2, one message on standard error that names it, no traceback, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeScenes
from launching import launch_alone, launch_ranks
from saved_run import save_run

from fcn_dist.commands.entry import run_script
from fcn_dist.config import ModelConfig
from fcn_dist.data.packing.run import pack
from fcn_dist.deploy.modelfile import write_model_file
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.preprocess import TORCHVISION

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 200.0

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused("train", arguments...)` runs the command, which must exit with 2, and returns its one message."""

    def run(command: str, *arguments: str | Path) -> str:
        capsys.readouterr()
        assert run_script(command, [str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert message.count("error: ") == 1 and "Traceback" not in message
        return message

    return run


@pytest.fixture
def scenes(make_scenes: MakeScenes) -> Path:
    return make_scenes(n=4, size=(48, 64))


@pytest.fixture
def shards(scenes: Path, tmp_path: Path) -> Path:
    pack(scenes, tmp_path / "shards")
    return tmp_path / "shards"


def model_file(path: Path, classes: int) -> Path:
    torch.manual_seed(0)
    names = tuple(f"class {i}" for i in range(1, classes + 1))
    colours = tuple((i, 2 * i, 3 * i) for i in range(1, classes + 1))
    config = ModelConfig(width=0.0625, head_width=8)
    description = ModelDescription(config, TORCHVISION, names, colours, score_other=False)
    write_model_file(path, description.build().state_dict(), description, {})
    return path


def test_a_scenes_folder_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    message = refused("create", tmp_path / "nowhere", tmp_path / "out")
    assert f"{tmp_path / 'nowhere'} is no folder" in message and not (tmp_path / "out").exists()


def test_an_empty_scenes_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} is empty" in refused("create", tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packing_onto_a_shard_set(refused: Refused, scenes: Path, shards: Path) -> None:
    before = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    assert "already holds a shard set" in refused("create", scenes, shards)
    assert before == {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}


def test_an_image_that_does_not_decode_is_named_at_packing(refused: Refused, scenes: Path, tmp_path: Path) -> None:
    image = scenes / "images" / "training" / "training_0001.jpg"
    image.write_bytes(b"no image")
    assert "training_0001.jpg" in refused("create", scenes, tmp_path / "out")
    assert not [*(tmp_path / "out").rglob("training-*"), *(tmp_path / "out").rglob("index.json")]


def test_a_folder_that_is_no_shard_set(refused: Refused, tmp_path: Path) -> None:
    for command in ("verify", "describe"):
        assert str(tmp_path) in refused(command, tmp_path / "nothing")
        assert "is an address in a store" in refused(command, "s3://bucket/shards")
    message = refused("train", "--shards", tmp_path, "--output", tmp_path / "run")
    assert "index.json" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.crops=[32,32]", "unknown recipe key data.crops; did you mean data.crop?"),
        ("dta.crop=3", "unknown recipe key dta; did you mean data?"),
        ("schedule.steps=many", "schedule.steps"),
        ("schedule.steps", "KEY=VALUE"),
        ("data.scale=[2,1]", "data.scale"),
    ],
)
def test_a_recipe_value_that_is_wrong(
    override: str, expected: str, refused: Refused, shards: Path, tmp_path: Path
) -> None:
    message = refused("train", "--shards", shards, "--output", tmp_path / "run", "--set", override)
    assert expected in message and not (tmp_path / "run").exists()


def test_an_unknown_key_in_a_recipe_file_is_named_with_the_file(refused: Refused, shards: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model:\n  widht: 2\n")
    message = refused("train", "--shards", shards, "--output", tmp_path / "run", "--recipe", recipe)
    assert str(recipe) in message and "unknown recipe key model.widht; did you mean model.width?" in message


def test_a_micro_batch_that_does_not_divide(refused: Refused, shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "deepspeed.json"
    text = (ROOT / "launch" / "zero" / "zero1_fp32.json").read_text()
    config.write_text(text.replace('"train_micro_batch_size_per_gpu": "auto"', '"train_micro_batch_size_per_gpu": 64'))
    overrides = ["--set", "train.global_batch=100", "--set", "schedule.learning_rate=0.1"]
    message = refused(
        "train", "--shards", shards, "--output", tmp_path / "run", "--deepspeed_config", config, *overrides
    )
    assert "micro-batch 64 does not divide the global batch 100" in message and "multiple of 64" in message


def test_a_run_folder_that_exists(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    arguments = ["--shards", str(shards), "--output", str(tmp_path / "run"), "--set", "schedule.learning_rate=0.1"]
    overrides = ["--set", "train.global_batch=2", "--set", "model.width=0.0625"]
    output = launch_alone(ROOT / "launch" / "train.py", [*arguments, *overrides], tmp_path, TIME_LIMIT, code=2)
    assert f"error: {tmp_path / 'run'} exists" in output and "Traceback" not in output
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_under_the_launcher_one_message_and_exit_code_2_come_from_all_ranks_together(
    shards: Path, tmp_path: Path
) -> None:
    arguments = ["--shards", str(shards), "--output", str(tmp_path / "run"), "--set", "model.wdth=1"]
    output = launch_ranks(ROOT / "launch" / "train.py", arguments, 2, tmp_path, TIME_LIMIT, code=2)
    assert output.count("unknown recipe key model.wdth") == 1 and "Traceback" not in output


def test_resuming_what_never_began(refused: Refused, shards: Path, tmp_path: Path) -> None:
    message = refused("train", "--shards", shards, "--output", tmp_path / "run", "--resume")
    assert str(tmp_path / "run") in message and not (tmp_path / "run").exists()


def test_evaluating_on_a_shard_set_of_other_classes(refused: Refused, shards: Path, tmp_path: Path) -> None:
    message = refused("evaluate", "--model", model_file(tmp_path / "m.safetensors", 7), "--shards", shards)
    assert "7 classes" in message and "has 5" in message


def test_a_model_file_that_is_none(refused: Refused, shards: Path, scenes: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not a model at all" * 9)
    image = scenes / "images" / "training" / "training_0000.jpg"
    for path in (garbage, tmp_path / "missing.safetensors"):
        assert str(path) in refused("predict", path, image, "--output", tmp_path / "out")
        assert str(path) in refused("evaluate", "--model", path, "--shards", shards)


def test_an_image_that_does_not_decode_does_not_keep_the_others_from_being_labelled(
    refused: Refused, scenes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(scenes / "images" / "training", folder)
    (folder / "training_0002.jpg").write_bytes(b"no image")
    model = model_file(tmp_path / "m.safetensors", 5)
    assert "training_0002.jpg" in refused("predict", model, folder, "--output", tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*_overlay.png"))) == 3


def test_converting_a_folder_that_is_no_run(refused: Refused, tmp_path: Path) -> None:
    assert str(tmp_path / "run") in refused("convert", tmp_path / "run", tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_disk_that_is_full_is_named_by_what_it_cannot_hold_and_what_is_there_stays_whole(
    refused: Refused, small_disk: Callable[[int], Path], scenes: Path, tmp_path: Path
) -> None:
    model, disk = model_file(tmp_path / "tiny.safetensors", 5), small_disk(40)
    message = refused("predict", model, scenes / "images", "--output", disk / "out", "--device", "cpu")
    assert str(disk / "out") in message and "No space left on device; make room there" in message
    for line in (disk / "out" / "predictions.jsonl").read_text().splitlines():
        assert all(Path(output).is_file() for output in json.loads(line)["outputs"])
    assert not list(disk.rglob("*.partial"))
    save_run(tmp_path / "run")
    message = refused("convert", tmp_path / "run", disk / "model.safetensors")
    assert f"{disk / 'model.safetensors'}: No space left on device; make room there" in message
    assert [path.name for path in disk.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_to_is_named(refused: Refused, scenes: Path, tmp_path: Path) -> None:
    model = model_file(tmp_path / "tiny.safetensors", 5)
    command = ["predict", model, scenes / "images", "--device", "cpu", "--output"]
    assert f"{model / 'out'}: Not a directory; a file stands where a folder is needed" in refused(
        *command, model / "out"
    )
    assert "/sys/out: Operation not permitted; change its permissions" in refused(*command, "/sys/out")
    assert "File name too long; choose a shorter name" in refused(*command, tmp_path / ("x" * 300))


def test_outside_of_the_environment_a_script_says_how_to_enter_it() -> None:
    code = "import runpy, sys; sys.modules['rich'] = None; runpy.run_path('launch/predict.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no rich; ") and ". .venv/bin/activate" in done.stderr


def test_a_run_that_is_there_is_named_before_what_a_new_one_would_lack(
    refused: Refused, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{}")
    message = refused("train", "--shards", shards, "--output", tmp_path)
    assert f"{tmp_path} holds a run already" in message and "--resume" in message


def test_a_split_in_place_of_its_set_and_a_missing_split_to_evaluate_on(refused: Refused, shards: Path) -> None:
    train = ["train", "--output", shards / "run", "--set", "train.global_batch=2", "--shards"]
    assert f"name the folder above, {shards}" in refused(*train, shards / "training")
    (shards / "validation" / "index.json").unlink()
    advice = ["--set", "evaluate.at_end=false", "--set", "evaluate.every=0"]
    assert " ".join(advice) in refused(*train, shards)
    # Who follows it gets as far as what this recipe lacks besides.
    assert "learning_rate" in refused(*train, shards, *advice)


def test_a_name_that_ends_as_another_form_does(refused: Refused, scenes: Path, tmp_path: Path) -> None:
    message = refused("convert", tmp_path, tmp_path / "m.safetensors", "--to", "onnx")
    assert "ends as a file of --to safetensors does, and --to onnx is given" in message
    graph = tmp_path / "m.onnx"
    graph.write_bytes(b"\x08\x0a" * 50)
    message = refused("predict", graph, scenes / "images", "--output", tmp_path / "out")
    assert f"{graph} is a graph for other runtimes" in message


def test_packing_names_the_classes_that_are_in_no_image(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the last one is where masks are numbered from 0."""
    info = scenes / "objectInfo150.txt"
    info.write_text(info.read_text().rstrip("\n") + "\n6\t0\t0\t0\tunicorn, mythical animal\n")
    assert run_script("create", [str(scenes), str(tmp_path / "out")]) == 0
    assert "training: in no image: unicorn (masks number classes from 1; 0 is other)" in capsys.readouterr().out


def test_an_interrupted_command_says_so_and_ends_by_the_signal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")  # it waits there until it is read
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), "--gpus", "1", "--gpu-memory", "80GB"]
    command += ["--recipe", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with (tmp_path / "recipe.yaml").open("w"):  # until the command opens it, too
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIME_LIMIT)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "interrupted\n")
