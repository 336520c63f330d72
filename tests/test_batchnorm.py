"""Batch normalisation: torch's own layer as the oracle, torchvision's numbering by hand, and real ranks that resume."""

from pathlib import Path

import pytest
import torch
from resumed_cases import CASES, TIME_LIMIT, assert_resumed_exactly, trained_and_resumed
from safetensors.torch import load_file
from test_train import RECIPE, weights
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_dist.commands.entry import run_script
from fcn_dist.config import ModelConfig, ScheduleConfig
from fcn_dist.errors import UserError
from fcn_dist.model.batchnorm import BatchNorm2d
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import FCN, fuse
from fcn_dist.model.preprocess import TORCHVISION
from fcn_dist.training.schedule import parameter_groups

# Layers of torchvision's vgg16_bn.features and vgg19_bn.features, as its files name them.
CONVOLUTIONS = {
    "vgg16_bn": [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40],
    "vgg19_bn": [0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49],
}
NORMS = {
    "vgg16_bn": [1, 4, 8, 11, 15, 18, 21, 25, 28, 31, 35, 38, 41],
    "vgg19_bn": [1, 4, 8, 11, 15, 18, 21, 24, 28, 31, 34, 37, 41, 44, 47, 50],
}
POOLS = {"vgg16_bn": [6, 13, 23, 33, 43], "vgg19_bn": [6, 13, 26, 39, 52]}
KINDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def activations(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(shape or (3, 6, 5, 7), generator=torch.Generator().manual_seed(seed)) * 3 + 1


def pair() -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    """Ours and torch's with the same state, no tensor in it at its default."""
    ours, theirs = BatchNorm2d(6), nn.BatchNorm2d(6)
    random = torch.Generator().manual_seed(9)
    for name in KINDS[:4]:
        theirs.state_dict()[name].copy_(torch.rand(6, generator=random) + 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def small(backbone: str = "vgg16_bn", frozen_stages: int = 0) -> FCN:
    torch.manual_seed(0)
    model = FCN(3, ModelConfig(backbone=backbone, width=0.05, head_width=6, frozen_stages=frozen_stages))  # type: ignore[arg-type]
    for score in (model.score_fr, model.score_pool4, model.score_pool3):
        assert score is not None
        nn.init.normal_(score.weight)
    return model


def images(count: int = 2, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def norms_of(model: FCN) -> list[BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, BatchNorm2d)]


@pytest.mark.parametrize("training", [True, False])
def test_in_float32_it_is_torchs_layer(training: bool) -> None:
    ours, theirs = pair()
    ours.train(training)
    theirs.train(training)
    for seed in range(3):
        x, y = activations(seed).requires_grad_(), activations(seed).requires_grad_()
        assert torch.equal(ours(x), theirs(y))
        for layer, z in ((ours, x), (theirs, y)):
            (layer(z).square() * activations(7)).sum().backward()
        assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    assert ours.weight.grad is not None and theirs.weight.grad is not None
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    state, wanted = ours.state_dict(), theirs.state_dict()
    assert tuple(state) == tuple(wanted) == KINDS
    assert all(torch.equal(state[name], wanted[name]) for name in KINDS)
    assert state["num_batches_tracked"] == (6 if training else 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_with_16_bit_weights_and_activations_the_arithmetic_is_that_of_float32(
    dtype: torch.dtype, training: bool
) -> None:
    ours, theirs = pair()
    for parameter in ours.parameters():  # as DeepSpeed casts: buffers stay
        parameter.data = parameter.data.to(dtype)
    theirs.weight.data, theirs.bias.data = ours.weight.data.float(), ours.bias.data.float()
    ours.train(training)
    theirs.train(training)
    x = activations().to(dtype)
    found, wanted = ours(x), theirs(x.float())
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype))
    for name in KINDS[2:]:
        torch.testing.assert_close(ours.get_buffer(name), theirs.get_buffer(name))  # dtypes, too
    found.float().square().sum().backward()
    wanted.square().sum().backward()
    assert ours.weight.grad is not None and ours.weight.grad.dtype == dtype
    torch.testing.assert_close(ours.weight.grad.float(), theirs.weight.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_casting_the_module_leaves_the_statistics_in_float32(dtype: torch.dtype) -> None:
    ours, theirs = pair()
    ours.to(dtype)
    assert ours.weight.dtype == dtype
    assert torch.equal(ours.running_var, theirs.get_buffer("running_var"))
    assert ours.running_var.dtype == torch.float32
    assert ours.num_batches_tracked.dtype == torch.int64
    assert pair()[0].double().running_var.dtype == torch.float64
    assert pair()[0].to("meta").running_var.is_meta


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_micro_batch_that_is_not_finite_leaves_the_running_statistics(bad: float) -> None:
    ours, theirs = pair()
    x = activations()
    x[1, 2, 3, 4] = bad
    assert not ours(x).isfinite().all()  # the loss must show it
    for name in ("running_mean", "running_var"):
        assert torch.equal(ours.get_buffer(name), theirs.get_buffer(name))
    ours(activations())
    assert not torch.equal(ours.running_mean, theirs.get_buffer("running_mean"))


def test_a_single_value_a_channel_is_an_error_that_names_the_crop() -> None:
    with pytest.raises(UserError, match=r"one value a channel .* \(1, 6, 1, 1\); two are needed; .* data\.crop"):
        pair()[0](activations(0, 1, 6, 1, 1))
    pair()[0].eval()(activations(0, 1, 6, 1, 1))


@pytest.mark.parametrize("backbone", CONVOLUTIONS)
def test_the_trunk_is_named_as_torchvision_names_it(backbone: str) -> None:
    names = {name for name in small(backbone).state_dict() if name.startswith("features.")}
    wanted = {f"features.{index}.{kind}" for index in CONVOLUTIONS[backbone] for kind in KINDS[:2]}
    assert names == wanted | {f"features.{index}.{kind}" for index in NORMS[backbone] for kind in KINDS}


@pytest.mark.parametrize("backbone", CONVOLUTIONS)
def test_scores_are_those_of_the_network_written_out(backbone: str) -> None:
    """In evaluation, with statistics of two steps of training, in float64."""
    model = small(backbone).double()
    for _ in range(2):
        model(images(), dropout_keys=[1, 2])
    state = model.eval().state_dict()
    x = (images().double() - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    x = x.permute(0, 3, 1, 2)
    pools = []
    for index in range(POOLS[backbone][-1] + 1):
        layer = {kind: state.get(f"features.{index}.{kind}", torch.empty(0)) for kind in KINDS}
        if index in CONVOLUTIONS[backbone]:
            x = F.conv2d(x, layer["weight"], layer["bias"], padding=1)
        elif index in NORMS[backbone]:
            mean, variance, scale, shift = (
                layer[k][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
            )
            x = ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).relu()
        elif index in POOLS[backbone]:
            x = F.max_pool2d(x, 2)
            pools.append(x)
    with torch.no_grad():
        assert model.score_pool4 is not None and model.score_pool3 is not None
        skips = {4: model.score_pool4(pools[3]), 3: model.score_pool3(pools[2])}
        wanted = fuse(model.score_fr(model.head(x, [])), skips)
        found = model(images(), coarse=True)
    assert found.abs().max() > 1e-3
    # Pixels are normalised in float32 whatever the weights are.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_frozen_stages_keep_weights_and_statistics_also_in_training() -> None:
    model = small(frozen_stages=2).train()
    frozen, free = norms_of(model)[:4], norms_of(model)[4:]
    before = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in frozen]
    model(images(), dropout_keys=[1, 2]).sum().backward()
    for layer, state in zip(frozen, before, strict=True):
        assert not layer.training and layer.weight.grad is None
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    for layer in free:
        assert layer.training and layer.weight.grad is not None and layer.num_batches_tracked == 1
    assert model.training and not any(layer.training for layer in norms_of(model.eval()))


def test_scales_and_shifts_of_batch_norm_do_not_decay() -> None:
    model = small()
    groups = parameter_groups(model, ScheduleConfig(steps=1))
    decaying = {id(parameter) for group in groups if group.decays for parameter in group.parameters}
    assert decaying and not decaying & {id(parameter) for layer in norms_of(model) for parameter in layer.parameters()}


def test_a_description_builds_it_again_from_its_json_form() -> None:
    config = ModelConfig(backbone="vgg19_bn", width=0.05, head_width=8)
    before = ModelDescription(config, TORCHVISION, ("wall", "sky"), ((1, 2, 3), (4, 5, 6)), False)
    assert len(norms_of(ModelDescription.from_dict(before.as_dict()).build())) == 16


# 11 training scenes in global batches of 4: step 2, where the resumed runs begin, is in the middle of an epoch.
BATCH_NORM = RECIPE.replace("dropout: 0.3", "dropout: 0.3, backbone: vgg16_bn, frozen_stages: 1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_and_resumed(tmp_path_factory.mktemp("runs"), BATCH_NORM)


def digests(folder: Path, case: str) -> list[list[list[str]]]:
    """By rank, by step: of all buffers, before the average over ranks and after."""
    paths = [folder / f"{case}.buffers-{rank}" for rank in range(2)]
    return [[line.split() for line in path.read_text().splitlines()] for path in paths]


@pytest.mark.slow
@pytest.mark.timeout(2 * TIME_LIMIT + 100)
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_with_batch_norm_and_a_frozen_stage_is_one_that_never_stopped(case: str, runs: Path) -> None:
    """And the buffers of every rank."""
    compared = assert_resumed_exactly(runs, case)
    assert sum(where.endswith("running_var") for where in compared) >= 13
    (first, second), (first_resumed, second_resumed) = digests(runs / "whole", case), digests(runs / "resumed", case)
    assert len(first) == 4 and len(first_resumed) == 2
    assert first[2:] == first_resumed and second[2:] == second_resumed
    for mine, its in zip(first, second, strict=True):
        assert mine[0] != its[0] and mine[1] == its[1]  # each rank has seen other images


@pytest.mark.slow
@pytest.mark.timeout(2 * TIME_LIMIT + 100)
@pytest.mark.parametrize("case", CASES)
def test_statistics_go_into_the_model_file_and_those_of_frozen_stages_never_moved(
    case: str, runs: Path, tmp_path: Path
) -> None:
    whole = weights(runs / "whole" / case, tmp_path)
    for index in NORMS["vgg16_bn"]:
        mean, variance, count = (whole[f"features.{index}.{kind}"] for kind in KINDS[2:])
        assert count.dtype == torch.int64 and mean.dtype == variance.dtype == torch.float32
        frozen = index < POOLS["vgg16_bn"][0]
        assert count == (0 if frozen else 8)  # 4 steps of 2 micro-batches
        assert ((mean == 0).all() and (variance == 1).all()) == frozen


@pytest.mark.slow
@pytest.mark.timeout(2 * TIME_LIMIT + 100)
def test_a_run_with_batch_norm_is_converted_evaluated_and_predicts(runs: Path, tmp_path: Path) -> None:
    model, scores = tmp_path / "model.safetensors", tmp_path / "scores.json"
    assert run_script("convert", [str(runs / "whole" / "bf16-3"), str(model), "--dtype", "bfloat16"]) == 0
    stored = load_file(model)
    assert stored["features.4.weight"].dtype == torch.bfloat16
    assert stored["features.4.running_var"].dtype == torch.float32
    arguments = ["--model", str(model), "--shards", str(runs / "packed"), "--json", str(scores)]
    assert run_script("evaluate", arguments) == 0 and scores.stat().st_size > 0
    pictures = runs / "scenes" / "images" / "validation"
    assert run_script("predict", [str(model), str(pictures), "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").rglob("*_overlay.png"))) == 5
