"""ReLU and keyed dropout: a mask belongs to a sample and a layer, and to nothing else."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fcn_dist.config import ModelConfig
from fcn_dist.model.dropout import drawn_keys, relu_dropout
from fcn_dist.model.fcn import FCN


def ones(batch: int) -> Tensor:
    return torch.ones(batch, 16, 9, 7)


def test_a_key_s_mask_is_the_same_at_any_place_of_any_batch() -> None:
    alone = relu_dropout(ones(1), 0.5, [42], 6)[0]
    assert torch.equal(relu_dropout(ones(3), 0.5, [7, 42, 9], 6)[1], alone)
    torch.rand(5)  # whatever else was drawn
    assert torch.equal(relu_dropout(ones(2), 0.5, [42, 1], 6)[0], alone)


def test_masks_differ_between_keys_and_between_layers() -> None:
    masks = [relu_dropout(ones(1), 0.5, [key], layer) for key in (0, 1, 2**63, 2**64 - 1) for layer in (6, 7)]
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            # Two independent masks agree at half of the places.
            assert 0.4 < (mask == other).float().mean() < 0.6


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("keys", [list(range(20)), drawn_keys(20)])
def test_the_share_kept_is_right_and_so_is_the_mean(probability: float, keys: list[int]) -> None:
    dropped = relu_dropout(torch.ones(20, 64, 8, 8), probability, keys, 6)
    kept = dropped != 0
    assert abs(kept.float().mean() - (1 - probability)) < 0.01
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - probability)))
    assert abs(dropped.mean() - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_torch_s_relu_times_the_mask(dtype: torch.dtype) -> None:
    kept = relu_dropout(ones(3), 0.25, [1, 2, 3], 6) > 0
    x = (torch.randn(3, 16, 9, 7) - 0.2).to(dtype)
    x[:, ::5] = 0
    passed = torch.randn(3, 16, 9, 7).to(dtype)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = relu_dropout(found * 1, 0.25, [1, 2, 3], 6), F.relu(wanted) * kept * (1 / 0.75)
    assert torch.equal(y, z)
    torch.autograd.backward([y, z], [passed, passed])
    assert found.grad is not None and wanted.grad is not None
    assert torch.equal(found.grad, wanted.grad)


def test_what_is_not_a_number_stays_so_and_reaches_the_gradient() -> None:
    x = ones(1)
    x[0, 0] = torch.nan
    x.requires_grad_()
    y = relu_dropout(x * 1, 0.5, [1], 6)
    assert y[0, 0].isnan().any() and not y[0, 1:].isnan().any()
    torch.autograd.backward(y, torch.full_like(y, torch.nan))
    assert x.grad is not None and torch.equal(x.grad.isnan(), y != 0)


def test_drawn_keys_come_from_torch_s_own_generator() -> None:
    torch.manual_seed(3)
    one, other = drawn_keys(4), drawn_keys(4)
    assert len({*one, *other}) == 8
    torch.manual_seed(3)
    assert drawn_keys(4) == one


def test_keys_leave_torch_s_own_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    relu_dropout(ones(2), 0.5, [1, 2], 6)
    assert torch.equal(torch.rand(4), expected)


def test_probability_zero_is_a_relu() -> None:
    x = torch.randn(2, 16, 9, 7)
    assert torch.equal(relu_dropout(x.clone(), 0.0, [], 6), F.relu(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_low_precision(dtype: torch.dtype) -> None:
    assert relu_dropout(ones(1).to(dtype), 0.5, [1], 6).dtype == dtype


def test_a_key_for_each_image_is_needed() -> None:
    with pytest.raises(AssertionError):
        relu_dropout(ones(2), 0.5, [1], 6)


def network() -> tuple[FCN, Tensor]:
    torch.manual_seed(0)
    model = FCN(3, ModelConfig(variant="fcn32s", width=0.05, head_width=64))
    torch.nn.init.normal_(model.score_fr.weight)
    return model, torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)


def test_a_network_in_training_scores_an_image_by_its_key_alone() -> None:
    model, images = network()
    model.train()
    together = model(images, dropout_keys=[5, 6, 7])
    torch.testing.assert_close(model(images[1:2], dropout_keys=[6])[0], together[1])
    assert not torch.allclose(model(images[1:2], dropout_keys=[8])[0], together[1])


def test_both_layers_of_the_head_drop() -> None:
    model, _ = network()
    model.train()
    with torch.no_grad():
        for layer in (model.fc6, model.fc7):
            layer.weight.zero_()
            assert layer.bias is not None
            layer.bias.fill_(1.0)
    x = torch.ones(1, 64, 5, 5)[:, : model.fc6.in_channels]
    after = model.head(x, [1])
    # fc7 sees ones whatever fc6 dropped; its own output is dropped to zero or doubled.
    assert set(after.flatten().tolist()) == {0.0, 2.0}
    with torch.no_grad():
        model.fc7.weight[:, :, 0, 0] = torch.eye(64)
        model.fc7.bias.zero_()  # type: ignore[union-attr]
    # fc7 passes on what it gets: kept by both layers with probability 1/4, at 1 * 2 * 2.
    after = model.head(x, [1])
    assert set(after.flatten().tolist()) == {0.0, 4.0}
    assert 0.2 < (after > 0).float().mean() < 0.3


def test_a_network_in_evaluation_drops_nothing() -> None:
    model, images = network()
    model.eval()
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(model(images, dropout_keys=[1, 2, 3]), expected)
        assert torch.equal(model(images), expected)
