"""Convolutions by Winograd's minimal filtering: F(4x4, 3x3) multiplies 36 values where the definition takes 144.

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), section 4. Tiles of N x N cells are taken to
values at N points along each side, multiplied there by the weights as N * N matrix products over the channels, and
brought back as the M x M cells they decide. The points are 0, pairs of p and -p, and infinity: what a pair has in
common is computed once. For inference on the CPU in float32, where torch multiplies by definition; the points are such
that rounding costs about one digit more than there.

Shapes: C channels in, O out, H x W cells, K x K weights, M cells of a tile decided, N = M + K - 1 of them read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Tiles multiplied at once: enough for the matrix product, few enough for the caches. And values that come out of it.
TILES_AT_ONCE, VALUES_AT_ONCE = 256, 1 << 25
OUTPUTS_AT_ONCE = 128  # whose weights are transformed


@dataclass(frozen=True)
class Filtering:
    """F(M x M, K x K), with points at 0, infinity, and both signs of each of `pairs`."""

    inner: int  # M
    pairs: tuple[float, ...]

    @property
    def tile(self) -> int:
        """N."""
        return 2 * len(self.pairs) + 2

    def roots(self, without: float | None = None) -> list[float]:
        """Coefficients of x^0, x^2, ... in the product of x^2 - p^2 over the pairs, one of them left out."""
        product = [1.0]
        for p in self.pairs:
            if p != without:
                product = [before - p * p * c for before, c in zip([0.0, *product], [*product, 0.0], strict=True)]
        return product

    def weights_to_points(self) -> Tensor:
        """The matrix (N, K) that gives a filter's values at the points, float64."""
        powers = range(self.tile - self.inner + 1)
        rows = [[1 / self.roots()[0], *(0.0 for _ in powers[1:])]]
        for p in self.pairs:
            at_p = 2 * p * p * sum(c * p ** (2 * k) for k, c in enumerate(self.roots(without=p)))
            rows += [[sign**k * p**k / at_p for k in powers] for sign in (1, -1)]
        return torch.tensor([*rows, [*(0.0 for _ in powers[1:]), 1.0]], dtype=torch.float64)

    def to_points(self, cells: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """N cells into N values, in the order 0, p, -p, ..., infinity."""
        spare = out[-1]
        for number, p in enumerate(self.pairs):
            even, odd = out[2 * number + 1], spare
            combine(self.roots(without=p), cells[2::2], even)
            combine(self.roots(without=p), cells[1::2], odd)
            torch.sub(even, odd, alpha=p, out=out[2 * number + 2])
            even.add_(odd, alpha=p)
        combine(self.roots(), cells[0::2], out[0])
        combine(self.roots(), cells[1::2], out[-1])

    def from_points(self, values: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """N values into the M cells they decide."""
        signs = list(zip(values[1::2], values[2::2], strict=False))
        parts = {0: [plus + minus for plus, minus in signs], 1: [plus - minus for plus, minus in signs]}
        for power, cell in enumerate(out):
            factors = [p**power for p in self.pairs]
            if power == 0:
                torch.add(values[0], parts[0][0], out=cell)
            else:
                torch.mul(parts[power % 2][0], factors[0], out=cell)
            for factor, part in zip(factors[1:], parts[power % 2][1:], strict=True):
                cell.add_(part, alpha=factor)
        out[-1].add_(values[-1])


FILTERINGS = {3: Filtering(4, (1.0, 2.0)), 7: Filtering(2, (1.0, 2.0, 0.5))}  # by K


def combine(coefficients: Sequence[float], parts: Sequence[Tensor], out: Tensor) -> None:
    """The sum of the parts times their coefficients, of which the last is 1, into `out`."""
    torch.add(parts[len(coefficients) - 1], parts[0], alpha=coefficients[0], out=out)
    for coefficient, part in zip(coefficients[1:-1], parts[1:], strict=False):
        out.add_(part, alpha=coefficient)


class WinogradConv2d(nn.Module):
    """The values of a convolution of stride 1, its K among `FILTERINGS`, then a ReLU if `relu`; no gradients."""

    def __init__(self, convolution: nn.Conv2d, relu: bool = False) -> None:
        super().__init__()
        assert convolution.bias is not None
        self.relu = relu
        self.padding = int(convolution.padding[0])
        self.filtering = FILTERINGS[convolution.kernel_size[0]]
        self.weight_NNCO = transformed(convolution.weight.detach(), self.filtering)
        self.bias_O = convolution.bias.detach()

    @torch.no_grad()
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, O, H', W') float32, channels last."""
        return torch.stack([self.one_image(x_HWC) for x_HWC in x_BCHW.permute(0, 2, 3, 1)]).permute(0, 3, 1, 2)

    def one_image(self, x_HWC: Tensor) -> Tensor:
        """(H', W', O), computed a few rows of tiles at a time."""
        tile, inner = self.filtering.tile, self.filtering.inner
        outputs = len(self.bias_O)
        height, width = (size + 2 * self.padding - tile + inner for size in x_HWC.shape[:2])
        down, across = -(-height // inner), -(-width // inner)
        below, right = (inner * tiles - size + self.padding for tiles, size in ((down, height), (across, width)))
        padded = F.pad(x_HWC, (0, 0, self.padding, right, self.padding, below))
        out = padded.new_empty(inner * down, inner * across, outputs)
        rows = max(1, min(TILES_AT_ONCE, VALUES_AT_ONCE // (tile * tile * outputs)) // across)
        for first in range(0, down, rows):
            last = min(down, first + rows)
            strip = padded[inner * first : inner * last + tile - inner]
            cells = out[inner * first : inner * last].view(last - first, inner, across, inner, outputs)
            self.strip(strip, cells)
            cells.add_(self.bias_O)
            if self.relu:
                cells.relu_()
        return out[:height, :width]

    def strip(self, x_hwC: Tensor, cells_nMtMO: Tensor) -> None:
        """Convolve n rows of t tiles."""
        filtering, tile, inner = self.filtering, self.filtering.tile, self.filtering.inner
        n, _, t, _, outputs = cells_nMtMO.shape
        channels = x_hwC.shape[2]
        columns = x_hwC.new_empty(tile, n, x_hwC.shape[1], channels)
        filtering.to_points([x_hwC[i : i + inner * (n - 1) + 1 : inner] for i in range(tile)], columns.unbind())
        points = x_hwC.new_empty(tile, tile, n, t, channels)  # by those across, then those down
        filtering.to_points([columns[:, :, j : j + inner * (t - 1) + 1 : inner] for j in range(tile)], points.unbind())
        products = points.view(-1, n * t, channels) @ self.weight_NNCO.view(-1, channels, outputs)
        rows = x_hwC.new_empty(inner, tile, n, t, outputs)
        filtering.from_points(products.view(tile, tile, n, t, outputs).unbind(), rows.unbind())
        filtering.from_points(rows.unbind(1), [cells_nMtMO[:, p].permute(2, 0, 1, 3) for p in range(inner)])


def transformed(weight_OCKK: Tensor, filtering: Filtering) -> Tensor:
    """A filter's values at the points across, then those down, (N, N, C, O) float32."""
    to_points = filtering.weights_to_points().float()
    outputs, channels, size, _ = weight_OCKK.shape
    found = weight_OCKK.new_empty(filtering.tile, filtering.tile, channels, outputs)
    for first in range(0, outputs, OUTPUTS_AT_ONCE):
        filters_oKKC = weight_OCKK[first : first + OUTPUTS_AT_ONCE].permute(0, 2, 3, 1)
        down = (to_points @ filters_oKKC.reshape(-1, size, size * channels)).view(-1, size, channels)
        across = (to_points @ down).view(-1, filtering.tile, filtering.tile, channels)
        found[..., first : first + OUTPUTS_AT_ONCE] = across.permute(2, 1, 3, 0)
    return found
