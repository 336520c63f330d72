"""Several looks at an image, against torch's own operations at full size."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import images_of, tiny
from torch import Tensor
from torch.nn import functional as F

from fcn_dist.errors import UserError
from fcn_dist.model import views as module
from fcn_dist.model.fcn import FCN
from fcn_dist.model.upsampling import argmax_upsampled
from fcn_dist.model.views import Views, label_views, parts


def looked_at(model: FCN, image: Tensor, views: Views) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return label_views(lambda x: model(x, coarse=True), image, views, model.stride, model.offset)


def assert_as(probabilities_1CHW: Tensor, labels: Tensor, confidence: Tensor) -> None:
    highest = probabilities_1CHW[0].amax(0)
    torch.testing.assert_close(confidence, highest, rtol=1e-4, atol=1e-5)
    of_labels = probabilities_1CHW[0].gather(0, labels[None].long())[0]
    torch.testing.assert_close(of_labels, highest, rtol=1e-4, atol=1e-5)  # of two as good as equal, either is right


@pytest.mark.parametrize("geometry", ["same", "reference"])
@pytest.mark.parametrize("variant", ["fcn8s", "fcn32s"])
@pytest.mark.parametrize("size", [(1, 1), (37, 53), (64, 96)])
def test_one_look_is_the_plain_way(variant: str, geometry: str, size: tuple[int, int]) -> None:
    model, image = tiny(4, variant, geometry=geometry), images_of(1, *size)
    assert Views().plain and not Views(flip=True).plain and Views(overlap=0).plain
    labels, confidence = looked_at(model, image, Views())
    with torch.no_grad():
        assert_as(model(image).softmax(1), labels, confidence)
        quick = argmax_upsampled(model(image, coarse=True), size, model.stride, model.offset)[0]
    assert (quick == labels).float().mean() > 0.99


def test_a_mirrored_look_is_mirrored_back_and_probabilities_are_averaged() -> None:
    model, image = tiny(4), images_of(1, 45, 70)
    with torch.no_grad():
        wanted = (model(image).softmax(1) + model(image.flip(2)).flip(3).softmax(1)) / 2
    assert_as(wanted, *looked_at(model, image, Views(flip=True)))


def test_windows_are_averaged_as_scores_where_they_overlap() -> None:
    model, image = tiny(4), images_of(1, 90, 130)
    views = Views(window=64, overlap=0.25)
    rows, columns = parts(90, 64, 0.25), parts(130, 64, 0.25)
    assert rows == [(0, 64), (26, 90)] and columns == [(0, 64), (33, 97), (66, 130)]
    sums, counts = torch.zeros(1, 4, 90, 130), torch.zeros(90, 130)
    with torch.no_grad():
        for top, bottom in rows:
            for left, right in columns:
                sums[:, :, top:bottom, left:right] += model(image[:, top:bottom, left:right])
                counts[top:bottom, left:right] += 1
    assert_as((sums / counts).softmax(1), *looked_at(model, image, views))


@pytest.mark.parametrize("scale", [0.5, 0.77, 1.6])
@pytest.mark.parametrize("window", [0, 48])
def test_other_sizes_are_interpolated_from_the_coarse_scores_to_the_image_s_pixels(scale: float, window: int) -> None:
    """By torch's grid_sample, whose coordinates run from -1 to 1 over the cells."""
    model, (height, width) = tiny(4), (61, 83)
    image = images_of(1, height, width)
    size = [round(height * scale), round(width * scale)]
    pixels = F.interpolate(image.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True).clamp(0, 255)
    look = pixels.permute(0, 2, 3, 1)
    sums, counts = torch.zeros(1, 4, height, width), torch.zeros(height, width)
    y = (torch.arange(height) + 0.5) * size[0] / height
    x = (torch.arange(width) + 0.5) * size[1] / width
    for top, bottom in parts(size[0], window, 1 / 3):
        for left, right in parts(size[1], window, 1 / 3):
            with torch.no_grad():
                coarse = model(look[:, top:bottom, left:right], coarse=True)
            v = (y - top) / (8 * coarse.shape[2]) * 2 - 1
            u = (x - left) / (8 * coarse.shape[3]) * 2 - 1
            grid = torch.stack([u.expand(height, -1), v[:, None].expand(-1, width)], -1)[None]
            sampled = F.grid_sample(coarse, grid, padding_mode="border", align_corners=False)
            inside = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
            sums += sampled * inside
            counts += inside
    assert_as((sums / counts).softmax(1), *looked_at(model, image, Views(scales=(scale,), window=window)))


def test_all_looks_count_the_same_and_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = tiny(4), images_of(1, 50, 40)
    views = Views(scales=(0.5, 1.0, 1.5), flip=True, window=40)
    whole = looked_at(model, image, views)
    monkeypatch.setattr(module, "STRIP_ELEMENTS", 4 * 40 * 3)
    in_strips = looked_at(model, image, views)
    assert torch.equal(whole[0], in_strips[0]) and torch.allclose(whole[1], in_strips[1])
    assert whole[1].std() > 1e-3


@given(st.integers(1, 3000), st.integers(32, 700), st.floats(0, 0.99))
@settings(max_examples=300)
def test_windows_cover_everything_and_overlap_enough(length: int, window: int, overlap: float) -> None:
    found = parts(length, window, overlap)
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(stop - start == min(window, length) for start, stop in found)
    for (_, stop), (start, _) in itertools.pairwise(found):
        assert stop - start >= int(window * overlap) - 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scales": ()}, r"scales are \(\); one or more factors"),
        ({"scales": (1.0, 0.0)}, "scales are"),
        ({"window": 16}, "the window is 16 pixels; 32 or more"),
        ({"window": -1}, "the window is -1"),
        ({"overlap": 1.0}, "windows overlap by 1.0"),
    ],
)
def test_views_that_cannot_be_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Views(**wrong)  # type: ignore[arg-type]
