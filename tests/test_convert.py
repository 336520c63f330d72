"""From a checkpoint to a model file that was proven. Real ranks are in test_zero.py; here the files are our own."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved_run import IMAGE, STATE, save_run
from tiny_models import DESCRIPTION, tiny_network

from fcn_dist.checkpoints import weights as opening
from fcn_dist.checkpoints.retention import retain
from fcn_dist.commands import convert as command
from fcn_dist.commands.entry import run_script
from fcn_dist.config import CheckpointConfig
from fcn_dist.deploy import convert as conversion
from fcn_dist.deploy import proof
from fcn_dist.deploy.convert import convert
from fcn_dist.deploy.modelfile import read_model_file, write_model_file
from fcn_dist.deploy.predict import Predictor
from fcn_dist.errors import UserError
from fcn_dist.files import OBSTACLES

ROOT = Path(__file__).parents[1]


def assert_nothing_was_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["run"]


def test_the_file_holds_the_weights_and_says_where_they_came_from(tmp_path: Path) -> None:
    model = save_run(tmp_path / "run")
    conversion = convert(str(tmp_path / "run"), str(tmp_path / "model.safetensors"))
    assert conversion.agreement.difference <= conversion.agreement.tolerance == 1e-4
    assert conversion.agreement.arithmetic == "float32 on cpu"
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    _, info = read_model_file(tmp_path / "model.safetensors")
    assert info.description == DESCRIPTION
    wanted = {
        "run": "run",
        "step": 1,
        "weights": "trained",
        "scores": {"mean_iou": 0.25},
        "dtype": "float32",
        "zero_stage": 0,
    }
    assert wanted.items() <= info.source.items()


def test_the_file_predicts_as_the_network_did(tmp_path: Path) -> None:
    model = save_run(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "model.safetensors")
    with torch.inference_mode():
        wanted = model(IMAGE)[0].numpy()
    found = Predictor.from_file(tmp_path / "model.safetensors", "cpu", "float32").scores(IMAGE[0].numpy())
    assert abs(found - wanted).max() <= 1e-6 * abs(wanted).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_stored_in_the_type_asked_for(tmp_path: Path, dtype: str) -> None:
    model = save_run(tmp_path / "run")
    conversion = convert(tmp_path / "run", tmp_path / "model.safetensors", dtype=dtype)
    assert 1e-6 < conversion.agreement.difference <= conversion.agreement.tolerance
    stored = load_file(tmp_path / "model.safetensors")
    wanted = model.fc6.weight.to(getattr(torch, dtype))
    assert torch.equal(stored["fc6.weight"], wanted)


def test_emulated_arithmetic_is_computed_in_float32_unless_that_is_not_near_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's scores are of bfloat16 throughout. In the meantime a difference of a thousandth is too large."""
    ways = []

    def engine(probe: dict[str, Any]) -> dict[str, Any]:
        model = tiny_network().bfloat16()
        model.get_parameter("fc7.bias").data[3] = 0.5
        with torch.inference_mode():
            return {**probe, "scores": model(probe["image"], coarse=True).float().contiguous()}

    save_run(tmp_path / "run", edit_probe=engine, state=replace(STATE, precision="bfloat16"))
    for multiplied, tolerance in ((True, 3e-2), (False, 0.2), (False, 1e-3)):
        monkeypatch.setattr(proof, "multiplies", lambda *_, able=multiplied: able)
        monkeypatch.setitem(proof.TOLERANCES, "bfloat16", tolerance)
        found = convert(tmp_path / "run", tmp_path / "model.safetensors", overwrite=True).agreement
        ways.append(found.arithmetic)
        assert found.difference <= tolerance and (found.difference == 0.0) == (found.arithmetic == "bfloat16 on cpu")
    assert ways == ["bfloat16 on cpu", "float32 with weights in bfloat16 on cpu", "bfloat16 on cpu"]


def test_in_float32_the_weights_are_those_the_engine_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all layers, also those whose weights are rounded some outputs at a time."""

    def rounded(probe: dict[str, Any]) -> dict[str, Any]:
        model = tiny_network().bfloat16().float()
        model.get_parameter("fc7.bias").data[3] = 0.5
        with torch.inference_mode():
            return {**probe, "scores": model(probe["image"], coarse=True).contiguous()}

    save_run(tmp_path / "run", edit_probe=rounded, state=replace(STATE, precision="bfloat16"))
    monkeypatch.setattr(proof, "multiplies", lambda *_: False)
    monkeypatch.setattr(proof, "OUTPUTS_AT_ONCE", 5)
    agreement = convert(tmp_path / "run", tmp_path / "model.safetensors").agreement
    assert agreement.arithmetic == "float32 with weights in bfloat16 on cpu" and agreement.difference <= 1e-6


def test_scores_that_differ_are_an_error_and_leave_no_file(tmp_path: Path) -> None:
    save_run(tmp_path / "run", edit_probe=lambda probe: {**probe, "scores": probe["scores"] * 1.001})
    with pytest.raises(UserError, match=r"differ by 0\.001 of the largest score in float32 on cpu"):
        convert(tmp_path / "run", tmp_path / "model.safetensors")
    assert_nothing_was_left(tmp_path)


def test_scores_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    save_run(tmp_path / "run", edit_probe=lambda probe: {**probe, "scores": probe["scores"] * torch.nan})
    with pytest.raises(UserError, match="differ by nan"):
        convert(tmp_path / "run", tmp_path / "model.safetensors")


def test_a_failed_conversion_keeps_the_file_it_was_to_replace(tmp_path: Path) -> None:
    save_run(tmp_path / "run", edit_probe=lambda probe: {**probe, "scores": probe["scores"] + 1})
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(UserError, match="nothing was written"):
        convert(tmp_path / "run", tmp_path / "model.safetensors", overwrite=True)
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_a_disk_that_fails_while_the_file_is_proven_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux tells of it once; who flushes again is told nothing."""
    save_run(tmp_path / "run")
    disks = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def flush(descriptor: int) -> None:
        if disks:
            raise disks.pop()

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, flush)
    with pytest.raises(OSError, match="Input/output error"):
        convert(tmp_path / "run", tmp_path / "model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_an_output_that_exists_is_refused_unless_told_to_overwrite(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors exists"):
        convert(tmp_path / "run", tmp_path / "model.safetensors")
    convert(tmp_path / "run", tmp_path / "model.safetensors", overwrite=True)


def test_places_that_no_file_can_have_are_refused_before_any_work(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "old.json").write_text("{}")
    out = tmp_path / "model.safetensors"
    for arguments, message in (
        ([tmp_path / "pipe", "--overwrite"], "pipe is no regular file"),
        ([tmp_path, "--overwrite"], "is a folder; the name of a file is needed"),
        ([tmp_path / "nowhere" / "m.safetensors"], "is no folder to write m.safetensors into"),
        ([out, "--json", out], "is to be the model file, and --json names it too"),
        ([out, "--json", tmp_path / "old.json"], "old.json exists"),
        ([out, "--json", tmp_path / "pipe", "--overwrite"], "pipe is no regular file"),
        ([out, "--json", tmp_path / "nowhere" / "j.json"], "is no folder to write j.json into"),
    ):
        with pytest.raises(UserError, match=message):
            command.main([str(tmp_path / "run"), *map(str, arguments)])
    assert {path.name for path in tmp_path.iterdir()} == {"run", "pipe", "old.json"} and (tmp_path / "pipe").is_fifo()


def test_what_is_read_is_never_written_to(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "model.safetensors"
    save_run(run)
    (run / "predictions").mkdir()
    for name in ("run.json", "metrics.jsonl", "predictions/evaluation.json"):
        (run / name).write_text("{}")
    step = run / "checkpoints" / "step-00000001"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    model_states = step / "deepspeed" / "mp_rank_00_model_states.pt"
    (tmp_path / "link").symlink_to(step)
    for arguments in (
        [model_states],
        [step / "probe.safetensors"],
        [step / "new.safetensors"],
        [tmp_path / "link" / "probe.safetensors"],
        [step / "new.onnx", "--to", "onnx"],
        [run / "run.json"],
        [run / "metrics.jsonl"],
        [out, "--json", run / "run.json"],
        [out, "--json", run / "predictions" / "evaluation.json"],
        [out, "--json", step / "manifest.json"],
    ):
        with pytest.raises(UserError, match=r"is a part of .*run, which is to be read"):
            command.main([str(run), *map(str, arguments), "--overwrite"])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before and not out.exists()
    for _ in range(2):  # beside them, and again
        made = [str(run / name) for name in ("model.safetensors", "conversion.json")]
        command.main([str(run), made[0], "--json", made[1], "--overwrite"])
    (tmp_path / "names.txt").write_text("sky\nsea\n")
    with pytest.raises(UserError, match=r"is a part of"):
        command.main(
            ["--from", "pytorch-fcn", "--classes", str(tmp_path / "names.txt"), made[0], made[0], "--overwrite"]
        )


def test_a_checkpoint_that_its_run_removes_meanwhile_gives_way_to_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = tmp_path / "run", replace(STATE, scores=None)
    save_run(run, step=1, seed=1, state=state)

    to_save = [2, 3, 4]

    def trained_on(before: Callable[..., Any], step: int) -> Callable[..., Any]:
        """`before`, at whose first call the run saves another checkpoint, and removes those it has."""

        def wrapped(*arguments: Any) -> Any:
            if step in to_save:
                to_save.remove(step)
                save_run(run, step=step, seed=step, state=state)
                retain(run, run / "checkpoints" / f"step-{step:08d}", CheckpointConfig(keep=1))
            return before(*arguments)

        return wrapped

    for module, name, step in ((opening, "check_listed", 2), (opening, "consolidate", 3), (conversion, "compare", 4)):
        monkeypatch.setattr(module, name, trained_on(getattr(module, name), step))
    converted = convert(run, tmp_path / "model.safetensors")
    assert converted.checkpoint.state.step == 4 and converted.passed_over == ()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has step-00000004"):
        convert(run, tmp_path / "other.safetensors", step=3)


def test_a_run_that_is_always_faster_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    save_run(run)

    def lose(folder: Path) -> Any:
        folder.rename(folder.with_name(f"step-{int(folder.name[5:]) + 1:08d}"))
        return (folder / "manifest.json").read_text()

    monkeypatch.setattr(opening, "check_listed", lose)
    with pytest.raises(UserError, match=r"run removed 20 checkpoints while they were read; .*checkpoint.keep"):
        convert(run, tmp_path / "model.safetensors")
    assert_nothing_was_left(tmp_path)


def test_options_may_stand_anywhere_but_after_two_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "run")
    command.main([str(tmp_path / "run"), "--step", "1", str(tmp_path / "m.safetensors"), "--dtype", "bfloat16"])
    assert (tmp_path / "m.safetensors").is_file()
    monkeypatch.chdir(tmp_path)
    command.main(["--step", "1", "--", "run", "-m.safetensors"])
    assert (tmp_path / "-m.safetensors").is_file()


@pytest.mark.parametrize("number", sorted(OBSTACLES))
def test_what_torch_quotes_of_the_system_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save_run(tmp_path / "run", step=1)
    save_run(tmp_path / "run", step=2)

    def load(path: Path, **_: Any) -> None:
        if "00000002" in str(path):
            raise RuntimeError(f"unable to open file <{path}> in read-only mode: {os.strerror(number)} ({number})")
        raise AssertionError("an older checkpoint was taken")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UserError, match=rf"step-00000002.* cannot be read here \({re.escape(os.strerror(number))}\)"):
        convert(tmp_path / "run", tmp_path / "model.safetensors")


HELD = """
import signal, sys
from fcn_dist.commands.entry import run_script
from fcn_dist.deploy import convert

def held(path, *_):
    print(path.exists(), flush=True)
    signal.pause()

convert.compare = held
sys.exit(run_script("convert"))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt2"])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, name: str, signum: signal.Signals) -> None:
    save_run(tmp_path / "run")
    arguments = [sys.executable, "-c", HELD, str(tmp_path / "run"), str(tmp_path / name)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "True\n"
        process.send_signal(signum)
        assert process.wait(60) == -signum
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("card", [{}, [], 3, {"data_set": None, "scores": {"official": {"mean_iou": "high"}}}])
def test_what_a_file_says_of_itself_is_shown_whatever_its_card_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], card: Any
) -> None:
    path = tmp_path / "m.safetensors"
    write_model_file(path, tiny_network().state_dict(), DESCRIPTION, {"card": card, "run": "beach"})
    assert run_script("convert", [str(path), "--show"]) == 0
    shown = capsys.readouterr().out
    assert "beach" in shown and "cannot be read" in shown


def test_the_command_says_which_newer_checkpoint_was_passed_over_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = save_run(tmp_path / "run", step=1, seed=1)
    save_run(tmp_path / "run", step=2, seed=2)
    (tmp_path / "run/checkpoints/step-00000002/deepspeed/mp_rank_00_model_states.pt").unlink()
    figures = tmp_path / "figures.json"
    command.main([str(tmp_path / "run"), str(tmp_path / "model.safetensors"), "--json", str(figures)])
    printed = capsys.readouterr().out
    assert "step-00000002: deepspeed/mp_rank_00_model_states.pt is missing" in printed
    assert "largest difference" in printed and "0.0001 allowed" in printed
    assert json.loads(figures.read_text())["step"] == 1
    assert torch.equal(load_file(tmp_path / "model.safetensors")["fc7.bias"], older.get_parameter("fc7.bias"))


def test_averaged_weights_are_taken_where_there_are_any_unless_the_trained_ones_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaged = tiny_network(seed=1)
    trained = save_run(tmp_path / "run", averaged=averaged)
    for more, network, weights in (
        ([], averaged, "averaged"),
        (["--weights", "averaged"], averaged, "averaged"),
        (["--weights", "trained"], trained, "trained"),
    ):
        out = tmp_path / "model.safetensors"
        command.main([str(tmp_path / "run"), str(out), "--overwrite", *more])
        stored = load_file(out)
        assert all(torch.equal(stored[name], tensor) for name, tensor in network.state_dict().items())
        assert read_model_file(out)[1].source["weights"] == weights
        assert f", its {weights} weights" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("weights", ["trained", "averaged"])
def test_each_kind_of_weights_is_proven_by_its_own_scores(tmp_path: Path, weights: Any) -> None:
    def exchange(probe: dict[str, Any]) -> dict[str, Any]:
        return {**probe, "scores": probe["averaged_scores"], "averaged_scores": probe["scores"]}

    save_run(tmp_path / "run", edit_probe=exchange, averaged=tiny_network(seed=1))
    with pytest.raises(UserError, match="does not give the scores that the training engine recorded"):
        convert(tmp_path / "run", tmp_path / "model.safetensors", weights=weights)
    assert_nothing_was_left(tmp_path)


def test_averaged_weights_that_there_are_not_are_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds no averaged weights; a run with train\.ema is needed"):
        convert(tmp_path / "run", tmp_path / "model.safetensors", weights="averaged")


def test_a_step_can_be_chosen(tmp_path: Path) -> None:
    save_run(tmp_path / "run", step=1, seed=1)
    save_run(tmp_path / "run", step=2, seed=2)
    assert convert(tmp_path / "run", tmp_path / "model.safetensors", step=1).checkpoint.state.step == 1
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        convert(tmp_path / "run", tmp_path / "other.safetensors", step=3)


def test_a_checkpoint_without_recorded_scores_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run", edit_probe=lambda probe: {})
    with pytest.raises(UserError, match="without the scores it holds, a conversion cannot be checked"):
        convert(tmp_path / "run", tmp_path / "model.safetensors")
    assert_nothing_was_left(tmp_path)


def test_a_manifest_that_disagrees_with_deepspeeds_files_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run", state=replace(STATE, zero_stage=2, world_size=4))
    with pytest.raises(UserError, match="ZeRO stage 2 on 4 ranks by its manifest, and with stage 0 on 1"):
        convert(tmp_path / "run", tmp_path / "model.safetensors")


def test_a_diverged_model_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run", bias=torch.nan)
    with pytest.raises(UserError, match=r"no finite numbers in fc7\.bias: training had diverged"):
        convert(tmp_path / "run", tmp_path / "model.safetensors")


def test_weights_beyond_float16_are_refused_in_float16(tmp_path: Path) -> None:
    save_run(tmp_path / "run", bias=1e5)
    with pytest.raises(UserError, match=r"fc7\.bias are beyond the range of float16"):
        convert(tmp_path / "run", tmp_path / "model.safetensors", dtype="float16")
    convert(tmp_path / "run", tmp_path / "model.safetensors", dtype="bfloat16")


def test_the_command_ends_with_2_and_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("convert", [str(tmp_path / "none"), str(tmp_path / "model.safetensors")]) == 2
    assert capsys.readouterr().err.startswith(f"error: no run folder {tmp_path / 'none'}")


def test_the_card_says_what_it_was_trained_on_and_what_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = {"pixel_accuracy": 0.5, "mean_iou": 0.25, "score": 0.375}
    state = replace(STATE, scores={"split": "validation", "num_samples": 5, "official": official})
    config = replace(DESCRIPTION.config, weights="some/where/vgg.pth", weights_licence="CC BY 4.0")
    save_run(tmp_path / "run", state=state, description=replace(DESCRIPTION, config=config))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"shards": "s3://bucket/camvid-shards"}))
    out = tmp_path / "model.safetensors"
    convert(tmp_path / "run", out)
    card = read_model_file(out)[1].source["card"]
    assert card["data_set"]["name"] == "camvid-shards" and card["scores"]["official"] == official
    assert (card["classes"], card["steps"], card["images_trained"], card["weights"]) == (5, 1, 8, "trained")
    assert card["began_with"] == {"weights": "vgg.pth", "licence": "CC BY 4.0"}
    command.main([str(out), "--show"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "fcn8s on vgg16" in printed and "camvid-shards, 5 classes" in printed and "sky, sea, sand" in printed
    assert "vgg.pth, licence CC BY 4.0" in printed and "mean iou 25.00 %" in printed


@pytest.mark.parametrize(("weights", "began"), [(None, None), ("v.pth", {"weights": "v.pth", "licence": "unknown"})])
def test_a_licence_that_nobody_stated_is_unknown(tmp_path: Path, weights: str | None, began: Any) -> None:
    config = replace(DESCRIPTION.config, weights=weights)
    save_run(tmp_path / "run", description=replace(DESCRIPTION, config=config))
    convert(tmp_path / "run", tmp_path / "model.safetensors")
    card = read_model_file(tmp_path / "model.safetensors")[1].source["card"]
    assert card["began_with"] == began and card["data_set"]["name"] == "unknown"
