"""Winograd's convolutions against torch's in float64, and whole networks made of them against themselves before."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from fcn_dist.config import ModelConfig
from fcn_dist.model import inference, winograd
from fcn_dist.model.fcn import FCN
from fcn_dist.model.inference import for_inference
from fcn_dist.model.winograd import FILTERINGS, WinogradConv2d

CASES = list(product(FILTERINGS, (0, 1, 3), (False, True)))


def convolution(size: int, padding: int, channels: int = 24, outputs: int = 17) -> nn.Conv2d:
    torch.manual_seed(size + padding)
    layer = nn.Conv2d(channels, outputs, size, padding=padding)
    nn.init.normal_(layer.weight, std=(2 / (channels * size * size)) ** 0.5)
    return layer


@pytest.mark.parametrize(("size", "padding", "relu"), CASES)
@pytest.mark.parametrize("at_once", [1, 7, 256])
def test_values_are_those_of_the_definition(
    size: int, padding: int, relu: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "TILES_AT_ONCE", at_once)
    layer = convolution(size, padding)
    fast = WinogradConv2d(layer, relu)
    for height, width in ((7, 8), (13, 9), (16, 16), (30, 21)):
        x = torch.randn(2, 24, height, width).relu()
        wanted = copy.deepcopy(layer).double()(x.double())
        found = fast(x)
        assert found.shape == wanted.shape and found.dtype == torch.float32
        assert (found - (wanted.relu() if relu else wanted)).abs().max() <= 3e-5 * wanted.abs().max()


@pytest.mark.parametrize("size", FILTERINGS)
def test_a_tile_reads_what_the_weights_reach_and_no_more_is_multiplied(size: int) -> None:
    filtering = FILTERINGS[size]
    assert filtering.tile == filtering.inner + size - 1
    assert WinogradConv2d(convolution(size, 0)).weight_NNCO.shape == (filtering.tile, filtering.tile, 24, 17)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(width=0.125),
        ModelConfig(width=0.125, backbone="vgg19_bn"),
        ModelConfig(width=0.125, geometry="reference", variant="fcn16s"),
        ModelConfig(width=0.125, pooling="average", at_once=True),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (33, 70)])
def test_a_network_for_inference_gives_its_own_scores(
    config: ModelConfig, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "WINOGRAD_FROM", 1)
    torch.manual_seed(0)
    model = FCN(5, config)
    nn.init.normal_(model.score_fr.weight)
    images = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double().eval()(images)
        fast = for_inference(model)
        found = fast(images)
    assert sum(isinstance(layer, WinogradConv2d) for layer in fast.modules()) >= 13
    assert not any(isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > 1 for layer in fast.modules())
    assert (found - wanted).abs().max() <= 3e-5 * wanted.abs().max()


def test_full_width_replaces_the_convolutions_of_many_channels_alone() -> None:
    with torch.device("meta"):
        model = FCN(5, ModelConfig())
    model = for_inference(model.to_empty(device="cpu"))
    fast = [name for name, layer in model.named_modules() if isinstance(layer, WinogradConv2d)]
    assert not any(isinstance(model.features[int(name.partition(".")[2]) + 1], nn.ReLU) for name in fast[:-1])
    assert fast == [f"features.{number}" for number in (10, 12, 14, 17, 19, 21, 24, 26, 28)] + ["fc6"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_keep_their_network(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "WINOGRAD_FROM", 1)
    model = for_inference(FCN(5, ModelConfig(width=0.125)).to(dtype))
    assert not any(isinstance(layer, WinogradConv2d) for layer in model.modules())
