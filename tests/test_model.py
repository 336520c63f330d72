"""The network, against a forward pass written out here and counts worked out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fcn_dist.config import ModelConfig
from fcn_dist.labels import LabelRule
from fcn_dist.model.description import ModelDescription
from fcn_dist.model.fcn import FCN, parameter_count, scaled
from fcn_dist.model.preprocess import CAFFE

VARIANTS = {"fcn8s": 8, "fcn16s": 16, "fcn32s": 32}
# Where torchvision's VGG keeps its convolutions and its max pools.
CONVOLUTIONS = {
    "vgg16": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
    "vgg19": [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34],
}
POOLS = {"vgg16": [4, 9, 16, 23, 30], "vgg19": [4, 9, 18, 27, 36]}


def tiny(outputs: int = 3, variant: str = "fcn8s", seed: int = 0, **options: object) -> FCN:
    """A network with 8 to 24 channels whose score layers are not zero."""
    config = ModelConfig(variant=variant, width=0.05, head_width=12, **options)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    model = FCN(outputs, config).eval()
    for score in (model.score_fr, model.score_pool4, model.score_pool3):
        if score is not None:
            nn.init.normal_(score.weight, std=0.3)
            nn.init.normal_(score.bias)  # type: ignore[arg-type]
    return model


def images_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (37, 53), (64, 96), (33, 31)])
def test_any_image_size_gives_scores_of_that_size(variant: str, size: tuple[int, int]) -> None:
    model, stride = tiny(4, variant), VARIANTS[variant]
    with torch.no_grad():
        assert model(images_of(2, *size)).shape == (2, 4, *size)
        cells = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        assert model(images_of(2, *size), coarse=True).shape == (2, 4, *cells)


def written_out(
    state: dict[str, Tensor], images: Tensor, variant: str, backbone: str, at_once: bool, average: bool = False
) -> Tensor:
    """The network once more, from the paper: no module of the package takes part. Sides are multiples of 32."""
    x = (images.double() - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    x = x.permute(0, 3, 1, 2)
    weights = {name: value.double() for name, value in state.items()}
    pools = []
    for index in range(max(POOLS[backbone]) + 1):
        if index in CONVOLUTIONS[backbone]:
            x = F.conv2d(x, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], padding=1).relu()
        elif index in POOLS[backbone]:
            x = F.avg_pool2d(x, 2) if average and index < max(POOLS[backbone]) else F.max_pool2d(x, 2)
            pools.append(x)
    x = F.conv2d(x, weights["fc6.weight"], weights["fc6.bias"], padding=3).relu()
    x = F.conv2d(x, weights["fc7.weight"], weights["fc7.bias"]).relu()
    scores = F.conv2d(x, weights["score_fr.weight"], weights["score_fr.bias"])

    def up(x: Tensor, factor: int) -> Tensor:
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    if variant != "fcn32s":
        pool4 = pools[3] * (0.01 if at_once else 1)
        scores = up(scores, 2) + F.conv2d(pool4, weights["score_pool4.weight"], weights["score_pool4.bias"])
    if variant == "fcn8s":
        pool3 = pools[2] * (0.0001 if at_once else 1)
        scores = up(scores, 2) + F.conv2d(pool3, weights["score_pool3.weight"], weights["score_pool3.bias"])
    return up(scores, VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", CONVOLUTIONS)
@pytest.mark.parametrize("at_once", [False, True])
def test_scores_are_those_of_the_network_written_out(variant: str, backbone: str, at_once: bool) -> None:
    model = tiny(3, variant, backbone=backbone, at_once=at_once).double()
    images = images_of(2, 64, 96)
    with torch.no_grad():
        expected = written_out(dict(model.state_dict()), images, variant, backbone, at_once)
        torch.testing.assert_close(model(images), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backbone", CONVOLUTIONS)
def test_average_pooling_is_that_of_the_first_four_stages(backbone: str) -> None:
    model = tiny(3, backbone=backbone, pooling="average").double()
    images = images_of(2, 64, 96)
    with torch.no_grad():
        expected = written_out(dict(model.state_dict()), images, "fcn8s", backbone, False, average=True)
        torch.testing.assert_close(model(images), expected, rtol=1e-6, atol=1e-6)
        assert model(images_of(1, 45, 37)).shape == (1, 3, 45, 37)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("axis", [1, 2])
def test_shifting_the_image_by_32_pixels_shifts_the_scores_by_32(variant: str, axis: int) -> None:
    model = tiny(3, variant).double()
    size = [96, 96]
    size[axis - 1] = 832
    whole = images_of(1, *size).double()
    with torch.no_grad():
        one = model(whole.narrow(axis, 0, 800)).narrow(axis + 1, 32, 768)
        other = model(whole.narrow(axis, 32, 800)).narrow(axis + 1, 0, 768)
    # fc6 sees 404 pixels: what lies that far from both ends knows no border.
    inside = slice(256, 512)
    torch.testing.assert_close(
        one.narrow(axis + 1, inside.start, 256), other.narrow(axis + 1, inside.start, 256), rtol=1e-9, atol=1e-9
    )
    assert (one - other).abs().max() > 1e-6  # near the ends they do differ: the comparison is not of constants
    assert one.narrow(axis + 1, inside.start, 256).std() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_mirrored_kernels_a_mirrored_image_gives_mirrored_scores(variant: str) -> None:
    # Any offset of half a cell or of one pixel, in pooling, skips or upsampling, would break the symmetry.
    model = tiny(3, variant).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                parameter.copy_((parameter + parameter.flip(2) + parameter.flip(3) + parameter.flip(2, 3)) / 4)
        images = images_of(1, 96, 128)
        scores = model(images)
        for axis in (1, 2):
            torch.testing.assert_close(model(images.flip(axis)), scores.flip(axis + 1), rtol=1e-9, atol=1e-9)
    assert scores.std() > 1e-3


def test_the_at_once_form_is_the_plain_one_with_weights_scaled() -> None:
    plain, at_once = tiny(), tiny(at_once=True)
    at_once.load_state_dict(plain.state_dict())
    assert plain.score_pool4 is not None and plain.score_pool3 is not None
    with torch.no_grad():
        plain.score_pool4.weight.mul_(0.01)
        plain.score_pool3.weight.mul_(0.0001)
        torch.testing.assert_close(plain(images_of(1, 64, 64)), at_once(images_of(1, 64, 64)))


def test_fcn8s_on_vgg16_has_the_reference_s_parameters() -> None:
    with torch.device("meta"):
        model = FCN(151, ModelConfig())
    trunk = sum(
        9 * inputs * outputs + outputs
        for inputs, outputs in [
            (3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256),
            (256, 512), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512),
        ]
    )  # fmt: skip
    assert trunk == 14_714_688  # as of torchvision's VGG16 without its classifier
    fc6, fc7 = 7 * 7 * 512 * 4096 + 4096, 4096 * 4096 + 4096
    scores = sum(channels * 151 + 151 for channels in (4096, 512, 256))
    assert parameter_count(model) == trunk + fc6 + fc7 + scores
    # What the reference has with 151 outputs, its frozen bilinear deconvolutions not counted; exactly the same.
    assert parameter_count(model) == 134_995_461


@pytest.mark.parametrize("backbone", CONVOLUTIONS)
def test_the_trunk_is_named_as_torchvision_names_it(backbone: str) -> None:
    model = tiny(backbone=backbone)
    names = {name for name in model.state_dict() if name.startswith("features.")}
    assert names == {f"features.{index}.{kind}" for index in CONVOLUTIONS[backbone] for kind in ("weight", "bias")}
    others = {name.partition(".")[0] for name in model.state_dict()} - {"features"}
    assert others == {"fc6", "fc7", "score_fr", "score_pool4", "score_pool3"}


def test_coarser_variants_lack_the_finer_skips() -> None:
    assert tiny(variant="fcn32s").score_pool4 is None and tiny(variant="fcn32s").score_pool3 is None
    assert tiny(variant="fcn16s").score_pool4 is not None and tiny(variant="fcn16s").score_pool3 is None


def test_the_width_factor_scales_every_channel_but_the_outputs() -> None:
    with torch.device("meta"):
        model = FCN(21, ModelConfig(width=0.25))
    widths = [model.state_dict()[f"features.{index}.weight"].shape[0] for index in CONVOLUTIONS["vgg16"]]
    assert widths == [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128]
    assert model.fc6.weight.shape == (1024, 128, 7, 7)
    assert model.score_fr.weight.shape == (21, 1024, 1, 1)
    with torch.device("meta"):
        assert FCN(21, ModelConfig(width=0.25, head_width=100)).fc7.weight.shape == (100, 100, 1, 1)
    assert [scaled(64, width) for width in (1.0, 0.1, 0.01, 0.3)] == [64, 8, 8, 16]


def test_an_untrained_network_scores_nothing_and_its_trunk_keeps_the_signal() -> None:
    torch.manual_seed(0)
    model = FCN(5, ModelConfig(width=0.25, head_width=64)).eval()
    with torch.no_grad():
        assert (model(images_of(1, 64, 64)) == 0).all()
        features = model.features(torch.randn(1, 3, 96, 96))
    assert 0.1 < features.std() < 10


def test_bytes_and_floats_of_the_same_pixels_score_the_same() -> None:
    model, images = tiny(), images_of(1, 40, 40)
    with torch.no_grad():
        assert torch.equal(model(images), model(images.float()))


def test_gradients_reach_every_parameter() -> None:
    model = tiny().train()
    model(images_of(2, 96, 96), dropout_keys=[1, 2]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("stages", "first_trained"), [(0, 0), (1, 5), (2, 10), (5, 31)])
def test_frozen_stages_get_no_gradient_and_the_others_do(stages: int, first_trained: int) -> None:
    """VGG16's stages begin at layers 0, 5, 10, 17 and 24 of torchvision's numbering, and end with 30."""
    torch.manual_seed(0)
    model = FCN(3, ModelConfig(width=0.0625, head_width=8, dropout=0, frozen_stages=stages))
    torch.nn.init.ones_(model.score_fr.weight)
    model(torch.randint(0, 256, (1, 40, 40, 3), dtype=torch.uint8)).sum().backward()
    trained = {int(name.split(".")[1]) for name, p in model.features.named_parameters("features") if p.grad is not None}
    convolutions = {i for i, layer in enumerate(model.features) if isinstance(layer, torch.nn.Conv2d)}
    assert trained == {layer for layer in convolutions if layer >= first_trained}


@pytest.mark.parametrize("score_other", [False, True])
def test_a_description_builds_the_network_again_from_its_json_form(score_other: bool) -> None:
    config = ModelConfig(variant="fcn16s", width=0.05, head_width=8, at_once=True)
    before = ModelDescription(config, CAFFE, ("wall", "sky"), ((1, 2, 3), (4, 5, 6)), score_other)
    after = ModelDescription.from_dict(before.as_dict())
    assert after == before
    model = after.build()
    assert model.num_outputs == LabelRule(2, score_other).num_outputs == (3 if score_other else 2)
    assert model.preprocessing == CAFFE and model.config == config
