"""Damaged image files: what Pillow decodes in full or refuses is the oracle for what packing takes."""

import io
from collections.abc import Callable, Iterator
from zlib import crc32

import cv2
import numpy as np
import pytest
from conftest import smooth
from numpy.typing import NDArray
from PIL import Image

from fcn_dist.data.scenes.images import ORIENTATION_TAG, FileProblem, read_image
from fcn_dist.data.scenes.masks import read_mask
from fcn_dist.data.scenes.wholeness import is_whole_jpeg, plain_mask_size
from fcn_dist.data.shard import Sample
from fcn_dist.data.transforms import decode

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of odd metadata
PIXELS = 2**16


def jpeg(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smooth(40, 56)).save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def oriented(jpeg_bytes: bytes) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 3
    Image.open(io.BytesIO(jpeg_bytes)).save(buffer, "JPEG", exif=exif, comment=b"taken\xff\xd9here")
    return buffer.getvalue()


JPEGS = {
    "4:2:0": jpeg(),
    "4:4:4": jpeg(subsampling=0),
    "progressive": jpeg(progressive=True),
    "restarts": jpeg(restart_marker_blocks=2),
    "tagged": oriented(jpeg()),
}


def labels() -> NDArray[np.uint8]:
    return (np.arange(40 * 56).reshape(40, 56) // 7 % 6).astype(np.uint8)


def png(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(labels()).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each chunk of a PNG, its checksum included."""
    start = 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield start, end
        start = end


def resealed(data: bytes) -> bytes:
    """The same PNG with checksums that fit, as a broken encoder would write it."""
    sealed = bytearray(data)
    for start, end in chunks(data):
        if end <= len(data):
            sealed[end - 4 : end] = crc32(data[start + 4 : end - 4]).to_bytes(4, "big")
    return bytes(sealed)


PNGS = {"plain": png(), "stored": png(compress_level=0), "dated": png(dpi=(72, 72))}


def damaged(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`count` files that differ from `data`: cut, flipped, overwritten, with a piece lost, doubled or moved."""
    rng = np.random.default_rng(seed)
    kinds: list[Callable[[int, int, bytes], bytes]] = [
        lambda a, b, n: data[:a],
        lambda a, b, n: data[:a] + data[-2:],  # an end is there all the same
        lambda a, b, n: data[:a] + bytes([data[a] ^ 1 << n[0] % 8]) + data[a + 1 :],
        lambda a, b, n: data[:a] + n + data[a + len(n) :],
        lambda a, b, n: data[:a] + b"\xff" + n[:1] + data[a + 2 :],
        lambda a, b, n: data[:a] + data[b:],
        lambda a, b, n: data[:b] + data[a:],
        lambda a, b, n: data[:-1] + bytes([data[-1] ^ n[0] | 1]),
        lambda a, b, n: data + n,
    ]
    for number in range(count):
        a, b = sorted(int(i) for i in rng.integers(2, len(data), 2))
        yield kinds[number % len(kinds)](a, b, rng.bytes(1 + number % 4))


def by_pillow(data: bytes, form: str) -> NDArray[np.uint8] | None:
    """The pixels of a file that Pillow decodes from start to end; None if it refuses it."""
    try:
        if form == "PNG":
            Image.open(io.BytesIO(data), formats=[form]).verify()
        picture = Image.open(io.BytesIO(data), formats=[form])
        if picture.width * picture.height > PIXELS:
            return None
        picture.load()
        return np.asarray(picture)
    except Exception:
        return None


@pytest.mark.parametrize("name", JPEGS)
def test_of_damaged_jpegs_only_those_are_taken_that_pillow_and_opencv_decode_alike(name: str) -> None:
    taken = 0
    for data in damaged(JPEGS[name], 1, 600):
        expected = by_pillow(data, "JPEG")
        try:
            read = read_image(data, PIXELS)
        except FileProblem:
            continue
        assert expected is not None, "Pillow refuses it"
        taken += 1
        if not read.conversions:
            assert read.decoded is not None
            assert np.array_equal(read.decoded, expected)
    assert taken > 50, "damage that shows in the pixels alone is not refused"


@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize("name", PNGS)
def test_of_damaged_masks_only_those_are_taken_that_pillow_and_opencv_decode_alike(name: str, seal: bool) -> None:
    taken = 0
    for damage in damaged(PNGS[name], 2, 600):
        data = resealed(damage) if seal else damage
        expected = by_pillow(data, "PNG")
        try:
            read = read_mask(data, 255, PIXELS)
        except FileProblem:
            continue
        assert expected is not None, "Pillow refuses it"
        taken += 1
        if not read.conversion:
            assert np.array_equal(read.labels, expected)
            image = cv2.imencode(".jpg", np.zeros((*read.size, 3), np.uint8))[1].tobytes()
            assert np.array_equal(read.labels, decode(Sample("key", image, data))[1])
    assert taken > (100 if seal else 10)


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_cut_anywhere_is_not_whole(name: str) -> None:
    data = JPEGS[name]
    assert is_whole_jpeg(data) and is_whole_jpeg(data + b"what follows")
    for length in range(len(data)):
        assert not is_whole_jpeg(data[:length])
        with pytest.raises(FileProblem):
            read_image(data[:length], PIXELS)


def test_a_mask_cut_anywhere_is_refused() -> None:
    data = PNGS["plain"]
    assert plain_mask_size(data) == (40, 56)
    for length in range(len(data)):
        assert plain_mask_size(data[:length]) is None
        with pytest.raises(FileProblem):
            read_mask(data[:length], 255, PIXELS)


def test_a_mask_with_anything_unusual_is_left_to_pillow() -> None:
    data = PNGS["plain"]
    for start, end in chunks(data):
        assert plain_mask_size(data[:start] + data[end:]) is None, "a chunk is missing"
        if data[start + 4 : start + 8] != b"IDAT":
            assert plain_mask_size(data[:end] + data[start:]) is None, "a chunk is there twice"
    assert plain_mask_size(data + b"x") is None
    assert plain_mask_size(png(dpi=(72, 72))) == (40, 56)
    for picture in (Image.fromarray(labels()).convert("P"), Image.fromarray(labels() > 2)):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        assert plain_mask_size(buffer.getvalue()) is None


def test_pictures_of_more_pixels_or_bytes_than_allowed_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    for read in (lambda data: read_image(data, 2239), lambda data: read_mask(data, 5, 2239)):
        for data in (JPEGS["4:2:0"], PNGS["plain"]):
            with pytest.raises(FileProblem) as caught:
                read(data)
            assert caught.value.kind == "too many pixels"
    with pytest.raises(FileProblem) as caught:
        read_image(JPEGS["4:2:0"] + bytes(2**24 + 8 * 2240), 2240)
    assert caught.value.kind == "file too large"
