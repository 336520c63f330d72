"""Auxiliary heads: their gradient by plain torch, on any ranks, and that nothing but training has them."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import run_ranks
from safetensors.torch import load_file
from test_model import images_of, tiny
from test_train import RECIPE, TIME_LIMIT, TRAIN, arguments, config_with, lines, losses, zero_config
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_dist.checkpoints.store import checkpoints_dir
from fcn_dist.commands.entry import run_script
from fcn_dist.config import ModelConfig, Recipe, TrainConfig
from fcn_dist.data.shardset import ShardSet
from fcn_dist.errors import UserError
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.model.auxiliary import PREFIX, add_auxiliary_heads, head_shapes
from fcn_dist.model.fcn import FCN
from fcn_dist.model.preprocess import normalise
from fcn_dist.model.relupool import POOLS
from fcn_dist.recipefile import load_recipe
from fcn_dist.training.entry import refuse_another_run
from fcn_dist.training.objective import summed_losses
from fcn_dist.training.ready import build_model
from fcn_dist.training.runfolder import RunRecord, read_run_record
from fcn_dist.training.schedule import parameter_groups

WEIGHT, OUTPUTS = 0.3, 4
SIZE = (45, 59)


def with_heads(**options: object) -> FCN:
    """A tiny network in float64 whose score layers, the heads' too, are not zero."""
    model = tiny(OUTPUTS, **options).double().train()  # type: ignore[arg-type]
    add_auxiliary_heads(model)
    assert model.auxiliary is not None
    for head in model.auxiliary.values():
        assert isinstance(head, nn.Conv2d) and head.bias is not None
        nn.init.normal_(head.weight, std=0.3)
        nn.init.normal_(head.bias)
    return model.double()


def batch() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    targets = torch.randint(0, OUTPUTS, (3, *SIZE), generator=random).to(torch.uint8)
    targets[0, :20] = IGNORE_LABEL
    return images_of(3, *SIZE), targets


def pooled(model: FCN, images: Tensor) -> dict[int, Tensor]:
    """The maps of all stages, layer by layer."""
    maps: dict[int, Tensor] = {}
    x = normalise(images, model.preprocessing, torch.float64)
    for layer in model.features:
        x = layer(x)
        if isinstance(layer, POOLS):
            maps[len(maps) + 1] = x
    return maps


def loss_by_hand(model: FCN, images: Tensor, targets: Tensor, scales: dict[int, float]) -> tuple[Tensor, Tensor]:
    """Main and auxiliary, of scores at full size."""
    # Where the Caffe network has the image's first pixel in pool4 and pool3: its skips' crops in cells, then those of
    # its score in pixels, whose deconvolution begins half a cell before.
    first = {4: 5 * 16 + 27 - 8, 3: 9 * 8 + 31 - 4} if model.is_reference else {4: 0, 3: 0}
    maps, found = pooled(model, images), []
    for stage, stride in ((3, 8), (4, 16)):
        assert model.auxiliary is not None
        head: Any = model.auxiliary[f"pool{stage}"]
        coarse = F.conv2d(maps[stage] * scales[stage], head.weight, head.bias)
        full = F.interpolate(coarse, scale_factor=stride, mode="bilinear")
        found.append(full[..., first[stage] : first[stage] + SIZE[0], first[stage] : first[stage] + SIZE[1]])
    main, *auxiliary = (
        F.cross_entropy(full, targets.long(), ignore_index=IGNORE_LABEL, reduction="sum")
        for full in (model(images, dropout_keys=range(3)), *found)
    )
    return main, torch.stack(auxiliary).sum()


@pytest.mark.parametrize("recompute", [(0, 0), (2, 1), (6, 2)])
@pytest.mark.parametrize(
    "options",
    [{}, {"geometry": "reference"}, {"variant": "fcn32s", "at_once": True}, {"frozen_stages": 2, "backbone": "vgg19"}],
    ids=str,
)
def test_losses_and_gradients_are_those_of_plain_torch(options: dict[str, Any], recompute: tuple[int, int]) -> None:
    model, (images, targets) = with_heads(**options), batch()
    model.recompute_stages, model.recompute_images = recompute
    recipe = Recipe(model=model.config, train=TrainConfig(auxiliary=WEIGHT))
    job: Any = SimpleNamespace(recipe=recipe, stride=model.stride, offset=model.offset)
    found = summed_losses(model, job, images, targets, range(3))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(found.total(WEIGHT), list(trained.values()))

    scales = {4: 0.01, 3: 0.0001} if model.config.at_once else {4: 1.0, 3: 1.0}
    main, auxiliary = loss_by_hand(model, images, targets, scales)
    torch.testing.assert_close(found.main, main)
    torch.testing.assert_close(found.auxiliary, auxiliary)
    wanted = torch.autograd.grad(main + WEIGHT * auxiliary, list(trained.values()))
    for name, one, other in zip(trained, gradients, wanted, strict=True):
        # Gradients of recomputed parts are summed in float32.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()), msg=name)
    assert all(float(gradient.abs().max()) for gradient in gradients)


def test_heads_begin_at_zero_and_leave_the_network_as_it_is_without_them(shards: Path) -> None:
    recipe = load_recipe(None, ["model.width=0.05", "model.head_width=12"])
    shard_set = ShardSet.open(shards / "training")
    plain, description, _ = build_model(recipe, shard_set)
    helped, same_description, _ = build_model(replace(recipe, train=TrainConfig(auxiliary=0.4)), shard_set)
    assert description == same_description
    own = plain.state_dict()
    assert not any(name.startswith(PREFIX) for name in own)
    extra = {name: tensor for name, tensor in helped.state_dict().items() if name not in own}
    assert {name: tuple(tensor.shape) for name, tensor in extra.items()} == head_shapes(plain)
    assert all(not tensor.any() for tensor in extra.values()) and len(extra) == 4
    assert all(torch.equal(helped.state_dict()[name], tensor) for name, tensor in own.items())
    images = images_of(1, 40, 40)
    assert torch.equal(helped.eval()(images), plain.eval()(images))


def test_heads_learn_at_the_head_s_rate() -> None:
    model, schedule = with_heads(), load_recipe(None, ["schedule.head_multiplier=7"]).schedule
    assert model.auxiliary is not None
    heads = {id(parameter) for parameter in model.auxiliary.parameters()}
    groups = parameter_groups(model, schedule)
    assert sum(len(group.parameters) for group in groups) == len(list(model.parameters()))
    with_them = [group for group in groups if heads & {id(parameter) for parameter in group.parameters}]
    assert [(group.name, group.multiplier) for group in with_them] == [("head_weights", 7.0), ("head_biases", 7.0)]


@pytest.fixture(scope="module")
def helped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one rank, by accumulation, and one of two ranks under ZeRO-3, recomputed and evaluated."""
    folder = tmp_path_factory.mktemp("auxiliary")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    more = ["--set", f"train.auxiliary={WEIGHT}"]
    config = config_with(folder, zero_config(1), gradient_accumulation_steps=2)
    run_ranks(TRAIN, arguments(shards, folder / "one", recipe, config, *more), 1, folder, TIME_LIMIT)
    for setting in ("evaluate.every=1", "train.recompute_stages=4", "train.recompute_images=1"):
        more += ["--set", setting]
    run_ranks(TRAIN, arguments(shards, folder / "two", recipe, zero_config(3), *more), 2, folder, TIME_LIMIT)
    return folder


def test_two_ranks_under_zero_3_train_as_one(helped: Path, shards: Path) -> None:
    classes = len(ShardSet.open(shards / "training").classes)
    one, two = (helped / name for name in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=2e-5)
    of_heads = [[line["auxiliary_loss"] for line in lines(run, "train")] for run in (one, two)]
    assert of_heads[1] == pytest.approx(of_heads[0], rel=2e-5)
    # Two heads that begin at zero, as the network's own score does: all classes are as likely.
    assert of_heads[0][0] == pytest.approx(2 * math.log(classes)) and of_heads[0][-1] < of_heads[0][0]
    assert len(set(of_heads[0])) == 4 and len(lines(two, "evaluate")) == 3


def test_a_model_file_has_the_network_alone_and_conversion_names_what_it_leaves_out(
    helped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = []
    for run in ("one", "two"):
        path = helped / f"{run}.safetensors"
        assert run_script("convert", [str(helped / run), str(path)]) == 0
        assert "left out auxiliary.pool3.weight" in " ".join(capsys.readouterr().out.split())
        states.append(load_file(path))
    width = ModelConfig(width=0.0625, head_width=24)
    assert sorted(states[0]) == sorted(FCN(150, width).state_dict())
    for name, tensor in states[0].items():
        assert float((states[1][name] - tensor).abs().max()) < 1e-4, name


def test_a_run_is_not_continued_with_heads_that_it_began_without_nor_the_reverse(helped: Path) -> None:
    record = read_run_record(helped / "one")
    train = record.recipe["train"]

    def weighing(weight: float) -> RunRecord:
        return replace(record, recipe={**record.recipe, "train": {**train, "auxiliary": weight}})

    refuse_another_run(record, weighing(0.1), helped)
    for before, now in ((0.0, 0.3), (0.3, 0.0)):
        with pytest.raises(UserError, match=rf"train.auxiliary > 0 is {now > 0}, and .* began with {before > 0}"):
            refuse_another_run(weighing(before), weighing(now), helped)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_a_run_with_heads_continues_on_other_ranks_under_any_stage(
    stage: int, helped: Path, shards: Path, tmp_path: Path
) -> None:
    run, recipe, other = tmp_path / "run", helped / "recipe.yaml", zero_config((stage + 1) % 4)
    more = ["--set", f"train.auxiliary={WEIGHT}"]
    run_ranks(TRAIN, arguments(shards, run, recipe, zero_config(stage), *more), 2, tmp_path, TIME_LIMIT)
    shutil.rmtree(checkpoints_dir(run) / "step-00000004")
    run_ranks(TRAIN, arguments(shards, run, recipe, other, *more, "--resume"), 1, tmp_path, TIME_LIMIT)
    assert losses(run) == pytest.approx(losses(helped / "one"), rel=2e-5)
    assert run_script("convert", [str(run), str(tmp_path / "model.safetensors")]) == 0
