"""Geometry "reference": the Caffe network's arithmetic, derived here from its published layers alone."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_dist.config import ModelConfig
from fcn_dist.labels import IGNORE_LABEL
from fcn_dist.model.fcn import FCN
from fcn_dist.model.flops import convolutions
from fcn_dist.model.loss import summed_cross_entropy
from fcn_dist.model.preprocess import Preprocessing
from fcn_dist.model.reference import bilinear
from fcn_dist.model.upsampling import argmax_upsampled

BGR = Preprocessing("BGR", (104.00699, 116.66877, 122.67892), (1.0, 1.0, 1.0))
FORMS = [("fcn32s", False), ("fcn16s", False), ("fcn8s", False), ("fcn8s", True)]
CONVOLUTIONS = (2, 2, 3, 3, 3)
SIZES = [(1, 1), (2, 97), (33, 64), (97, 131), (160, 45)]


def network(variant: str = "fcn8s", at_once: bool = False) -> FCN:
    torch.manual_seed(0)
    config = ModelConfig(variant=variant, at_once=at_once, geometry="reference", width=0.05, head_width=16)  # type: ignore[arg-type]
    model = FCN(5, config, BGR).double().eval()
    for score in (model.score_fr, model.score_pool4, model.score_pool3):
        if score is not None:
            nn.init.normal_(score.weight)
            nn.init.normal_(score.bias)  # type: ignore[arg-type]
    return model


def images(height: int, width: int) -> Tensor:
    random = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (1, height, width, 3), generator=random, dtype=torch.uint8)


def kernel(outputs: int, size: int) -> Tensor:
    """Caffe's bilinear filler: 1 - |x / f - c| with f = ceil(size / 2), c = (2f - 1 - f % 2) / 2f; one an output."""
    f = -(-size // 2)
    c = (2 * f - 1 - f % 2) / (2 * f)
    line = [1 - abs(x / f - c) for x in range(size)]
    weight = torch.zeros(outputs, outputs, size, size, dtype=torch.float64)
    for output in range(outputs):
        for y in range(size):
            for x in range(size):
                weight[output, output, y, x] = line[y] * line[x]
    return weight


def by_layers(state: Mapping[str, Tensor], image: Tensor, variant: str, at_once: bool) -> Tensor:
    """Layer by layer as voc-fcn*/net.py lists them, dense transposed convolutions and all."""
    mean = torch.tensor(BGR.mean)
    x = (image.flip(-1).float() - mean).double().permute(0, 3, 1, 2)
    size, names = (image.shape[1], image.shape[2]), iter(range(99))
    convolutions = [name for name in state if name.startswith("features.") and name.endswith("weight")]
    pools = []
    for count in CONVOLUTIONS:
        for _ in range(count):
            number = next(names)
            weight = convolutions[number]
            bias = state[weight.replace("weight", "bias")]
            x = F.conv2d(x, state[weight], bias, padding=100 if number == 0 else 1).relu()
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
        pools.append(x)
    x = F.conv2d(x, state["fc6.weight"], state["fc6.bias"]).relu()
    x = F.conv2d(x, state["fc7.weight"], state["fc7.bias"]).relu()

    def score(layer: str, y: Tensor) -> Tensor:
        return F.conv2d(y, state[f"{layer}.weight"], state[f"{layer}.bias"])

    def crop(y: Tensor, offset: int, like: tuple[int, int]) -> Tensor:
        assert y.shape[2] >= offset + like[0] and y.shape[3] >= offset + like[1]
        return y[:, :, offset : offset + like[0], offset : offset + like[1]]

    def up(y: Tensor, factor: int) -> Tensor:
        return F.conv_transpose2d(y, kernel(y.shape[1], 2 * factor), stride=factor)

    x = score("score_fr", x)
    if variant == "fcn32s":
        return crop(up(x, 32), 19, size)
    x = up(x, 2)
    x = x + crop(score("score_pool4", pools[3] * (0.01 if at_once else 1)), 5, (x.shape[2], x.shape[3]))
    if variant == "fcn16s":
        return crop(up(x, 16), 27, size)
    x = up(x, 2)
    x = x + crop(score("score_pool3", pools[2] * (0.0001 if at_once else 1)), 9, (x.shape[2], x.shape[3]))
    return crop(up(x, 8), 31, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("variant", "at_once"), FORMS)
def test_scores_are_those_of_the_layers_one_by_one(variant: str, at_once: bool, size: tuple[int, int]) -> None:
    model, image = network(variant, at_once), images(*size)
    with torch.no_grad():
        wanted = by_layers(model.state_dict(), image, variant, at_once)
        found = model(image)
        coarse = model(image, coarse=True)
    assert found.shape == wanted.shape == (1, 5, *size) and wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    labels = argmax_upsampled(coarse, size, model.stride, model.offset)
    # Where two outputs are as good as equal, either is right.
    best = wanted.gather(1, labels.long()[:, None])[:, 0]
    assert (best >= wanted.amax(1) - 1e-9).all()


@pytest.mark.parametrize(("variant", "at_once"), FORMS)
def test_loss_and_gradient_are_those_of_full_size_scores(variant: str, at_once: bool) -> None:
    model, size = network(variant, at_once), (45, 70)
    image = images(*size)
    targets = torch.randint(0, 5, (1, *size), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    targets[:, 10:20] = IGNORE_LABEL
    gradients = []
    for full in (True, False):
        model.zero_grad()
        if full:
            scores = by_layers({**dict(model.named_parameters())}, image, variant, at_once)
            loss = F.cross_entropy(scores, targets.long(), ignore_index=IGNORE_LABEL, reduction="sum")
        else:
            loss = summed_cross_entropy(model(image, coarse=True), targets, model.stride, model.offset)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 30
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-7)


def cells(size: int, variant: str) -> int:
    """Along one axis, by the formulas: (n + 2 * pad - kernel) / stride + 1, rounded up where the reference pools."""
    n = size + 2 * 100 - 3 + 1
    maps = []
    for _ in CONVOLUTIONS:
        n = -(-(n - 2) // 2) + 1
        maps.append(n)
    n = n - 7 + 1
    for stage, crop, skipped in ((4, 5, "fcn32s"), (3, 9, "fcn16s")):
        if variant == skipped:
            return n
        n = 2 * (n - 1) + 4
        assert maps[stage - 1] >= crop + n
    return n


@pytest.mark.parametrize(("variant", "crop"), [("fcn32s", 19), ("fcn16s", 27), ("fcn8s", 31)])
def test_every_size_from_1_to_600_has_the_cells_of_the_formulas_and_enough_of_them(variant: str, crop: int) -> None:
    config = ModelConfig(variant=variant, geometry="reference", width=0.05, head_width=8)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = FCN(2, config).eval()
    for size in range(1, 601):
        wanted = cells(size, variant)
        assert (wanted - 1) * model.stride + 2 * model.stride >= crop + size, "what is cropped from is large enough"
        if size < 70 or size % 37 == 0 or size == 600:
            pixels = torch.zeros(1, size, 601 - size, 3, dtype=torch.uint8, device="meta")
            with torch.no_grad():
                coarse = model(pixels, coarse=True)
            assert coarse.shape[2:] == (wanted + 2, cells(601 - size, variant) + 2), "with a ring of one cell"


@pytest.mark.parametrize("stride", [2, 8, 16, 32])
def test_the_kernel_interpolates_as_torch_does_within_the_outermost_cells(stride: int) -> None:
    assert torch.allclose(bilinear(stride).double(), kernel(1, 2 * stride)[0, 0])
    coarse = torch.randn(1, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    found = F.conv_transpose2d(coarse, bilinear(stride)[None, None], stride=stride)
    half = stride // 2
    inside = F.interpolate(coarse, scale_factor=stride, mode="bilinear")[:, :, half:-half, half:-half]
    torch.testing.assert_close(found[:, :, stride:-stride, stride:-stride], inside)


def test_a_network_that_scores_one_everywhere_fades_as_reckoned_by_hand() -> None:
    """All weights 0 and the bias of score_fr 1, so each cell scores 1, and 32s shows the filter itself."""
    model = network("fcn32s")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(model.score_fr.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        scores = model(images(40, 300))[0, 0]
    # Pixel p is the (p + 19)th of the transposed convolution. Before its 32nd the first cell acts alone, with the
    # weight (i + 0.5) / 32; from there on two cells share a weight of 1.
    line = torch.tensor([(p + 19.5) / 32 for p in range(13)] + [1.0] * 27, dtype=torch.float64)
    torch.testing.assert_close(scores[:, 150], line)
    torch.testing.assert_close(scores[:13, :13], torch.outer(line[:13], line[:13]))


def test_arithmetic_counts_the_padding() -> None:
    model, size = network(), (64, 48)
    used = {id(use.layer): use.cells for use in convolutions(model, size)}
    found: dict[int, int] = {}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda layer, _, output: found.update({id(layer): output.shape[2] * output.shape[3]})
            )
    with torch.no_grad():
        model(images(*size))
    assert used == found and len(found) == 18
