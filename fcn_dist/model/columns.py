"""A convolution with far more weights than cells, as matrix products: what fc6 and fc7 are on a CPU.

Torch lays such weights out anew in every pass, 0.4 GB of fc6's, since each update changes them. Here they are read as
they lie; what is laid out is the cells a weight meets, the columns, which are few, and are laid out again in backward.

Shapes: B images, C channels in, O out, H x W cells padded, h x w out, K x K weights; D = C * K * K.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CELLS_AT_ONCE = 512  # or a row of all images: whose columns are held, twice in backward; 0.1 GB for fc6 in float32


def takes_columns(device_type: str, precision: torch.dtype) -> bool:
    """Whether that is faster there."""
    return device_type == "cpu" and precision in (torch.float32, torch.float64)


def convolve_in_parts(
    x_BCHW: Tensor, weight_OCKK: Tensor, bias_O: Tensor, padding: int, prepare: Callable[[Tensor], Tensor], at_once: int
) -> Tensor:
    """By columns and without a gradient, `at_once` of O at a time, whose weights and biases `prepare` makes."""
    images, _, height, width = x_BCHW.shape
    beyond = 2 * padding - weight_OCKK.shape[2] + 1
    shape = (images, len(weight_OCKK), height + beyond, width + beyond)
    # No view of another tensor: what comes next may change it in place.
    out_BOhw = torch.empty(shape, dtype=x_BCHW.dtype, memory_format=torch.channels_last)
    out_BhwO = out_BOhw.permute(0, 2, 3, 1)
    for rows, columns in _columns(x_BCHW, weight_OCKK, padding):
        for first in range(0, len(weight_OCKK), at_once):
            part = slice(first, first + at_once)
            cells = torch.addmm(prepare(bias_O[part]), columns, _matrix(prepare(weight_OCKK[part])).T)
            out_BhwO[:, rows, :, part] = cells.view(out_BhwO[:, rows, :, part].shape)
    return out_BOhw


class ColumnConv2d(nn.Conv2d):
    """A convolution of stride 1: torch's own, but on a CPU in float32 and float64 by columns.

    In 16 bits torch's own stays: without instructions for them, matrix products took up to twice its time.
    """

    by_columns = True  # where columns are taken at all

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, O, h, w), channels last."""
        kind = x_BCHW.device.type
        if not self.by_columns or not takes_columns(kind, x_BCHW.dtype) or torch.is_autocast_enabled(kind):
            return super().forward(x_BCHW)
        result: Tensor = _ByColumns.apply(x_BCHW, self.weight, self.bias, int(self.padding[0]))  # type: ignore[no-untyped-call]
        return result


class _ByColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight_OCKK: Tensor, bias_O: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight_OCKK)
        ctx.padding = padding
        return convolve_in_parts(x_BCHW, weight_OCKK, bias_O, padding, _as_they_are, len(weight_OCKK))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BOhw: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_OCKK = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        gradient_BhwO = gradient_BOhw.permute(0, 2, 3, 1)
        matrix_OD = _matrix(weight_OCKK)
        of_x = torch.zeros_like(_padded(x_BCHW, ctx.padding)) if needs_x else None
        of_matrix: Tensor | None = None
        for rows, columns in _columns(x_BCHW, weight_OCKK, ctx.padding):
            passed = gradient_BhwO[:, rows].reshape(-1, len(weight_OCKK))
            if needs_weight:
                of_matrix = passed.T @ columns if of_matrix is None else of_matrix.addmm_(passed.T, columns)
            del columns  # before the cells' gradients take as much, and once more in their own order
            if of_x is not None:
                strip_BnWC = of_x[:, rows.start : rows.stop + weight_OCKK.shape[2] - 1]
                _add_columns(passed @ matrix_OD, strip_BnWC, weight_OCKK)
        of_bias = gradient_BhwO.sum((0, 1, 2)) if needs_bias else None
        return (
            None if of_x is None else _inner(of_x, ctx.padding).permute(0, 3, 1, 2),
            None if of_matrix is None else _as_weights(of_matrix, weight_OCKK),
            of_bias,
            None,
        )


def _as_they_are(weights: Tensor) -> Tensor:
    return weights


def _columns(x_BCHW: Tensor, weight_OCKK: Tensor, padding: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of all images' outputs, and what each of their cells is made of, (B * rows * w, D)."""
    size = weight_OCKK.shape[2]
    x_BHWC = _padded(x_BCHW, padding)
    images, height, width, _ = x_BHWC.shape
    height, width = height - size + 1, width - size + 1
    at_once = max(1, CELLS_AT_ONCE // (images * width))
    for first in range(0, height, at_once):
        rows = slice(first, min(height, first + at_once))
        strip_BnWC = x_BHWC[:, rows.start : rows.stop + size - 1]
        windows_BnwCKK = strip_BnWC.unfold(1, size, 1).unfold(2, size, 1)
        in_order = windows_BnwCKK if weight_OCKK.is_contiguous() else windows_BnwCKK.permute(0, 1, 2, 4, 5, 3)
        yield rows, in_order.reshape(images * (rows.stop - rows.start) * width, -1)


def _add_columns(columns: Tensor, strip_BnWC: Tensor, weight_OCKK: Tensor) -> None:
    """Add what columns hold to the cells they were made of."""
    size = weight_OCKK.shape[2]
    images, height, width, channels = strip_BnWC.shape
    cells = (images, height - size + 1, width - size + 1)
    if weight_OCKK.is_contiguous():
        windows = columns.view(*cells, channels, size, size).permute(4, 5, 0, 1, 2, 3)
    else:
        windows = columns.view(*cells, size, size, channels).permute(3, 4, 0, 1, 2, 5)
    for i, of_row in enumerate(windows.contiguous()):
        for j, values in enumerate(of_row):
            strip_BnWC[:, i : i + cells[1], j : j + cells[2]] += values


def _matrix(weight_OCKK: Tensor) -> Tensor:
    """(O, D), D in the order in which the weights lie."""
    in_order = weight_OCKK if weight_OCKK.is_contiguous() else weight_OCKK.permute(0, 2, 3, 1)
    return in_order.reshape(len(weight_OCKK), -1)


def _as_weights(matrix_OD: Tensor, weight_OCKK: Tensor) -> Tensor:
    """A matrix of that order as weights."""
    if weight_OCKK.is_contiguous():
        return matrix_OD.view(weight_OCKK.shape)
    outputs, channels, size, _ = weight_OCKK.shape
    return matrix_OD.view(outputs, size, size, channels).permute(0, 3, 1, 2)


def _padded(x_BCHW: Tensor, padding: int) -> Tensor:
    """(B, H, W, C)."""
    return F.pad(x_BCHW.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))


def _inner(padded_BHWC: Tensor, padding: int) -> Tensor:
    """What was padded."""
    _, height, width, _ = padded_BHWC.shape
    return padded_BHWC[:, padding : height - padding, padding : width - padding]
