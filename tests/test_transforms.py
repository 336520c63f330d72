"""Decoding, windows and resizing: image and mask stay together, and draws are keyed by (seed, position)."""

import dataclasses
import struct
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from colour_scenes import away_from_edges, labels_of, render
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from fcn_dist.config import DataConfig
from fcn_dist.data.headers import jpeg_size, png_size
from fcn_dist.data.shard import DamagedSample, Sample
from fcn_dist.data.transforms import CropWindow, check_size, crop_into, decode, draw_window, generator
from fcn_dist.keys import Purpose, key64
from fcn_dist.labels import IGNORE_LABEL

Pixels = NDArray[np.uint8]


def encode(suffix: str, array: Pixels) -> bytes:
    return bytes(cv2.imencode(suffix, array)[1])


def shrunk(image: Pixels, reduction: int) -> Pixels:
    """Means of squares of `reduction` pixels: what a decoder that shrinks comes close to."""
    rows, columns = (-(-length // reduction) for length in image.shape[:2])
    padding = [(0, rows * reduction - image.shape[0]), (0, columns * reduction - image.shape[1]), (0, 0)]
    squares = np.pad(image, padding, mode="edge").reshape(rows, reduction, columns, reduction, 3)
    return np.asarray(np.rint(squares.mean((1, 3))), np.uint8)


def place(window: CropWindow, image: Pixels, mask: Pixels, crop: tuple[int, int]) -> tuple[Pixels, Pixels]:
    image_out, mask_out = np.full((*crop, 3), 77, np.uint8), np.full(crop, IGNORE_LABEL, np.uint8)
    crop_into(window, shrunk(image, window.reduction), mask, image_out, mask_out)
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
    with pytest.raises(DamagedSample, match=r"sample 'street\.7': it decodes to"):
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
    assert config.scale
    for axis, length in enumerate((height, width)):
        least = min(config.crop[axis], max(1, round(length * config.scale[0] - 1)))
        most = min(config.crop[axis], round(length * config.scale[1]) + 1)
        assert least <= window.size[axis] <= most


@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 70), st.integers(1, 70), st.integers(0, 10**6))
@settings(max_examples=100)
def test_without_factors_the_crop_shows_all_of_any_scene(
    height: int, width: int, rows: int, columns: int, position: int
) -> None:
    config = DataConfig(crop=(rows, columns), scale=None)
    window = draw_window(generator(0, position, Purpose.CROP), height, width, config)
    assert window.source == (slice(0, height), slice(0, width))
    assert (window.size, window.offset) == ((rows, columns), (0, 0))
    factor = max(rows / height, columns / width)
    assert window.reduction == (4 if factor <= 1 / 8 else 2 if factor <= 1 / 4 else 1)
    image, mask = np.full((height, width, 3), 200, np.uint8), np.zeros((height, width), np.uint8)
    image_out, mask_out = place(window, image, mask, config.crop)
    assert (image_out == 200).all() and (mask_out == 0).all()


def test_scenes_that_are_squashed_are_mirrored_as_often_as_others() -> None:
    config = DataConfig(crop=(8, 8), scale=None, flip=0.25)
    mirrored = [draw_window(generator(0, p, Purpose.CROP), 20, 30, config).mirrored for p in range(2000)]
    assert 0.2 < np.mean(mirrored) < 0.3


def test_the_nearest_pixel_is_one_of_the_image_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    mask = np.zeros((90, 70), np.uint8)
    for config in (DataConfig(crop=(10, 9), scale=None, interpolation="nearest"), DataConfig(crop=(10, 9), scale=None)):
        window = draw_window(generator(0, 0, Purpose.CROP), 90, 70, config)
        out, mask_out = np.zeros((10, 9, 3), np.uint8), np.zeros((10, 9), np.uint8)
        crop_into(window, shrunk(image, window.reduction), mask, out, mask_out, config.interpolation)
        known = {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()}
        picked = sum(tuple(pixel) in known for pixel in out.reshape(-1, 3).tolist())
        assert (picked == 90) == (config.interpolation == "nearest"), picked


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
    config = DataConfig(crop=(16, 20), scale=(1.0, 1.0), flip=0)
    for position in range(30):
        window = draw_window(generator(1, position, Purpose.CROP), 40, 50, config)
        image_out, mask_out = place(window, image, mask, config.crop)
        assert window.reduction == 1
        assert (image_out == image[window.source]).all()
        assert (mask_out == mask[window.source]).all()


@pytest.mark.parametrize("scale", [(0.1, 0.13), (0.26, 0.4), (0.4, 0.6), (0.9, 1.1), (1.7, 2.5)])
def test_image_and_mask_agree_pixel_by_pixel_away_from_edges(scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(3)
    labels = cv2.resize(rng.integers(0, 5, (4, 5), np.uint8), (150, 120), interpolation=cv2.INTER_NEAREST)
    image = render(labels, scene=3)
    labels = np.repeat(np.repeat(labels, 4, 0), 4, 1) if scale[1] < 0.5 else labels
    image = np.repeat(np.repeat(image, 4, 0), 4, 1) if scale[1] < 0.5 else image
    config = DataConfig(crop=(64, 72), scale=scale)
    compared = 0
    for position in range(60):
        window = draw_window(generator(2, position, Purpose.CROP), labels.shape[0], labels.shape[1], config)
        image_out, mask_out = place(window, image, labels, config.crop)
        sure = away_from_edges(mask_out, 2) & (mask_out != IGNORE_LABEL)
        assert (labels_of(image_out)[sure] == mask_out[sure]).all()
        compared += int(sure.sum())
    assert compared > 60 * 1000


@pytest.mark.parametrize("scale", [(0.2, 0.24), (0.5, 0.6), (0.99, 1.01), (1.5, 2.0), (3.0, 4.0)])
def test_an_edge_lies_at_the_same_place_in_image_and_mask_on_average(scale: tuple[float, float]) -> None:
    # White where the mask is 1: the white area of the image is that of the mask unless one is shifted against the
    # other. Half a pixel would be a difference of half a pixel's width at an edge that is seen on one side only.
    config = DataConfig(crop=(20, 400), scale=scale)
    shifts = []
    for position in range(160):
        # At several places: at one, the nearest label's rounding is the same every time.
        labels = np.zeros((60, 90), np.uint8)
        labels[:, 37 + position % 8 :] = 1
        image = np.repeat(labels[..., None] * 255, 3, axis=2).astype(np.uint8)
        window = draw_window(generator(5, position, Purpose.CROP), 60, 90, config)
        image_out, mask_out = place(window, image, labels, config.crop)
        shown = mask_out[0] != IGNORE_LABEL
        assert (mask_out[:, shown] == mask_out[0, shown]).all() or window.size[0] < 20
        row = window.offset[0]
        white = image_out[row, :, 0][mask_out[row] != IGNORE_LABEL].sum() / 255
        shifts.append(white - np.count_nonzero(mask_out[row] == 1))
    assert np.abs(shifts).max() <= 1.0
    assert abs(np.mean(shifts)) < 0.15


# ---- decoding at a smaller size


@pytest.mark.parametrize(
    ("factor", "reduction"), [(2.0, 1), (0.251, 1), (0.249, 2), (0.126, 2), (0.1249, 4), (0.01, 4)]
)
def test_an_image_is_decoded_no_smaller_than_the_crop_shows_it(factor: float, reduction: int) -> None:
    config = DataConfig(crop=(30, 40), scale=(factor, factor))
    for position in range(20):
        window = draw_window(generator(0, position, Purpose.CROP), 403, 599, config)
        assert window.reduction == reduction
        for source, reduced, size in zip(window.source, window.reduced_source, window.size, strict=True):
            assert source.start % reduction == 0 and (source.stop % reduction == 0 or source.stop in (403, 599))
            assert reduced == slice(source.start // reduction, -(-source.stop // reduction))
            assert reduction == 1 or reduced.stop - reduced.start >= 2 * size - 1


def full_and_reduced(jpeg: bytes, mask: bytes, window: CropWindow, crop: tuple[int, int]) -> tuple[Pixels, Pixels]:
    """The crop from the image decoded whole, and from the one decoded at 1/`window.reduction`; padding is black."""
    outs = []
    for reduction in (1, window.reduction):
        image, labels = decode(Sample("a", jpeg, mask), reduction)
        out, mask_out = np.zeros((*crop, 3), np.uint8), np.zeros(crop, np.uint8)
        crop_into(dataclasses.replace(window, reduction=reduction), image, labels, out, mask_out)
        outs.append(out)
    return outs[0], outs[1]


# How far a crop decoded at a smaller size may be from one decoded whole and averaged, in levels of 255: on average, and
# for 99 of 100 values. Larger ones lie where the image has sharp edges between saturated colours.
MEAN_BOUND, MOST_BOUND = 3, 18


def test_crops_from_smaller_decoding_are_within_the_stated_bound() -> None:
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (24, 32, 3), np.uint8)
    image = cv2.resize(coarse, (643, 487), interpolation=cv2.INTER_CUBIC)
    jpeg, mask = encode(".jpg", np.asarray(image, np.uint8)), encode(".png", np.zeros((487, 643), np.uint8))
    assert_within_bound(jpeg, mask, (487, 643))


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["ade20k", "camvid"])
def test_crops_of_real_scenes_from_smaller_decoding_are_within_the_stated_bound(shared_data: Path, name: str) -> None:
    paths = sorted((shared_data / name / "images" / "validation").glob("*.jpg"))[:12]
    assert paths
    for path in paths:
        mask = (shared_data / name / "annotations" / "validation" / f"{path.stem}.png").read_bytes()
        size = png_size(mask)
        assert size
        assert_within_bound(path.read_bytes(), mask, size)


def assert_within_bound(jpeg: bytes, mask: bytes, size: tuple[int, int]) -> None:
    crop = (64, 64)
    for factor, reduction in ((0.24, 2), (0.2, 2), (0.12, 4), (0.1, 4)):
        config = DataConfig(crop=crop, scale=(factor, factor))
        for position in range(4):
            window = draw_window(generator(7, position, Purpose.CROP), *size, config)
            assert window.reduction == reduction
            full, reduced = full_and_reduced(jpeg, mask, window, crop)
            difference = np.abs(full.astype(int) - reduced)
            assert difference.mean() <= MEAN_BOUND
            assert np.quantile(difference, 0.99) <= MOST_BOUND


# ---- sizes are known before anything is decoded


@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_headers_state_the_size_that_a_decoder_finds(height: int, width: int, progressive: bool, exif: bool) -> None:
    picture = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    tags = Image.Exif()
    tags[0x010E] = "a description of some length" * 20
    jpeg, png = BytesIO(), BytesIO()
    picture.save(jpeg, "JPEG", progressive=progressive, exif=tags if exif else Image.Exif())
    picture.convert("L").save(png, "PNG")
    assert jpeg_size(jpeg.getvalue()) == png_size(png.getvalue()) == (height, width)


def test_tables_that_stand_before_the_frame_are_no_frame() -> None:
    jpeg = encode(".jpg", np.zeros((24, 40, 3), np.uint8))
    frame, tables = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xc4")
    scan = jpeg.index(b"\xff\xda")
    assert frame < tables < scan
    # Huffman tables may stand anywhere before the scan; their marker lies among those of frames.
    moved = jpeg[:frame] + jpeg[tables:scan] + jpeg[frame:tables] + jpeg[scan:]
    assert decode(Sample("a", moved, encode(".png", np.zeros((24, 40), np.uint8))))[0].shape == (24, 40, 3)
    assert jpeg_size(moved) == (24, 40)


@given(st.binary(max_size=60), st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"]))
@settings(max_examples=200)
def test_headers_of_garbage_state_no_size_or_some_size_and_end(tail: bytes, start: bytes) -> None:
    for size in (jpeg_size(start + tail), png_size(start + tail)):
        assert size is None or len(size) == 2
    assert png_size(tail) is None and jpeg_size(tail) is None


def bomb_png(side: int) -> bytes:
    """A PNG whose header states side x side pixels, and which has none."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb_jpeg(side: int) -> bytes:
    """A small JPEG whose header states side x side pixels."""
    jpeg = bytearray(encode(".jpg", np.zeros((16, 16, 3), np.uint8)))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(jpeg)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (Sample("a", bomb_jpeg(60_000), encode(".png", np.zeros((16, 16), np.uint8))), "image states 60000x60000"),
        (Sample("a", encode(".jpg", np.zeros((16, 16, 3), np.uint8)), bomb_png(60_000)), "mask states 60000x60000"),
        (Sample("a", b"no jpeg", encode(".png", np.zeros((16, 16), np.uint8))), "image states no size"),
    ],
)
def test_a_bomb_is_refused_by_its_header_before_it_is_decoded(sample: Sample, words: str) -> None:
    with pytest.raises(DamagedSample, match=words):
        check_size(sample, (16, 16), 1 << 20)


def test_a_record_of_more_pixels_than_its_set_has_is_refused() -> None:
    sample = Sample("a", bomb_jpeg(60_000), bomb_png(60_000))
    with pytest.raises(DamagedSample, match="recorded with 60000x60000 pixels, more than the 1048576"):
        check_size(sample, (60_000, 60_000), 1 << 20)


# ---- mirroring


def test_a_mirrored_crop_is_the_same_crop_left_to_right_image_mask_and_padding_alike() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (40, 50, 3), np.uint8), rng.integers(0, 5, (40, 50), np.uint8)
    config = DataConfig(crop=(48, 44), scale=(0.6, 1.2), flip=1.0)
    for position in range(20):
        window = draw_window(generator(1, position, Purpose.CROP), 40, 50, config)
        assert window.mirrored
        image_out, mask_out = place(window, image, mask, config.crop)
        plain_image, plain_mask = place(dataclasses.replace(window, mirrored=False), image, mask, config.crop)
        assert (image_out == plain_image[:, ::-1]).all() and (mask_out == plain_mask[:, ::-1]).all()


def test_as_many_are_mirrored_as_the_setting_says_whatever_else_is_drawn() -> None:
    config = DataConfig(crop=(40, 50), scale=(0.5, 2.0), flip=0.25)
    windows = [draw_window(generator(0, p, Purpose.CROP), 100, 100, config) for p in range(2000)]
    mirrored = np.array([window.mirrored for window in windows])
    assert 0.22 < mirrored.mean() < 0.28
    starts = np.array([window.source[1].start for window in windows])
    assert abs(np.corrcoef(mirrored, starts)[0, 1]) < 0.08
    never = [
        draw_window(generator(0, p, Purpose.CROP), 100, 100, dataclasses.replace(config, flip=0)) for p in range(99)
    ]
    assert not any(window.mirrored for window in never)


def test_a_window_is_a_value_that_cannot_be_changed() -> None:
    window = CropWindow((slice(0, 1), slice(0, 1)), (1, 1), (0, 0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        window.size = (2, 2)  # type: ignore[misc]
