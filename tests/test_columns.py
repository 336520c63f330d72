"""A convolution by columns against torch's in float64: values, gradients, and how weights may lie."""

import copy
from itertools import product

import pytest
import torch
from planning_rank import most_held
from torch import Tensor, nn

from fcn_dist.model import columns
from fcn_dist.model.columns import ColumnConv2d

LAYOUTS = {"as they come": torch.contiguous_format, "channels last": torch.channels_last}
CASES = list(product(((7, 3), (7, 0), (1, 0), (3, 1)), LAYOUTS))


def layer_of(size: int, padding: int, layout: str) -> ColumnConv2d:
    torch.manual_seed(size + padding)
    layer = ColumnConv2d(6, 9, size, padding=padding)
    layer.weight.data = layer.weight.data.to(memory_format=LAYOUTS[layout])
    return layer


def through(layer: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """Values, and the gradients of a fixed function of them by weights, biases and cells."""
    x = x.clone().requires_grad_()
    values = layer(x)
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values.dtype)
    assert layer.bias is not None
    return [values, *torch.autograd.grad((values * factors).sum(), [layer.weight, layer.bias, x])]


def plain(layer: ColumnConv2d) -> nn.Conv2d:
    """Torch's convolution of the same weights, in float64."""
    outputs, channels, size, _ = layer.weight.shape
    other = nn.Conv2d(channels, outputs, size, padding=int(layer.padding[0]), dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    return other


@pytest.mark.parametrize(("shape", "layout"), CASES)
@pytest.mark.parametrize("at_once", [1, 40, 1024])
def test_values_and_gradients_are_torchs(
    shape: tuple[int, int], layout: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "CELLS_AT_ONCE", at_once)
    layer = layer_of(*shape, layout)
    for images, height, width in ((1, 7, 7), (3, 8, 11), (2, 17, 9)):
        torch.manual_seed(height)
        x = torch.randn(images, 6, height, width).to(memory_format=torch.channels_last)
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
        for found, wanted in zip(through(layer, x), through(plain(layer), x.double()), strict=True):
            assert found.dtype == torch.float32 and found.shape == wanted.shape
            assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_some_outputs_at_a_time_with_weights_made_for_each_are_the_same(
    shape: tuple[int, int], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "CELLS_AT_ONCE", 40)
    layer, asked = layer_of(*shape, layout), []

    def halved(weights: Tensor) -> Tensor:
        asked.append(len(weights))
        return weights / 2

    x = torch.randn(2, 6, 11, 8)
    with torch.inference_mode():
        assert layer.bias is not None
        found = columns.convolve_in_parts(x, layer.weight, layer.bias, int(layer.padding[0]), halved, 4)
        wanted = plain(layer)(x.double()) / 2
    assert set(asked) == {4, 1}  # of nine
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_lies_as_its_weights_do(layout: str) -> None:
    """So that it is not copied."""
    layer = layer_of(7, 3, layout)
    layer(torch.randn(2, 6, 8, 8)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_by_finite_differences(layout: str) -> None:
    layer = layer_of(3, 1, layout).double()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_what_needs_no_gradient_gets_none() -> None:
    layer = layer_of(7, 3, "as they come").requires_grad_(False)
    x = torch.randn(1, 6, 8, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias is not None and layer.bias.grad is None and x.grad is not None
    layer.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None


def test_weights_are_read_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of all of them, which for fc6 is 0.4 GB: what is multiplied is a view."""
    seen: list[Tensor] = []
    addmm = torch.addmm

    def watched(bias: Tensor, cells: Tensor, matrix: Tensor) -> Tensor:
        seen.append(matrix)
        return addmm(bias, cells, matrix)

    monkeypatch.setattr(torch, "addmm", watched)
    for layout in LAYOUTS:
        layer = layer_of(7, 3, layout)
        layer(torch.randn(1, 6, 8, 8))
        assert seen.pop().data_ptr() == layer.weight.data_ptr()


def test_columns_of_so_many_cells_are_held_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in backward, on which the memory plan counts; what else is held is the same for any number of cells."""
    layer = layer_of(7, 3, "as they come")
    x = torch.randn(8, 6, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    held = {}
    for cells in (64, 512):
        monkeypatch.setattr(columns, "CELLS_AT_ONCE", cells)
        with most_held(torch.device("cpu")) as peak:
            layer(x).sum().backward()
        held[cells] = peak.most
    assert 1.9 < (held[512] - held[64]) / ((512 - 64) * 6 * 49 * 4) <= 2


def test_a_network_under_autocast_and_in_bfloat16_multiplies_as_torch_does() -> None:
    layer = layer_of(7, 3, "as they come")
    x = torch.randn(1, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    half = copy.deepcopy(layer).bfloat16()
    assert torch.equal(half(x.bfloat16()), nn.functional.conv2d(x.bfloat16(), half.weight, half.bias, padding=3))
