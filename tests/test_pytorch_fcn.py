"""State dicts of pytorch-fcn become model files that give the same scores, or are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_reference import FORMS, SIZES, by_layers, images, kernel, network
from torch import Tensor

from fcn_dist.commands.entry import run_script
from fcn_dist.deploy import pytorch_fcn
from fcn_dist.deploy.modelfile import read_model_file
from fcn_dist.deploy.predict import Predictor
from fcn_dist.errors import UserError
from fcn_dist.model import reference

NAMES = ("sky", "sea", "sand", "rock", "crab")
# Its names, written out: what its users' files have.
TRUNK = [f"conv{stage}_{number}" for stage, count in enumerate((2, 2, 3, 3, 3), 1) for number in range(1, count + 1)]
UPSCORES = {
    "fcn32s": {"upscore": 64},
    "fcn16s": {"upscore2": 4, "upscore16": 32},
    "fcn8s": {"upscore2": 4, "upscore_pool4": 4, "upscore8": 16},
}
Edit = Callable[[dict[str, Tensor]], object]


def state_dict(variant: str = "fcn8s", at_once: bool = False) -> dict[str, Tensor]:
    """As its model of random weights saves it."""
    own = network(variant, at_once).float().state_dict()
    theirs = {}
    numbers = sorted({int(name.split(".")[1]) for name in own if name.startswith("features.")})
    for name, number in zip(TRUNK, numbers, strict=True):
        for kind in ("weight", "bias"):
            theirs[f"{name}.{kind}"] = own.pop(f"features.{number}.{kind}")
    upscores = {f"{name}.weight": kernel(5, size).float() for name, size in UPSCORES[variant].items()}
    return {**theirs, **own, **upscores}


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(NAMES) + "\n")
    return path


def converted(tmp_path: Path, classes: Path, state: object, *arguments: str) -> Path:
    torch.save(state, tmp_path / "theirs.pth")
    out = tmp_path / "ours.safetensors"
    run_script("convert", ["--from", "pytorch-fcn", str(tmp_path / "theirs.pth"), str(out), *arguments])
    return out


@pytest.mark.parametrize(("variant", "at_once"), FORMS)
def test_the_file_gives_the_scores_of_the_network_for_any_size(
    variant: str, at_once: bool, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--at-once"] if at_once else []
    out = converted(tmp_path, classes, state_dict(variant, at_once), "--classes", str(classes), *more)
    said = capsys.readouterr().out
    assert f"{variant}{' at once' if at_once else ''} of pytorch-fcn, 5 classes" in said and "checked" in said
    predictor = Predictor.from_file(out, "cpu", "float32")
    assert predictor.classes == NAMES and not predictor.info.description.score_other
    own = network(variant, at_once).state_dict()
    for size in SIZES:
        image = images(*size)
        wanted = by_layers(own, image, variant, at_once)[0].numpy()
        found = predictor.scores(image[0].numpy())
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_trainer_s_checkpoint_is_taken_and_the_first_output_may_be_label_0(classes: Path, tmp_path: Path) -> None:
    classes.write_text("\n".join(NAMES[:4]))
    checkpoint = {"epoch": 3, "arch": "FCN8s", "model_state_dict": state_dict(), "optim_state_dict": {"state": {}}}
    out = converted(tmp_path, classes, checkpoint, "--classes", str(classes), "--dtype", "bfloat16")
    model, info = read_model_file(out)
    assert info.description.score_other and info.description.classes == NAMES[:4] and info.dtype == "bfloat16"
    assert model.config.geometry == "reference" and info.source["converted_from"] == "pytorch-fcn, theirs.pth"
    assert len(set(info.description.colours)) == 4


def renamed(state: dict[str, Tensor]) -> None:
    state["conv1_9.weight"] = state.pop("conv1_2.weight")


def trained_upscore(state: dict[str, Tensor]) -> None:
    state["upscore_pool4.weight"] = state["upscore_pool4.weight"] + 0.01


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            renamed,
            r"theirs\.pth is no fcn8s of pytorch-fcn: conv1_2\.weight is missing, conv1_9\.weight is not part",
        ),
        (trained_upscore, r"upscore_pool4\.weight is not the bilinear interpolation .* only frozen ones"),
        (
            lambda state: state.pop("upscore8.weight"),
            r"is no state dict of pytorch-fcn: it has none of upscore8\.weight",
        ),
        (lambda state: state.pop("score_fr.weight"), r"has no 'score_fr\.weight'; give a whole state dict"),
        (
            lambda state: state.update({"fc7.bias": torch.zeros(3)}),
            r"is no network of pytorch-fcn on VGG16: fc7\.bias is \(3,\), not \(16,\)",
        ),
    ],
)
def test_what_is_no_such_network_is_named_and_nothing_is_written(
    edit: Edit, message: str, classes: Path, tmp_path: Path
) -> None:
    state = state_dict()
    edit(state)
    torch.save(state, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match=message):
        pytorch_fcn.convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors", NAMES)
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*partial"))


def test_a_file_that_differs_from_its_layers_is_not_kept(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "SKIP_CROPS", {4: 6, 3: 9})
    layers = pytorch_fcn.by_layers

    def undisturbed(*arguments: object) -> Tensor:
        with monkeypatch.context() as context:
            context.setattr(reference, "SKIP_CROPS", {4: 5, 3: 9})
            return layers(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pytorch_fcn, "by_layers", undisturbed)
    torch.save(state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(UserError, match=r"does not give the scores of its layers: they differ by .*; nothing was writ"):
        pytorch_fcn.convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors", NAMES)
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a state dict does not name its classes; --classes with a file of names is needed"),
        (["--classes", "{classes}", "--step", "3"], "--step is about a run"),
        (
            ["--classes", "{three}"],
            "has 5 outputs, and 3 classes are named; 5 names are needed, or 4 if the first output",
        ),
        (["--classes", "{classes}", "--at-once"], "is a fcn16s, and the at-once form is one of fcn8s"),
        (["--classes", "{twice}"], "has sea twice; the name of a class on each line is needed"),
        (["--classes", "{missing}"], "cannot be read"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[str], message: str, classes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    (tmp_path / "twice.txt").write_text("sky\nsea\nsand\nsea\nrock\n")
    names = {name: str(tmp_path / f"{name}.txt") for name in ("classes", "three", "twice", "missing")}
    filled = [argument.format(**names) for argument in arguments]
    torch.save(state_dict("fcn16s"), tmp_path / "theirs.pth")
    out = tmp_path / "ours.safetensors"
    assert run_script("convert", ["--from", "pytorch-fcn", str(tmp_path / "theirs.pth"), str(out), *filled]) == 2
    assert message in capfd.readouterr().err.replace("\n", " ") and not out.exists()


def test_a_pickle_that_would_run_code_runs_nothing(classes: Path, tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**state_dict(), "planted": Planted()}, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match=r"theirs\.pth are no state dict"):
        pytorch_fcn.convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors", NAMES)
    assert not (tmp_path / "ran").exists()
