"""Decoding, windows and resizing: image and mask stay together, and draws are keyed by (seed, position)."""

import dataclasses

import cv2
import numpy as np
import pytest
from colour_scenes import away_from_edges, labels_of, render
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fcn_dist.config import DataConfig
from fcn_dist.data.shardset import DamagedSample, Sample
from fcn_dist.data.transforms import CropWindow, crop_into, decode, draw_window, generator
from fcn_dist.keys import Purpose, key64
from fcn_dist.labels import IGNORE_LABEL

Pixels = NDArray[np.uint8]


def encode(suffix: str, array: Pixels) -> bytes:
    return bytes(cv2.imencode(suffix, array)[1])


def place(window: CropWindow, image: Pixels, mask: Pixels, crop: tuple[int, int]) -> tuple[Pixels, Pixels]:
    image_out, mask_out = np.full((*crop, 3), 77, np.uint8), np.full(crop, IGNORE_LABEL, np.uint8)
    crop_into(window, image, mask, image_out, mask_out)
    return image_out, mask_out


@given(st.integers(-5, 2**70), st.integers(0, 2**62), st.sampled_from(Purpose))
@settings(max_examples=200)
def test_every_bit_of_seed_and_position_reaches_the_generator(seed: int, position: int, purpose: Purpose) -> None:
    state = generator(seed, position, purpose).bit_generator.state
    assert state["state"]["key"].tolist() == [key64(seed, purpose), position]


def test_draws_differ_between_seeds_positions_and_purposes_and_repeat_for_the_same() -> None:
    keys = [(s, p, u) for s in (0, 1) for p in (0, 1, 10**12) for u in (Purpose.CROP, Purpose.PHOTOMETRIC)]
    draws = {generator(*key).random() for key in keys}
    assert len(draws) == len(keys)
    assert draws == {generator(*key).random() for key in keys}


def test_an_image_decodes_to_rgb_and_a_mask_to_its_labels() -> None:
    image = np.zeros((6, 9, 3), np.uint8)
    image[:] = (10, 120, 240)  # OpenCV writes blue, green, red
    mask = np.arange(54, dtype=np.uint8).reshape(6, 9)
    rgb, labels = decode(Sample("a", encode(".png", image), encode(".png", mask)))
    assert rgb[0, 0].tolist() == [240, 120, 10]
    assert (labels == mask).all()
    assert rgb.dtype == labels.dtype == np.uint8


def test_an_orientation_tag_does_not_turn_the_image_under_its_mask() -> None:
    jpeg = encode(".jpg", np.zeros((16, 32, 3), np.uint8))
    # An EXIF segment with orientation 6 (turn by 90 degrees) right after the start of the image.
    tiff = b"II*\0\x08\0\0\0" + b"\x01\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\0\0\0\0"
    body = b"Exif\0\0" + tiff
    tagged = jpeg[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]
    turned = cv2.imdecode(np.frombuffer(tagged, np.uint8), cv2.IMREAD_COLOR)
    assert turned is not None and turned.shape[:2] == (32, 16)  # the tag is one that OpenCV obeys
    image, _ = decode(Sample("a", tagged, encode(".png", np.zeros((16, 32), np.uint8))))
    assert image.shape == (16, 32, 3)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        (b"", encode(".png", np.zeros((4, 4), np.uint8))),
        (b"no jpeg", encode(".png", np.zeros((4, 4), np.uint8))),
        (encode(".jpg", np.zeros((4, 4, 3), np.uint8)), b""),
        (encode(".jpg", np.zeros((4, 4, 3), np.uint8)), encode(".png", np.zeros((4, 5), np.uint8))),
    ],
)
def test_a_pair_that_does_not_decode_to_one_size_is_refused_naming_its_key(image: bytes, mask: bytes) -> None:
    with pytest.raises(DamagedSample, match=r"sample 'street\.7' decodes to"):
        decode(Sample("street.7", image, mask))


configs = st.builds(
    lambda crop, low, factor: DataConfig(crop=crop, scale=(low, low * factor)),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.floats(0.05, 3),
    st.floats(1, 4),
)


@given(st.integers(1, 150), st.integers(1, 150), configs, st.integers(0, 10**6))
@settings(max_examples=200)
def test_any_scene_fits_any_crop_and_padding_is_never_a_label(
    height: int, width: int, config: DataConfig, position: int
) -> None:
    window = draw_window(generator(0, position, Purpose.CROP), height, width, config)
    image, mask = np.full((height, width, 3), 200, np.uint8), np.zeros((height, width), np.uint8)
    image_out, mask_out = place(window, image, mask, config.crop)
    shown = mask_out != IGNORE_LABEL
    assert shown.sum() == window.size[0] * window.size[1] > 0
    assert (image_out[shown] == 200).all() and (image_out[~shown] == 77).all()
    # The crop is filled as far as the scene, at any factor that could have been drawn, reaches.
    for axis, length in enumerate((height, width)):
        least = min(config.crop[axis], max(1, round(length * config.scale[0] - 1)))
        most = min(config.crop[axis], round(length * config.scale[1]) + 1)
        assert least <= window.size[axis] <= most


def test_factors_are_log_uniform_and_places_reach_both_ends() -> None:
    config = DataConfig(crop=(1000, 10), scale=(0.5, 2.0))
    windows = [draw_window(generator(0, p, Purpose.CROP), 100, 100, config) for p in range(2000)]
    factors = np.log2([window.size[0] / 100 for window in windows])
    assert abs(factors.mean()) < 0.06 and abs(np.quantile(factors, 0.25) + 0.5) < 0.08
    starts = [window.source[1].start for window in windows]
    assert min(starts) == 0 and max(window.source[1].stop for window in windows) == 100
    assert abs(np.mean([start / (100 - 10) for start in starts]) - 0.5) < 0.05
    offsets = [window.offset[0] for window in windows if window.size[0] < 500]
    assert np.mean(offsets) > 300  # small scenes are not all put at the top


def test_a_scene_at_factor_one_is_cut_out_pixel_by_pixel() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (40, 50, 3), np.uint8), rng.integers(0, 5, (40, 50), np.uint8)
    config = DataConfig(crop=(16, 20), scale=(1.0, 1.0))
    for position in range(30):
        window = draw_window(generator(1, position, Purpose.CROP), 40, 50, config)
        image_out, mask_out = place(window, image, mask, config.crop)
        assert (image_out == image[window.source]).all()
        assert (mask_out == mask[window.source]).all()


@pytest.mark.parametrize("scale", [(0.4, 0.6), (0.9, 1.1), (1.7, 2.5)])
def test_image_and_mask_agree_pixel_by_pixel_away_from_edges(scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(3)
    labels = cv2.resize(rng.integers(0, 5, (4, 5), np.uint8), (150, 120), interpolation=cv2.INTER_NEAREST)
    image = render(labels, scene=3)
    config = DataConfig(crop=(64, 72), scale=scale)
    compared = 0
    for position in range(60):
        window = draw_window(generator(2, position, Purpose.CROP), 120, 150, config)
        image_out, mask_out = place(window, image, labels, config.crop)
        sure = away_from_edges(mask_out, 2) & (mask_out != IGNORE_LABEL)
        assert (labels_of(image_out)[sure] == mask_out[sure]).all()
        compared += int(sure.sum())
    assert compared > 60 * 1000


@pytest.mark.parametrize("scale", [(0.5, 0.6), (0.99, 1.01), (1.5, 2.0), (3.0, 4.0)])
def test_an_edge_lies_at_the_same_place_in_image_and_mask_on_average(scale: tuple[float, float]) -> None:
    # White where the mask is 1: the white area of the image is that of the mask unless one is shifted against the
    # other. Half a pixel would be a difference of half a pixel's width at an edge that is seen on one side only.
    labels = np.zeros((60, 90), np.uint8)
    labels[:, 41:] = 1
    image = np.repeat(labels[..., None] * 255, 3, axis=2).astype(np.uint8)
    config = DataConfig(crop=(20, 400), scale=scale)
    shifts = []
    for position in range(120):
        window = draw_window(generator(5, position, Purpose.CROP), 60, 90, config)
        image_out, mask_out = place(window, image, labels, config.crop)
        shown = mask_out[0] != IGNORE_LABEL
        assert (mask_out[:, shown] == mask_out[0, shown]).all() or window.size[0] < 20
        row = window.offset[0]
        white = image_out[row, :, 0][mask_out[row] != IGNORE_LABEL].sum() / 255
        shifts.append(white - np.count_nonzero(mask_out[row] == 1))
    assert np.abs(shifts).max() <= 1.0
    assert abs(np.mean(shifts)) < 0.15


def test_a_window_is_a_value_that_cannot_be_changed() -> None:
    window = CropWindow((slice(0, 1), slice(0, 1)), (1, 1), (0, 0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        window.size = (2, 2)  # type: ignore[misc]
