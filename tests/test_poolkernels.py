"""Triton's ReLU and pooling against torch's, bit for bit: in Triton's interpreter, and compiled on a GPU."""

from collections.abc import Iterator

import pytest
import torch
from interpreted import Run, kernels_on
from test_relupool import maps

from fcn_dist.model import relupool

pytest.importorskip("triton", reason="needs Triton", exc_type=ImportError)

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 4), (1, 4, 5, 7), (3, 5, 2, 9), (2, 64, 6, 1), (1, 130, 7, 8)]


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    with kernels_on(request.param) as found:
        yield found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties", "odd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_codes_and_gradients_are_those_of_torch(
    run: Run, shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype
) -> None:
    x = maps(shape, kind, dtype).to(memory_format=torch.channels_last)
    pooled, codes = run("poolkernels.pool", x)
    wanted, wanted_codes = relupool.pool_with_codes(x)
    torch.testing.assert_close(pooled, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, wanted_codes)
    assert pooled.is_contiguous(memory_format=torch.channels_last)

    passed = maps(tuple(pooled.shape), kind, dtype, seed=1)
    gradient = run("poolkernels.pool_backward", passed, pooled, codes, shape[2:])
    wanted = relupool.pool_backward(passed, wanted, wanted_codes, shape[2:])
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0, equal_nan=True)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_the_layer_uses_them_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = maps((2, 64, 31, 40), "ties", torch.bfloat16).cuda().to(memory_format=torch.channels_last).requires_grad_()
    found = relupool.relu_pool(x)
    (gradient,) = torch.autograd.grad(found.float().square().sum(), x)
    monkeypatch.setattr(relupool, "uses_kernels", lambda tensor: False)
    wanted = relupool.relu_pool(x)
    (wanted_gradient,) = torch.autograd.grad(wanted.float().square().sum(), x)
    assert torch.equal(found, wanted) and torch.equal(gradient, wanted_gradient)
