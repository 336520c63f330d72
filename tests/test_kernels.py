"""Triton's kernels, against torch at full resolution in float64: in Triton's interpreter, and compiled on a GPU."""

from collections.abc import Iterator
from itertools import product
from random import Random

import pytest
import torch
from interpreted import Run, kernels_on
from loss_oracle import oracle, problem
from torch import Tensor
from torch.nn import functional as F

from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.model import loss as loss_module
from fcn_dist.model import upsampling
from fcn_dist.model.devices import KERNEL_DTYPES, uses_kernels
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.model.upsampling import argmax_upsampled, upsample

kernels = pytest.importorskip("fcn_dist.model.kernels", reason="needs Triton", exc_type=ImportError)

# Batch, outputs, pixels, stride, share of ignored pixels. The sizes end before, at and beyond a cell's centre.
CASES = [
    (1, 1, (1, 1), 8, 0.0),
    (1, 2, (8, 8), 8, 0.0),
    (2, 7, (9, 20), 8, 0.3),
    (3, 3, (13, 4), 8, 0.3),
    (2, 5, (30, 25), 8, 0.95),
    (1, 21, (7, 39), 8, 1.1),
    (1, 150, (12, 13), 8, 0.3),
    (2, 151, (5, 18), 8, 0.0),
    (1, 255, (9, 6), 8, 0.3),
    (2, 3, (17, 41), 16, 0.3),
    (1, 40, (20, 30), 16, 0.0),
    (1, 2, (70, 33), 32, 0.3),
    (1, 151, (10, 20), 32, 0.9),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    with kernels_on(request.param) as found:
        yield found


def computed(run: Run, coarse: Tensor, targets: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    loss, gradient = run("loss_and_gradient", coarse, targets, stride, torch.float32)
    assert loss.dtype == gradient.dtype == torch.float32 and loss.shape == () and gradient.shape == coarse.shape
    return loss, gradient


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_are_torch_s_of_full_scores(
    run: Run, case: tuple[int, int, tuple[int, int], int, float]
) -> None:
    coarse, targets = problem(*case)
    loss, gradient = computed(run, coarse, targets, case[3])
    expected, expected_gradient = oracle(coarse, targets, case[3])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(15))
def test_random_sizes_outputs_strides_and_layouts_agree_too(run: Run, seed: int) -> None:
    random = Random(seed)
    size, stride = (random.randint(1, 49), random.randint(1, 49)), random.choice((8, 16, 32))
    batch, outputs, ignored = random.randint(1, 3), random.choice((1, 2, 7, 150, 151)), random.choice((0.0, 0.3, 0.95))
    coarse, targets = problem(batch, outputs, size, stride, ignored, seed)
    layout = LAYOUTS[random.choice(list(LAYOUTS))]
    coarse = coarse.to(random.choice(KERNEL_DTYPES)).contiguous(memory_format=layout)
    loss, gradient = computed(run, coarse, targets, stride)
    expected, expected_gradient = oracle(coarse, targets, stride)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-3)
    assert_wins(run("argmax", coarse, size, stride), coarse, stride)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_scores_of_every_dtype_and_layout_are_read_exactly(run: Run, dtype: torch.dtype) -> None:
    coarse, targets = problem(2, 7, (19, 12), 8, 0.3)
    coarse = coarse.to(dtype)
    expected, expected_gradient = oracle(coarse, targets, 8)
    results = [computed(run, coarse.contiguous(memory_format=layout), targets, 8) for layout in LAYOUTS.values()]
    for loss, gradient in results:
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0][1], results[1][1])


def test_a_batch_without_a_labelled_pixel_has_loss_and_gradient_zero(run: Run) -> None:
    coarse, targets = problem(2, 5, (20, 12), 8, ignored=1.1)
    assert (targets == IGNORE_LABEL).all()
    loss, gradient = computed(run, coarse, targets, 8)
    assert loss == 0
    assert (gradient == 0).all()


def test_an_ignored_image_takes_no_part(run: Run) -> None:
    coarse, targets = problem(2, 5, (12, 20), 8, ignored=0.0)
    targets[0] = IGNORE_LABEL
    loss, gradient = computed(run, coarse, targets, 8)
    alone, gradient_alone = computed(run, coarse[1:], targets[1:], 8)
    torch.testing.assert_close(loss, alone)
    assert torch.equal(gradient[1:], gradient_alone)
    assert (gradient[0] == 0).all()


def test_scores_in_the_ten_thousands_stay_finite_and_right(run: Run) -> None:
    coarse, targets = problem(1, 9, (12, 20), 8, 0.1, spread=1e4)
    loss, gradient = computed(run, coarse, targets, 8)
    expected, expected_gradient = oracle(coarse, targets, 8)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)
    # A score of 1e4 is rounded to about 1e-3 in float32, and so the softmax where two are that close.
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=1e-1)


def test_the_same_scores_give_the_same_bits(run: Run) -> None:
    coarse, targets = problem(2, 21, (30, 20), 8, 0.3)
    loss, gradient = computed(run, coarse, targets, 8)
    again, gradient_again = computed(run, coarse, targets, 8)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradient_again)


def test_the_gradient_agrees_with_finite_differences(run: Run) -> None:
    coarse, targets = problem(1, 3, (9, 12), 8, 0.3)
    _, gradient = computed(run, coarse, targets, 8)
    step = 2.0**-5  # the loss is rounded to some 1e-5 and so the slope to 1e-3; its third derivative adds as much
    for position in product(range(3), range(2), range(2)):
        moved = torch.zeros_like(coarse)
        moved[0][position] = step
        above, below = (
            run("loss_and_gradient", coarse + sign * moved, targets, 8, None)[0].double() for sign in (1, -1)
        )
        slope = (above - below) / (2 * step)
        torch.testing.assert_close(gradient[0][position].double(), slope, rtol=0, atol=5e-3)


def test_without_a_gradient_to_compute_the_loss_is_the_same(run: Run) -> None:
    coarse, targets = problem(1, 4, (11, 19), 8, 0.3)
    loss, nothing = run("loss_and_gradient", coarse, targets, 8, None)
    assert nothing is None
    assert torch.equal(loss, computed(run, coarse, targets, 8)[0])


def test_the_gradient_comes_in_the_dtype_asked_for(run: Run) -> None:
    coarse, targets = problem(1, 4, (11, 19), 8, 0.3)
    _, expected = oracle(coarse, targets, 8)
    _, gradient = run("loss_and_gradient", coarse, targets, 8, torch.bfloat16)
    assert gradient.dtype == torch.bfloat16
    # Up to four launches add to a cell, and each rounds what it leaves.
    torch.testing.assert_close(gradient.double(), expected, rtol=4 * 2**-8, atol=2**-8)


@pytest.mark.parametrize("target", [3, 4, 200, 254])
def test_a_target_that_is_no_output_is_not_learned_silently(run: Run, target: int) -> None:
    coarse, targets = problem(1, 3, (9, 9), 8, 0.3)
    targets[0, 5, 5] = target
    assert computed(run, coarse, targets, 8)[0] == float("inf")


def assert_wins(labels: Tensor, coarse: Tensor, stride: int) -> None:
    """The score at `labels` is the highest, up to rounding; and where it is clearly so, they are torch's labels."""
    assert labels.dtype == torch.uint8
    full = upsample(coarse.double(), (labels.shape[1], labels.shape[2]), stride)
    best, expected = full.max(dim=1)
    torch.testing.assert_close(full.gather(1, labels[:, None].long())[:, 0], best, atol=1e-5, rtol=0)
    clear = (full > best[:, None] - 1e-4).sum(dim=1) == 1
    assert torch.equal(labels[clear].long(), expected[clear])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_winning_output_is_that_of_the_full_scores(
    run: Run, case: tuple[int, int, tuple[int, int], int, float]
) -> None:
    coarse, _ = problem(*case)
    labels = run("argmax", coarse, case[2], case[3])
    assert labels.shape == (case[0], *case[2])
    assert_wins(labels, coarse, case[3])


@pytest.mark.parametrize(("outputs", "highest"), [(7, 3), (151, 40), (5, 1)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_tie_goes_to_the_lower_output(run: Run, outputs: int, highest: int, dtype: torch.dtype) -> None:
    # Small whole numbers at weights of sixteenths: every score is exact, and many are equal.
    random = torch.Generator().manual_seed(outputs)
    coarse = torch.randint(highest, (2, outputs, 3, 2), generator=random).to(dtype)
    full = upsample(coarse.double(), (21, 16), 8)
    if highest < outputs:
        assert ((full == full.amax(dim=1, keepdim=True)).sum(dim=1) > 1).any()
    labels = run("argmax", coarse.contiguous(memory_format=torch.channels_last), (21, 16), 8)
    assert torch.equal(labels.long(), full.argmax(dim=1))


def test_nan_and_infinity_win_as_they_do_in_torch_near_their_cell_alone(run: Run) -> None:
    coarse, _ = problem(1, 6, (32, 32), 8, 0.0)
    coarse[0, 4, 0, 0], coarse[0, 2, 3, 3], coarse[0, :3, 0, 3] = float("nan"), float("inf"), -float("inf")
    labels = run("argmax", coarse, (32, 32), 8)
    full = F.interpolate(coarse, scale_factor=8, mode="bilinear", align_corners=False)
    assert torch.equal(labels.long(), full.argmax(dim=1))
    assert (labels[0, :12, :12] == 4).all() and (labels[0, 20:, 20:] == 2).all()


@pytest.fixture
def everything_to_kernels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions take the kernels' way with scores on a CPU, too."""
    monkeypatch.setattr(loss_module, "uses_kernels", lambda scores: True)
    monkeypatch.setattr(upsampling, "uses_kernels", lambda scores: True)
    for function in ("loss_and_gradient", "argmax"):
        monkeypatch.setattr(kernels, function, lambda *arguments, name=function: run(name, *arguments))


@pytest.mark.usefixtures("everything_to_kernels")
@pytest.mark.parametrize("run", ["interpreter"], indirect=True)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_public_functions_hand_on_what_kernels_compute(run: Run, dtype: torch.dtype) -> None:
    coarse, targets = problem(2, 4, (11, 19), 8, 0.3)
    scores = coarse.to(dtype).requires_grad_()
    loss = summed_cross_entropy(scores, targets, 8)
    torch.autograd.backward(loss * 0.25)
    expected, expected_gradient = oracle(scores, targets, 8)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-3)
    assert scores.grad is not None and scores.grad.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-4)
    torch.testing.assert_close(scores.grad.double(), expected_gradient * 0.25, rtol=tolerance, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(summed_cross_entropy(scores, targets, 8), loss.detach())
    assert_wins(argmax_upsampled(scores.detach(), (11, 19), 8), scores.detach(), 8)


def test_scores_on_a_cpu_and_in_float64_take_the_portable_way() -> None:
    assert not any(uses_kernels(torch.zeros(1, 2, 1, 1, dtype=dtype)) for dtype in KERNEL_DTYPES)
    assert torch.float64 not in KERNEL_DTYPES


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
def test_on_a_gpu_the_public_functions_agree_with_the_oracle(dtype: torch.dtype) -> None:
    coarse, targets = problem(2, 151, (100, 75), 8, 0.3)
    scores = coarse.to("cuda", dtype).requires_grad_()
    assert uses_kernels(scores) == (dtype != torch.float64)
    loss = summed_cross_entropy(scores, targets.cuda(), 8)
    torch.autograd.backward(loss)
    expected, expected_gradient = oracle(scores.cpu(), targets, 8)
    torch.testing.assert_close(loss.detach().cpu().double(), expected, rtol=1e-5, atol=1e-3)
    assert scores.grad is not None and scores.grad.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-4)
    torch.testing.assert_close(scores.grad.cpu().double(), expected_gradient, rtol=tolerance, atol=1e-3)
    assert_wins(argmax_upsampled(scores.detach(), (100, 75), 8).cpu(), scores.detach().cpu(), 8)
