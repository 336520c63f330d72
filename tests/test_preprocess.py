"""Preprocessing, against values worked out by hand."""

import pytest
import torch

from fcn_dist.model.preprocess import CAFFE, TORCHVISION, Preprocessing, normalise

PIXEL = torch.tensor([[[[10, 100, 200]]]], dtype=torch.uint8)  # red, green, blue


def test_caffe_weights_get_blue_first_minus_their_means() -> None:
    x = normalise(PIXEL, CAFFE, torch.float32)
    # 200 - 103.939, 100 - 116.779, 10 - 123.68
    torch.testing.assert_close(x.flatten(), torch.tensor([96.061, -16.779, -113.68]))


def test_torchvision_weights_get_red_first_in_standard_deviations() -> None:
    x = normalise(PIXEL, TORCHVISION, torch.float32)
    # As torchvision writes it: (v / 255 - mean) / std with its published means and deviations.
    expected = [(10 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (200 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(x.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_images_become_channels_first_in_channels_last_memory_with_pixels_in_place() -> None:
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    for preprocessing in (CAFFE, TORCHVISION):
        x = normalise(images, preprocessing, torch.float32)
        assert x.shape == (2, 3, 5, 7)
        assert x.is_contiguous(memory_format=torch.channels_last)
    red = normalise(images, TORCHVISION, torch.float32)[:, 0] * 58.395 + 123.675
    torch.testing.assert_close(red, images[..., 0].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).reshape(1, 16, 16, 3)
    x = normalise(images, CAFFE, dtype)
    assert x.dtype == dtype
    exact = images.double().flip(-1) - torch.tensor([103.939, 116.779, 123.68], dtype=torch.float64)
    assert torch.equal(x, exact.float().to(dtype).permute(0, 3, 1, 2))


def test_floating_images_are_taken_as_0_to_255() -> None:
    assert torch.equal(normalise(PIXEL.float(), CAFFE, torch.float32), normalise(PIXEL, CAFFE, torch.float32))
    half = normalise(PIXEL.float() + 0.5, CAFFE, torch.float32)
    torch.testing.assert_close(half, normalise(PIXEL, CAFFE, torch.float32) + 0.5)


def test_the_image_itself_is_not_changed() -> None:
    before = PIXEL.float()
    normalise(before, TORCHVISION, torch.float32)
    assert torch.equal(before, PIXEL.float())


@pytest.mark.parametrize("preprocessing", [CAFFE, TORCHVISION])
def test_its_json_form_gives_it_back(preprocessing: Preprocessing) -> None:
    assert Preprocessing.from_dict(preprocessing.as_dict()) == preprocessing


@pytest.mark.parametrize(
    ("key", "value"),
    [("channel_order", "GBR"), ("std", (1.0, 0.0, 1.0)), ("mean", (1.0, 2.0)), ("mean", ("a", "b", "c")), ("std", 3)],
)
def test_what_is_no_preprocessing_is_refused(key: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Preprocessing.from_dict({**CAFFE.as_dict(), key: value})
    with pytest.raises(KeyError):
        Preprocessing.from_dict({"mean": (1, 2, 3)})
