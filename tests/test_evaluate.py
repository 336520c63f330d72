"""Evaluation on one process, against a plain loop over the scenes folder: full scores, softmax, argmax, counting."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
from colour_scenes import NUM_CLASSES, write_colour_scenes
from torch import nn

from fcn_dist.commands.entry import run_script
from fcn_dist.commands.evaluate import report
from fcn_dist.config import ModelConfig
from fcn_dist.data.packing.run import pack
from fcn_dist.data.shard import DamagedSample
from fcn_dist.data.shardset import ShardSet
from fcn_dist.data.transforms import decode
from fcn_dist.deploy.confusion import draw_confusion
from fcn_dist.deploy.modelfile import write_model_file
from fcn_dist.errors import EarlyEnd, UserError
from fcn_dist.model import inference
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import FCN
from fcn_dist.model.views import Views
from fcn_dist.model.winograd import WinogradConv2d
from fcn_dist.ranks import Rank
from fcn_dist.scoring.evaluate import check_classes, evaluate, rounds
from fcn_dist.scoring.metrics import ConfusionMatrix
from fcn_dist.scoring.metrics import score as scores_of

COUNT = 6


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_scenes(tmp_path_factory.mktemp("evaluate") / "scenes", COUNT, ("validation",))


@pytest.fixture(scope="module")
def shard_set(scenes: Path) -> ShardSet:
    (packed,) = pack(scenes, scenes.parent / "shards", ["validation"], samples_per_shard=4, workers=1)
    return packed


def network(outputs: int, variant: str = "fcn8s") -> FCN:
    torch.manual_seed(1)
    model = FCN(outputs, ModelConfig(variant=variant, width=0.05, head_width=8))  # type: ignore[arg-type]
    for score in (model.score_fr, model.score_pool4, model.score_pool3):
        if score is not None:
            nn.init.normal_(score.weight)
    return model


def plain_loop(model: FCN, scenes: Path, score_other: bool) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Counts of (truth, prediction), from the files that were packed."""
    counts = np.zeros((NUM_CLASSES + 1, NUM_CLASSES + 1), np.int64)
    model.eval()
    for path in sorted((scenes / "images" / "validation").glob("*.jpg")):
        bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
        truth = cv2.imread(str(scenes / "annotations" / "validation" / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED)
        assert bgr is not None and truth is not None
        with torch.no_grad():
            scores = model(torch.from_numpy(np.ascontiguousarray(bgr[..., ::-1]))[None])
        outputs = torch.softmax(scores, dim=1)[0].argmax(dim=0).numpy()
        prediction = outputs if score_other else outputs + 1
        for t in range(NUM_CLASSES + 1):
            for p in range(NUM_CLASSES + 1):
                counts[t, p] += np.count_nonzero((truth == t) & (prediction == p))
    return counts


@pytest.mark.parametrize("variant", ["fcn8s", "fcn32s"])
@pytest.mark.parametrize(("score_other", "workers"), [(False, 0), (True, 0), (False, 2)])
def test_scores_are_those_of_a_plain_loop_over_the_scenes(
    scenes: Path, shard_set: ShardSet, variant: str, score_other: bool, workers: int
) -> None:
    model = network(NUM_CLASSES + score_other, variant)
    told: list[int] = []
    result = evaluate(model, shard_set, workers=workers, advance=told.append)
    expected = plain_loop(model, scenes, score_other)
    assert result.confusion.tolist() == expected.tolist()
    assert np.count_nonzero(expected.sum(axis=0)) > 1  # more than one class is predicted
    labelled = expected[1:]
    assert result.official.pixel_accuracy == pytest.approx(np.trace(expected[1:, 1:]) / labelled.sum())
    ious = [
        labelled[n - 1, n] / (labelled[n - 1].sum() + labelled[:, n].sum() - labelled[n - 1, n])
        for n in range(1, NUM_CLASSES + 1)
        if labelled[n - 1].sum()
    ]
    assert result.official.mean_iou == pytest.approx(sum(ious) / NUM_CLASSES)
    assert sum(told) == COUNT and result.num_samples == COUNT and result.split == "validation"
    if score_other:
        assert result.paper.pixel_accuracy == pytest.approx(np.trace(expected) / expected.sum())


def test_several_looks_are_scored_as_their_mean_at_full_size(scenes: Path, shard_set: ShardSet) -> None:
    model = network(NUM_CLASSES)
    found = evaluate(model, shard_set, views=Views(flip=True))

    class Mean(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            mirrored = model(image.flip(2)).flip(3)
            return torch.log((model(image).softmax(1) + mirrored.softmax(1)) / 2)

    model.eval()
    expected = plain_loop(Mean(), scenes, score_other=False)  # type: ignore[arg-type]
    # Of two outputs as good as equal, either is right; few pixels have any.
    assert np.abs(found.confusion - expected).sum() <= 0.001 * expected.sum()
    assert found.confusion.tolist() != evaluate(model, shard_set).confusion.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_limit_scores_the_first_samples_and_says_so(shard_set: ShardSet, workers: int) -> None:
    model, seen = network(NUM_CLASSES), []

    def forward(images: torch.Tensor, coarse: bool) -> torch.Tensor:
        seen.append(images)
        scores: torch.Tensor = model(images, coarse=coarse)
        return scores

    result = evaluate(model, shard_set, forward=forward, workers=workers, limit=4)
    assert (result.num_samples, result.set_size) == (4, COUNT) and result.summary()["set_size"] == COUNT
    first = [torch.from_numpy(decode(shard_set.read(index))[0])[None] for index in range(4)]
    found = sorted(seen, key=lambda image: image.sum())
    wanted = sorted(first, key=lambda image: image.sum())
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    of_ranks = [list(rounds(shard_set, Rank(index, 3), 0, [], limit=4)) for index in range(3)]
    assert [[scene is not None for scene in one] for one in of_ranks] == [[True, True], [True, False], [True, False]]
    assert evaluate(model, shard_set, limit=99).num_samples == COUNT


def test_the_command_says_what_it_left_out_and_writes_the_matrix(
    shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocessing = network(NUM_CLASSES).preprocessing
    description = ModelDescription(
        network(NUM_CLASSES).config, preprocessing, shard_set.classes, shard_set.colours, score_other=False
    )
    write_model_file(tmp_path / "m.safetensors", network(NUM_CLASSES).state_dict(), description, {})
    outputs = {"--json": tmp_path / "s.json", "--confusion": tmp_path / "c.csv", "--sheet": tmp_path / "s.png"}
    shards = Path(shard_set.location).parent
    command = ["--model", str(tmp_path / "m.safetensors"), "--shards", str(shards), "--limit", "4", "--flip"]
    command += ["--scales", "1", "1.5", "--window", "40"]
    command += [word for name, path in outputs.items() for word in (name, str(path))]
    command += ["--confusion", str(tmp_path / "c.png")]
    assert run_script("evaluate", command) == 0
    assert "on the first 4 of 6 validation samples" in capsys.readouterr().out.replace("\n", " ")
    scores = json.loads((tmp_path / "s.json").read_text())
    assert (scores["num_samples"], scores["set_size"]) == (4, COUNT)
    head, *rows = list(csv.reader((tmp_path / "c.csv").open()))
    assert head == ["truth", "other", *shard_set.classes] and [row[0] for row in rows] == head[1:]
    assert [[int(cell) for cell in row[1:]] for row in rows] == scores["confusion"]
    assert (tmp_path / "s.png").stat().st_size > 0
    drawn = cv2.imread(str(tmp_path / "c.png"))
    wanted = draw_confusion(np.array(scores["confusion"]), shard_set.classes)
    assert drawn is not None and (drawn[..., ::-1] == wanted).all()
    assert run_script("evaluate", [*command[:4], "--limit", "0"]) == 2
    for name, end in (("c.pdf", "'.pdf'"), ("c", "'nothing'")):
        assert run_script("evaluate", [*command[:4], "--confusion", str(tmp_path / name)]) == 2
        assert f"ends in {end}; .csv (pixels) or .png" in capsys.readouterr().err.replace("\n", " ")
        assert not (tmp_path / name).exists()


def test_the_command_computes_as_for_inference_and_counts_the_same(
    scenes: Path, shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(NUM_CLASSES)
    description = ModelDescription(
        model.config, model.preprocessing, shard_set.classes, shard_set.colours, score_other=False
    )
    write_model_file(tmp_path / "m.safetensors", model.state_dict(), description, {})
    monkeypatch.setattr(inference, "WINOGRAD_FROM", 1)
    command = ["--model", str(tmp_path / "m.safetensors"), "--shards", str(Path(shard_set.location).parent)]
    with patch.object(WinogradConv2d, "forward", autospec=True, side_effect=WinogradConv2d.forward) as forward:
        assert run_script("evaluate", [*command, "--json", str(tmp_path / "s.json")]) == 0
    assert forward.call_count == 14 * COUNT
    counts = np.array(json.loads((tmp_path / "s.json").read_text())["confusion"])
    wanted = plain_loop(network(NUM_CLASSES), scenes, score_other=False)
    # Where two classes are as good as equal, either may win.
    assert counts.sum() == wanted.sum() and np.abs(counts - wanted).sum() <= 4


def test_classes_are_reported_by_iou_with_the_pixels_behind_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Absent classes last. By hand: 90 / 105, 5 / 20, 1234 / 1234, and a class that nothing is."""
    matrix = ConfusionMatrix(4)
    matrix.counts[1, 1:3] = 90, 10
    matrix.counts[2, 1:3] = 5, 5
    matrix.counts[3, 3] = 1234
    scores = scores_of(matrix, ("wall", "sky", "tree", "sea"), "validation", np.zeros((1, 2), np.int64), 1, False)
    report(scores, "m")
    table = capsys.readouterr().out.partition("classes by IoU")[2]
    rows = [line.replace("│", " ").split() for line in table.splitlines() if "│" in line]
    assert rows == [
        ["tree", "100.00", "100.00", "1,234", "1,234"],
        ["wall", "85.71", "90.00", "100", "95"],
        ["sky", "25.00", "50.00", "10", "15"],
        ["sea", "-", "-", "0", "0"],
    ]


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_in_the_mode_it_was_in_and_its_weights_alone(shard_set: ShardSet, training: bool) -> None:
    model = network(NUM_CLASSES).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, shard_set)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_leaves_the_mode_as_it_was_too(shard_set: ShardSet) -> None:
    model = network(NUM_CLASSES).train()

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        evaluate(model, shard_set, forward=fail)
    assert model.training


def test_dropout_and_gradients_are_off(shard_set: ShardSet) -> None:
    model = network(NUM_CLASSES).train()
    first, second = evaluate(model, shard_set), evaluate(model, shard_set)
    assert first.confusion.tolist() == second.confusion.tolist()
    seen: list[bool] = []

    def forward(images: torch.Tensor, coarse: bool) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        scores: torch.Tensor = model(images, coarse=coarse)
        return scores

    evaluate(model, shard_set, forward=forward)
    assert seen == [False] * COUNT


@pytest.mark.parametrize("outputs", [1, NUM_CLASSES - 1, NUM_CLASSES + 2, 150])
def test_a_set_of_other_classes_than_the_network_s_is_refused(shard_set: ShardSet, outputs: int) -> None:
    with pytest.raises(UserError, match=rf"{outputs} outputs, but .* has 4 classes; 4 outputs \(or 5"):
        evaluate(network(outputs), shard_set)


def test_classes_of_other_names_or_number_are_refused_naming_the_first(shard_set: ShardSet) -> None:
    names = shard_set.classes
    check_classes(names, shard_set)
    with pytest.raises(UserError, match=r"class 3 'cat', but in .* it is 'class 3'"):
        check_classes((*names[:2], "cat", names[3]), shard_set)
    with pytest.raises(UserError, match=r"3 classes, but .* has 4"):
        check_classes(names[:3], shard_set)


@pytest.mark.parametrize("world_size", [1, 2, 4, 5, COUNT + 3])
def test_every_rank_has_as_many_rounds_and_every_scene_is_in_one(shard_set: ShardSet, world_size: int) -> None:
    ranks = [list(rounds(shard_set, Rank(index, world_size), 0, [])) for index in range(world_size)]
    assert len({len(share) for share in ranks}) == 1
    keys = [scene.key for share in ranks for scene in share if scene]
    assert sorted(keys) == [f"validation_{number:02d}" for number in range(COUNT)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_whose_loader_fails_goes_on_with_its_rounds_and_keeps_the_error(
    shard_set: ShardSet, tmp_path: Path, workers: int
) -> None:
    """Stopping early would leave the other ranks waiting."""
    shutil.copytree(shard_set.dir, tmp_path / "validation")
    damaged = ShardSet.open(tmp_path / "validation")
    shard, record = damaged.locate(2)  # the second of rank 0
    data = bytearray(shard.path.read_bytes())
    data[int(record["image_offset"]) + 60] ^= 1
    shard.path.write_bytes(data)
    failures: list[UserError | EarlyEnd] = []
    scenes = list(rounds(damaged, Rank(0, 2), workers, failures))
    assert [scene is not None for scene in scenes] == [True, False, False]
    assert len(failures) == 1 and repr(damaged.key(2)) in str(failures[0])
    with pytest.raises(DamagedSample):
        evaluate(network(NUM_CLASSES), damaged)
