"""Upsampling, against torch's own interpolation and the Caffe reference's bilinear deconvolution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fcn_dist.model import upsampling
from fcn_dist.model.upsampling import (
    Tile,
    add_tile_gradient,
    argmax_upsampled,
    pixels_of,
    tiles,
    upsample,
    upsample_tile,
)

STRIDES = (2, 8, 16, 32)


def coarse_scores(batch: int, outputs: int, size: tuple[int, int], stride: int, seed: int = 0) -> Tensor:
    shape = (batch, outputs, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def interpolated(coarse: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """The oracle: all of it, by torch, in float64."""
    full_size = (coarse.shape[2] * stride, coarse.shape[3] * stride)
    full = F.interpolate(coarse.double(), full_size, mode="bilinear", align_corners=False)
    return full[..., : size[0], : size[1]]


def caffe_bilinear_kernel(stride: int) -> Tensor:
    """Caffe's "bilinear" filler for a kernel of 2 * stride (even), by its formula in filler.hpp."""
    size = 2 * stride
    f = math.ceil(size / 2)
    c = (2 * f - 1 - f % 2) / (2 * f)
    line = torch.tensor([1 - abs(x / f - c) for x in range(size)], dtype=torch.float64)
    return line[:, None] * line[None, :]


cases = st.tuples(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 70), st.integers(1, 70), st.sampled_from(STRIDES)
)


@given(cases, st.integers(1, 5000))
@settings(max_examples=80)
def test_tiles_cover_every_pixel_once_with_torch_s_interpolation(case: tuple[int, ...], budget: int) -> None:
    batch, outputs, height, width, stride = case
    coarse = coarse_scores(batch, outputs, (height, width), stride)
    full = interpolated(coarse, (height, width), stride)
    covered = torch.zeros(batch, height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upsampling, "TILE_ELEMENTS_CPU", budget)
        for tile in tiles(coarse, (height, width), stride):
            rows, its_rows = pixels_of(tile.rows, height, stride)
            columns, its_columns = pixels_of(tile.columns, width, stride)
            scores = upsample_tile(coarse, tile, stride)[:, :, its_rows, its_columns]
            torch.testing.assert_close(scores.double(), full[tile.images, :, rows, columns], atol=1e-5, rtol=1e-5)
            covered[tile.images, rows, columns] += 1
    assert (covered == 1).all()


@given(cases, st.integers(1, 5000))
@settings(max_examples=40)
def test_a_tile_s_gradient_is_the_transpose_of_its_upsampling(case: tuple[int, ...], budget: int) -> None:
    batch, outputs, height, width, stride = case
    coarse = coarse_scores(batch, outputs, (height, width), stride).double().requires_grad_()
    weights = torch.randn(batch, outputs, height, width, generator=torch.Generator().manual_seed(1)).double()
    (expected,) = torch.autograd.grad((interpolated(coarse, (height, width), stride) * weights).sum(), coarse)
    found = torch.zeros_like(expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upsampling, "TILE_ELEMENTS_CPU", budget)
        for tile in tiles(coarse, (height, width), stride):
            rows, its_rows = pixels_of(tile.rows, height, stride)
            columns, its_columns = pixels_of(tile.columns, width, stride)
            gradient = torch.zeros_like(upsample_tile(coarse.detach(), tile, stride))  # nothing comes from outside
            gradient[:, :, its_rows, its_columns] = weights[tile.images, :, rows, columns]
            add_tile_gradient(found[tile.images], gradient, tile, stride)
    torch.testing.assert_close(found, expected)


@given(cases, st.integers(1, 5000))
@settings(max_examples=40)
def test_the_winning_output_is_that_of_the_full_scores(case: tuple[int, ...], budget: int) -> None:
    batch, outputs, height, width, stride = case
    coarse = coarse_scores(batch, outputs, (height, width), stride)
    full = upsample(coarse, (height, width), stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upsampling, "TILE_ELEMENTS_CPU", budget)
        labels = argmax_upsampled(coarse, (height, width), stride)
    assert labels.dtype == torch.uint8 and labels.shape == (batch, height, width)
    # Where two outputs are equal up to rounding, either may win.
    best = full.max(dim=1).values
    won = full.gather(1, labels[:, None].long())[:, 0]
    torch.testing.assert_close(won, best, atol=1e-5, rtol=0)
    clear = (full.topk(min(2, outputs), dim=1).values.diff(dim=1).abs() > 1e-4).all(dim=1)
    assert (labels[clear] == full.argmax(dim=1)[clear]).all()


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [(1, 1), (5, 90), (64, 64), (37, 53)])
def test_upsampling_gives_the_image_s_size_and_torch_s_values(stride: int, size: tuple[int, int]) -> None:
    coarse = coarse_scores(2, 3, size, stride)
    full = upsample(coarse, size, stride)
    assert full.shape == (2, 3, *size)
    torch.testing.assert_close(full.double(), interpolated(coarse, size, stride), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", STRIDES)
def test_the_interior_is_the_reference_s_frozen_deconvolution(stride: int) -> None:
    coarse = coarse_scores(1, 3, (6 * stride, 5 * stride), stride).double()
    kernel = caffe_bilinear_kernel(stride).expand(3, 1, -1, -1).contiguous()
    deconvolved = F.conv_transpose2d(coarse, kernel, stride=stride, padding=stride // 2, groups=3)
    found = upsample(coarse, (6 * stride, 5 * stride), stride)
    assert deconvolved.shape == found.shape
    inside = slice(stride // 2, -(stride // 2))
    torch.testing.assert_close(found[..., inside, inside], deconvolved[..., inside, inside], atol=1e-12, rtol=1e-12)
    # Beyond the outermost cells' centres the deconvolution fades to zero; here the cells are repeated.
    corner = coarse[:, :, 0, 0]
    torch.testing.assert_close(found[:, :, 0, 0], corner)
    assert (deconvolved[:, :, 0, 0].abs() < corner.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_are_upsampled_in_float32(dtype: torch.dtype) -> None:
    coarse = coarse_scores(1, 4, (40, 40), 8).to(dtype)
    scores = upsample_tile(coarse, Tile(slice(0, 1), slice(0, 6), slice(0, 6)), 8)[:, :, 4:44, 4:44]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), interpolated(coarse, (40, 40), 8), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("outputs", [1, 7, 255])
def test_a_tie_goes_to_the_lower_output(outputs: int) -> None:
    assert (argmax_upsampled(torch.zeros(1, outputs, 2, 2), (16, 16), 8) == 0).all()
    # Small whole numbers at weights of sixteenths: every score is exact, and many are equal.
    coarse = torch.randint(3, (2, outputs, 3, 2), generator=torch.Generator().manual_seed(0)).float()
    expected = upsample(coarse, (21, 16), 8).argmax(dim=1)
    assert torch.equal(argmax_upsampled(coarse, (21, 16), 8).long(), expected)


def test_nan_and_infinity_win_as_they_do_in_torch() -> None:
    coarse = coarse_scores(1, 6, (32, 32), 8)
    coarse[0, 4, 0, 0], coarse[0, 2, 3, 3], coarse[0, :3, 0, 3] = float("nan"), float("inf"), -float("inf")
    labels = argmax_upsampled(coarse, (32, 32), 8)
    assert torch.equal(labels.long(), upsample(coarse, (32, 32), 8).argmax(dim=1))
    assert (labels[0, :12, :12] == 4).all() and (labels[0, 20:, 20:] == 2).all()


@pytest.mark.parametrize("squares", [1, 3, 6, 7, 20, 21 * 6, 41 * 6, 3 * 21 * 6])
def test_a_tile_holds_no_more_than_its_budget_and_there_are_no_more_than_needed(
    squares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse, size = torch.zeros(3, 10, 20, 5), (160, 40)  # 21 x 6 squares an image
    monkeypatch.setattr(upsampling, "TILE_ELEMENTS_CPU", squares * 10 * 8 * 8 + 5)
    found = list(tiles(coarse, size, 8))
    assert all(upsample_tile(coarse, tile, 8).numel() <= squares * 10 * 8 * 8 for tile in found)
    columns = -(-6 // min(6, squares))
    strips = -(-21 // min(21, max(1, squares // 6)))
    groups = -(-3 // max(1, squares // (21 * 6)))
    assert len(found) == columns * strips * groups


def test_squares_wholly_outside_the_image_are_left_out() -> None:
    # 19 = 4 + 8 + 7 pixels are three squares, 20 are three as well, 21 begin a fourth.
    for length, squares in ((1, 1), (4, 1), (5, 2), (19, 3), (20, 3), (21, 4)):
        (tile,) = tiles(torch.zeros(1, 1, math.ceil(length / 8), 1), (length, 1), 8)
        assert tile.rows == slice(0, squares)
