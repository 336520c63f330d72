"""The tiled loss, against torch's cross-entropy of fully upsampled scores in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracle import oracle, problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.model import upsampling
from fcn_dist.model.loss import summed_cross_entropy


def computed(coarse: Tensor, targets: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    scores = coarse.detach().requires_grad_()
    loss = summed_cross_entropy(scores, targets, stride)
    (gradient,) = torch.autograd.grad(loss, scores)
    return loss.detach(), gradient


problems = st.builds(
    problem,
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 7, 150, 151]),
    st.tuples(st.integers(1, 45), st.integers(1, 45)),
    st.just(8),
    st.sampled_from([0.0, 0.3, 0.95, 1.1]),
    st.integers(0, 1000),
)


@given(problems, st.sampled_from([1, 1000, 50_000, 1 << 20]))
@settings(max_examples=40)
def test_loss_and_gradient_are_torch_s_of_full_scores(case: tuple[Tensor, Tensor], budget: int) -> None:
    coarse, targets = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upsampling, "TILE_ELEMENTS_CPU", budget)
        loss, gradient = computed(coarse, targets, 8)
        loss64, gradient64 = computed(coarse.double(), targets, 8)
    expected, expected_gradient = oracle(coarse, targets, 8)
    torch.testing.assert_close(loss64, expected)
    torch.testing.assert_close(gradient64, expected_gradient)
    assert loss.dtype == gradient.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 31), (64, 96), (3, 100)])
def test_every_stride_and_size_is_scored_to_the_last_pixel(stride: int, size: tuple[int, int]) -> None:
    coarse, targets = problem(2, 6, size, stride, 0.2)
    loss, gradient = computed(coarse.double(), targets, stride)
    expected, expected_gradient = oracle(coarse, targets, stride)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_batch_without_a_labelled_pixel_has_loss_and_gradient_zero() -> None:
    coarse, targets = problem(2, 5, (20, 20), 8, ignored=1.1)
    assert (targets == IGNORE_LABEL).all()
    loss, gradient = computed(coarse, targets, 8)
    assert loss == 0
    assert (gradient == 0).all()


def test_an_ignored_image_takes_no_part() -> None:
    coarse, targets = problem(2, 5, (20, 20), 8, ignored=0.0)
    targets[1] = IGNORE_LABEL
    loss, gradient = computed(coarse, targets, 8)
    alone, gradient_alone = computed(coarse[:1], targets[:1], 8)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(gradient[:1], gradient_alone)
    assert (gradient[1] == 0).all()


def test_scores_in_the_ten_thousands_stay_finite_and_right() -> None:
    coarse, targets = problem(1, 9, (24, 24), 8, 0.1, spread=1e4)
    loss, gradient = computed(coarse, targets, 8)
    expected, expected_gradient = oracle(coarse, targets, 8)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)
    # A score of 1e4 is rounded to about 1e-3 in float32, and so the softmax where two are that close.
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_low_precision_scores_lose_only_their_own_rounding(dtype: torch.dtype, tolerance: float) -> None:
    coarse, targets = problem(2, 20, (40, 50), 8, 0.1)
    coarse = coarse.to(dtype)
    loss, gradient = computed(coarse, targets, 8)
    expected, expected_gradient = oracle(coarse, targets, 8)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=1e-3)


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_a_bfloat16_gradient_is_rounded_once_however_many_tiles_add_to_it(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upsampling, "TILE_ELEMENTS_CPU", budget)
    coarse, targets = problem(2, 20, (40, 50), 8, 0.1)
    coarse = coarse.bfloat16()
    _, gradient = computed(coarse, targets, 8)
    _, expected = oracle(coarse, targets, 8)
    # bfloat16 has 8 bits: half a unit of the last is up to 2**-8 of the value's power of two.
    error, allowed = (gradient.double() - expected).abs(), 2.0**-9 * 2 ** expected.abs().log2().ceil()
    assert (error <= allowed * 1.01 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_gradient_waits_in_no_more_than_it_needs(dtype: torch.dtype) -> None:
    coarse, targets = problem(1, 4, (11, 19), 8, 0.3)
    loss = summed_cross_entropy(coarse.to(dtype).requires_grad_(), targets, 8)
    assert loss.grad_fn is not None
    (saved,) = loss.grad_fn.saved_tensors  # type: ignore[attr-defined]
    waits_in = {torch.float16: torch.float32}
    assert saved.dtype == waits_in.get(dtype, dtype)


def test_a_bfloat16_gradient_is_multiplied_in_float32() -> None:
    coarse, targets = problem(1, 4, (11, 19), 8, 0.3)
    scores = coarse.bfloat16().requires_grad_()
    factor = 1 + 2.0**-9  # 1 in bfloat16
    _, once = computed(scores, targets, 8)
    torch.autograd.backward(summed_cross_entropy(scores, targets, 8) * (3 * factor))
    assert scores.grad is not None
    assert torch.equal(scores.grad, (once.float() * (3 * factor)).bfloat16())
    assert not torch.equal(scores.grad, (once.float() * 3).bfloat16())  # the factor's last bits are seen


def test_a_loss_scale_saves_gradients_that_half_precision_would_lose() -> None:
    # 64 pixels, each sure of output 0 by 23: output 1 has gradient 64 * exp(-23), 7e-9, which is 0 in float16.
    scores = torch.tensor([20.0, -3.0]).half().reshape(1, 2, 1, 1).requires_grad_()
    targets = torch.zeros(1, 8, 8, dtype=torch.uint8)
    torch.autograd.backward(summed_cross_entropy(scores, targets, 8) * 2.0**16)
    assert scores.grad is not None
    assert float(scores.grad[0, 1, 0, 0]) / 2.0**16 == pytest.approx(64 * math.exp(-23), rel=1e-2)


def test_the_gradient_agrees_with_finite_differences() -> None:
    coarse, targets = problem(2, 4, (11, 19), 8, 0.3)
    scores = coarse.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: summed_cross_entropy(x, targets, 8), (scores,))


def test_the_gradient_scales_with_what_the_loss_is_multiplied_by() -> None:
    coarse, targets = problem(1, 4, (11, 19), 8, 0.3)
    scores = coarse.double().requires_grad_()
    torch.autograd.backward(summed_cross_entropy(scores, targets, 8) * 0.25)
    _, expected = oracle(coarse, targets, 8)
    torch.testing.assert_close(scores.grad, expected * 0.25)


def test_without_a_gradient_to_compute_the_loss_is_the_same() -> None:
    coarse, targets = problem(1, 4, (11, 19), 8, 0.3)
    expected, _ = oracle(coarse, targets, 8)
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(coarse.double(), targets, 8), expected)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the size of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_full_resolution_scores_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, side = 20, 320
    one_cell_row = outputs * 8 * side
    monkeypatch.setattr(upsampling, "TILE_ELEMENTS_CPU", one_cell_row)
    coarse, targets = problem(1, outputs, (side, side), 8, 0.1)
    scores = coarse.requires_grad_()
    with LargestTensor() as largest:
        torch.autograd.backward(summed_cross_entropy(scores, targets, 8))
    assert largest.elements <= one_cell_row
    assert largest.elements < outputs * side * side // 10
    with LargestTensor() as full:
        upsampling.upsample(coarse, (side, side), 8)
    assert full.elements >= outputs * side * side  # what is measured would be seen
