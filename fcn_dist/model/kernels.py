"""The loss and the argmax of upsampled scores as Triton kernels: coarse scores in, no full-resolution scores ever.

Shapes: B images, C outputs, h x w coarse cells, H x W pixels, N channels padded to a power of two, P pixels of a row.

A program works on one square of stride x stride pixels: those between the centres of four neighbouring cells, which
are the only scores they depend on. Squares straddle cells, so there are (h + 1) x (w + 1) of them an image, the
outermost half outside; there, the cells beyond the border have weight 0 and are neither read nor written. A program is
one warp: the channels of a pixel lie across its lanes, and all it sums over pixels stays in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcn_dist.labels import IGNORE_LABEL

IGNORED = tl.constexpr(IGNORE_LABEL)
# Scores held at once, in elements: a warp's registers hold them, and the four cells' scores and gradients besides.
LOSS_ELEMENTS = 1024
ARGMAX_ELEMENTS = 2048
MAX_PIXELS = 16

# Sizes change from image to image, and one compiled kernel serves all of them.
SIZES = ("H", "W", "h", "w", "rows", "columns", "first_row", "first_column")


def loss_and_gradient(
    scores_BChw: Tensor, targets_BHW: Tensor, stride: int, gradient_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of the upsampled scores, a float32 scalar, and its gradient, (B, C, h, w) or None.

    A target that is neither an output nor IGNORE_LABEL makes the loss infinite. The same input gives the same bits:
    squares of one launch share no cell, and launches follow each other.
    """
    scores_BhwC = scores_BChw.permute(0, 2, 3, 1).contiguous()
    targets = targets_BHW.contiguous()
    batch, h, w, outputs = scores_BhwC.shape
    gradient_BhwC = None if gradient_dtype is None else torch.zeros_like(scores_BhwC, dtype=gradient_dtype)
    losses = torch.empty((batch, h + 1, w + 1), dtype=torch.float32, device=scores_BhwC.device)
    with torch.cuda.device_of(scores_BhwC):  # type: ignore[no-untyped-call]
        for first_row in (0, 1):
            for first_column in (0, 1):
                rows, columns = (h + 2 - first_row) // 2, (w + 2 - first_column) // 2
                _loss_squares[(batch * rows * columns,)](
                    *(scores_BhwC, targets, gradient_BhwC, losses),
                    *(targets.shape[1], targets.shape[2], h, w, outputs),
                    *(rows, columns, first_row, first_column),
                    STRIDE=stride,
                    **_blocks(outputs, stride, LOSS_ELEMENTS),
                    num_warps=1,
                )
    return losses.sum(), None if gradient_BhwC is None else gradient_BhwC.permute(0, 3, 1, 2)


def argmax(scores_BChw: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """The output with the highest upsampled score, (B, H, W) uint8, ties to the lower; NaN counts as infinity."""
    scores_BhwC = scores_BChw.permute(0, 2, 3, 1).contiguous()
    batch, h, w, outputs = scores_BhwC.shape
    labels = torch.empty((batch, *size), dtype=torch.uint8, device=scores_BhwC.device)
    with torch.cuda.device_of(scores_BhwC):  # type: ignore[no-untyped-call]
        _argmax_squares[(batch * (h + 1) * (w + 1),)](
            *(scores_BhwC, labels, *size, h, w, outputs),
            STRIDE=stride,
            **_blocks(outputs, stride, ARGMAX_ELEMENTS),
            num_warps=1,
        )
    return labels


def _blocks(outputs: int, stride: int, elements: int) -> dict[str, int]:
    """Powers of two: channels, and as many pixels of a square's row as `elements` allow."""
    assert stride & (stride - 1) == 0, "weights are exact, and squares begin between pixels, for powers of two"
    channels = triton.next_power_of_2(outputs)
    return {"N": channels, "P": min(stride, elements // channels, MAX_PIXELS)}


@triton.jit(do_not_specialize=SIZES)
def _loss_squares(
    scores,
    targets,
    gradient,
    losses,
    H,
    W,
    h,
    w,
    C,
    rows,
    columns,
    first_row,
    first_column,
    STRIDE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
):
    """Every second square of every second row of squares."""
    program = tl.program_id(0)
    image = (program // (rows * columns)).to(tl.int64)
    row = program // columns % rows * 2 + first_row
    column = program % columns * 2 + first_column
    top, left = row * STRIDE - STRIDE // 2, column * STRIDE - STRIDE // 2  # of the square, in pixels
    targets += image * H * W

    square = tl.arange(0, STRIDE * STRIDE)
    its_y, its_x = top + square // STRIDE, left + square % STRIDE
    in_image = (its_y >= 0) & (its_y < H) & (its_x >= 0) & (its_x < W)
    its_target = tl.load(targets + its_y * W + its_x, mask=in_image, other=IGNORED)
    anything_to_learn = tl.max((its_target != IGNORED).to(tl.int32), axis=0) > 0
    loss_P = tl.zeros([P], tl.float32)
    if anything_to_learn:
        channel = tl.arange(0, N)
        nw, nw_channels = _cell(image, row - 1, column - 1, h, w, C)
        ne, ne_channels = _cell(image, row - 1, column, h, w, C)
        sw, sw_channels = _cell(image, row, column - 1, h, w, C)
        se, se_channels = _cell(image, row, column, h, w, C)
        nw_score = _read(scores + nw + channel, channel < nw_channels)
        ne_score = _read(scores + ne + channel, channel < ne_channels)
        sw_score = _read(scores + sw + channel, channel < sw_channels)
        se_score = _read(scores + se + channel, channel < se_channels)
        nw_gradient = tl.zeros([N], tl.float32)
        ne_gradient = tl.zeros([N], tl.float32)
        sw_gradient = tl.zeros([N], tl.float32)
        se_gradient = tl.zeros([N], tl.float32)
        for y in range(tl.maximum(top, 0), tl.minimum(top + STRIDE, H)):
            south = _weight(y - top, row, h, STRIDE)
            w_score = nw_score * (1 - south) + sw_score * south
            e_score = ne_score * (1 - south) + se_score * south
            w_gradient = tl.zeros([N], tl.float32)
            e_gradient = tl.zeros([N], tl.float32)
            for first in range(0, STRIDE, P):
                across = first + tl.arange(0, P)
                x = left + across
                inside = (x >= 0) & (x < W)
                target = tl.load(targets + y * W + x, mask=inside, other=IGNORED).to(tl.int32)
                labelled = target != IGNORED
                east = _weight(across, column, w, STRIDE)
                score = w_score[None, :] * (1 - east)[:, None] + e_score[None, :] * east[:, None]
                score = tl.where((channel < C)[None, :], score, float("-inf"))
                hit = channel[None, :] == target[:, None]
                highest = tl.max(score, axis=1)
                odds = tl.exp(score - highest[:, None])
                total = tl.sum(odds, axis=1)
                at_target = tl.max(tl.where(hit, score, float("-inf")), axis=1)
                loss_P += tl.where(labelled, tl.log(total) + (highest - at_target), 0.0)
                if gradient is not None:
                    residual = odds / total[:, None] - tl.where(hit, 1.0, 0.0)
                    residual = tl.where(labelled[:, None], residual, 0.0)
                    w_gradient += tl.sum(residual * (1 - east)[:, None], axis=0)
                    e_gradient += tl.sum(residual * east[:, None], axis=0)
            nw_gradient += w_gradient * (1 - south)
            ne_gradient += e_gradient * (1 - south)
            sw_gradient += w_gradient * south
            se_gradient += e_gradient * south
        if gradient is not None:
            _add(gradient + nw + channel, nw_gradient, channel < nw_channels)
            _add(gradient + ne + channel, ne_gradient, channel < ne_channels)
            _add(gradient + sw + channel, sw_gradient, channel < sw_channels)
            _add(gradient + se + channel, se_gradient, channel < se_channels)
    tl.store(losses + (image * (h + 1) + row) * (w + 1) + column, tl.sum(loss_P, axis=0))


@triton.jit(do_not_specialize=SIZES[:4])
def _argmax_squares(
    scores,
    labels,
    H,
    W,
    h,
    w,
    C,
    STRIDE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
):
    """Every square."""
    program = tl.program_id(0)
    image = (program // ((h + 1) * (w + 1))).to(tl.int64)
    row, column = program // (w + 1) % (h + 1), program % (w + 1)
    top, left = row * STRIDE - STRIDE // 2, column * STRIDE - STRIDE // 2
    channel = tl.arange(0, N)
    nw, nw_channels = _cell(image, row - 1, column - 1, h, w, C)
    ne, ne_channels = _cell(image, row - 1, column, h, w, C)
    sw, sw_channels = _cell(image, row, column - 1, h, w, C)
    se, se_channels = _cell(image, row, column, h, w, C)
    nw_score = _read(scores + nw + channel, channel < nw_channels)
    ne_score = _read(scores + ne + channel, channel < ne_channels)
    sw_score = _read(scores + sw + channel, channel < sw_channels)
    se_score = _read(scores + se + channel, channel < se_channels)
    for y in range(tl.maximum(top, 0), tl.minimum(top + STRIDE, H)):
        south = _weight(y - top, row, h, STRIDE)
        w_score = nw_score * (1 - south) + sw_score * south
        e_score = ne_score * (1 - south) + se_score * south
        for first in range(0, STRIDE, P):
            across = first + tl.arange(0, P)
            east = _weight(across, column, w, STRIDE)
            score = w_score[None, :] * (1 - east)[:, None] + e_score[None, :] * east[:, None]
            score = tl.where(score != score, float("inf"), score)  # NaN alone differs from itself
            score = tl.where((channel < C)[None, :], score, float("-inf"))
            winner = tl.argmax(score, axis=1, tie_break_left=True)
            x = left + across
            tl.store(labels + (image * H + y) * W + x, winner.to(tl.uint8), mask=(x >= 0) & (x < W))


@triton.jit
def _cell(image, row, column, h, w, C):
    """Where the channels of a cell begin, and how many there are: none beyond the border."""
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return ((image * h + row) * w + column) * C, tl.where(inside, C, 0)


@triton.jit
def _weight(offset, square, cells, STRIDE: tl.constexpr):
    """Of the cell below or to the right, for a pixel `offset` from the edge of its square.

    `square` counts along one axis; of the first and the last, only one of the two cells exists.
    """
    between = (offset + 0.5) / STRIDE
    return tl.where(square == 0, 1.0, tl.where(square == cells, 0.0, between))


@triton.jit
def _read(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add(pointer, value, mask):
    tl.store(pointer, (_read(pointer, mask) + value).to(pointer.dtype.element_ty), mask=mask)
