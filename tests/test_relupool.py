"""ReLU and pooling in one: torch's pair as the oracle, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fcn_dist.model import relupool
from fcn_dist.model.relupool import ReLUAveragePool, pool_with_codes, relu_pool

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def maps(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`ties` are whole numbers from -2 to 2, so that most windows have some; `odd` ones NaN and infinities."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) * 2
    if kind == "ties":
        x = x.round().clamp(-2, 2)
    if kind == "odd":
        choice = torch.randint(0, 12, shape, generator=random)
        for number, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
            x[choice == number] = value
    return x.to(dtype)


def assert_as_torch(x: Tensor, seed: int = 1) -> None:
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = relu_pool(found), F.max_pool2d(F.relu(wanted), 2, ceil_mode=True)
    torch.testing.assert_close(y, z, rtol=0, atol=0, equal_nan=True)
    passed = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    torch.autograd.backward([y, z], [passed, passed])
    assert found.grad is not None and wanted.grad is not None
    assert torch.equal(found.grad, wanted.grad)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["plain", "ties", "odd"]),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 100, 1 << 20]),
    st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_values_and_gradients_are_those_of_torch_s_pair(
    shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype, group: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relupool, "GROUP_ELEMENTS", group)
        assert_as_torch(maps(shape, kind, dtype, seed), seed + 1)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["plain", "ties"])
def test_so_they_are_in_either_memory_format_and_the_result_is_channels_last(
    kind: str, memory: torch.memory_format
) -> None:
    x = maps((4, 64, 32, 48), kind, torch.bfloat16).to(memory_format=memory)
    assert_as_torch(x)
    assert relu_pool(x.requires_grad_()).is_contiguous(memory_format=torch.channels_last)


def test_gradients_that_are_not_finite_go_where_torch_s_go_and_nowhere_else() -> None:
    x = maps((1, 4, 6, 6), "plain", torch.float32)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = relu_pool(found), F.max_pool2d(F.relu(wanted), 2, ceil_mode=True)
    passed = torch.full_like(y, torch.inf)
    passed[..., 1] = torch.nan
    torch.autograd.backward([y, z], [passed, passed])
    assert found.grad is not None and wanted.grad is not None
    torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=0, equal_nan=True)


def test_backward_holds_the_result_and_two_bits_a_value() -> None:
    x = maps((2, 64, 32, 32), "plain", torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        pooled = relu_pool(x)
    assert [(t.dtype, t.numel()) for t in held] == [
        (torch.bfloat16, pooled.numel()),
        (torch.uint8, pooled.numel() // 4),
    ]
    assert held[0].untyped_storage().data_ptr() == pooled.untyped_storage().data_ptr()


def test_the_codes_are_the_corners() -> None:
    """Four channels, each with its largest value in another corner: 0, 1, 2 and 3 from the lowest bits up."""
    x = torch.zeros(1, 4, 2, 2)
    for channel in range(4):
        x[0, channel, channel // 2, channel % 2] = 1
    pooled, codes = pool_with_codes(x)
    assert pooled.flatten().tolist() == [1, 1, 1, 1] and codes.flatten().tolist() == [0b11_10_01_00]


def test_without_a_gradient_nothing_is_held() -> None:
    x = maps((1, 3, 5, 5), "ties", torch.float32)
    assert relu_pool(x).grad_fn is None
    with torch.no_grad():
        assert relu_pool(x.requires_grad_()).grad_fn is None
    assert torch.equal(relu_pool(x.detach()), relu_pool(x).detach())


def test_windows_at_the_border_average_the_cells_there_are() -> None:
    x = torch.tensor([[1.0, 3, -5], [5, 7, 2], [2, -4, 9]])[None, None]
    assert ReLUAveragePool()(x).tolist() == [[[[4, 1], [1, 9]]]]
