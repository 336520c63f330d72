"""One image and one mask to what is packed of them: what is converted, and that nothing is lost by it."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import HEIGHT, WIDTH, MakeScenes, pixels, save_oriented, smooth
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from fcn_dist.data.packing.run import pack
from fcn_dist.data.scenes.images import ORIENTATION_TAG


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def pack_one(
    scenes: Path, out: Path, image: Callable[[Path], object] | None = None, mask: Callable[[Path], object] | None = None
) -> tuple[bytes, bytes, list[str]]:
    """Rewrite the one training scene, pack, and return image, mask and the conversions' kinds."""
    if image:
        image(scenes / "images/training/training_0000.jpg")
    if mask:
        mask(scenes / "annotations/training/training_0000.png")
    (shard_set,) = pack(scenes, out, ("training",), workers=1)
    conversions = shard_set.created_by["conversions"]
    assert all(c == {"count": 1, "keys": ["training_0000"]} for c in conversions.values())
    sample = shard_set.read(0)
    assert Image.open(io.BytesIO(sample.image)).mode == "RGB"
    assert Image.open(io.BytesIO(sample.mask)).mode == "L"
    return sample.image, sample.mask, list(conversions)


@pytest.mark.parametrize("quality", [10, 75, 98])
def test_a_grayscale_jpeg_becomes_rgb_with_the_same_pixels(make_scenes: MakeScenes, out: Path, quality: int) -> None:
    # Hard edges between black and white: the values that rounding and clipping move most.
    rng = np.random.default_rng(quality)
    gray = np.kron(rng.integers(0, 2, (6, 8), np.uint8) * 255, np.ones((4, 4), np.uint8))
    before = []

    def save(path: Path) -> None:
        Image.fromarray(gray).save(path, "JPEG", quality=quality)
        before.append(pixels(path).astype(int))

    image, _, kinds = pack_one(make_scenes(n=1), out, save)
    assert kinds == ["grayscale JPEG to RGB"]
    assert np.abs(pixels(image) - before[0][..., None]).max() <= 2


def test_a_cmyk_jpeg_becomes_rgb_as_pillow_shows_it(make_scenes: MakeScenes, out: Path) -> None:
    cmyk = Image.fromarray(smooth()).convert("CMYK")
    image, _, kinds = pack_one(make_scenes(n=1), out, lambda path: cmyk.save(path, "JPEG", quality=95))
    assert kinds == ["CMYK JPEG to RGB"]
    assert np.abs(pixels(image).astype(int) - smooth()).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "I;16", "RGBA"])
def test_a_png_named_jpg_becomes_a_jpeg_of_high_quality(make_scenes: MakeScenes, out: Path, mode: str) -> None:
    gray = smooth()[..., 1]
    picture = Image.fromarray(gray)
    if mode == "I;16":
        picture = Image.fromarray(gray.astype(np.uint16) * 257)
    elif mode == "P":
        picture = picture.convert("P")
        picture.putpalette([level for level in range(256) for _ in "RGB"])
    else:
        picture = picture.convert(mode)
    image, _, kinds = pack_one(make_scenes(n=1), out, lambda path: picture.save(path, "PNG"))
    assert kinds == ["16-bit image to 8-bit"] * (mode == "I;16") + ["PNG in a .jpg to JPEG"]
    assert np.abs(pixels(image).astype(int) - gray[..., None]).mean() < 2
    packed = Image.open(io.BytesIO(image))
    assert packed.format == "JPEG"
    assert {component[1:3] for component in packed.layer} == {(1, 1)}, "4:4:4"  # type: ignore[attr-defined]


def test_sixteen_bit_rgb_becomes_eight_bit(make_scenes: MakeScenes, out: Path) -> None:
    def save(path: Path) -> None:
        ok, png = cv2.imencode(".png", smooth()[..., ::-1].astype(np.uint16) * 257)
        assert ok
        path.write_bytes(png.tobytes())

    image, _, kinds = pack_one(make_scenes(n=1), out, save)
    assert kinds == ["16-bit image to 8-bit", "PNG in a .jpg to JPEG"]
    assert np.abs(pixels(image).astype(int) - smooth()).mean() < 2


# How a viewer shows what is stored under each EXIF orientation.
UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_is_turned_as_a_person_sees_it_if_the_mask_fits(
    make_scenes: MakeScenes, out: Path, orientation: int, form: str
) -> None:
    sideways = orientation >= 5
    stored = smooth(*((WIDTH, HEIGHT) if sideways else (HEIGHT, WIDTH)))
    image, _, kinds = pack_one(make_scenes(n=1), out, lambda path: save_oriented(path, stored, orientation, form))
    assert "turned upright by its orientation tag" in kinds
    assert np.abs(pixels(image).astype(int) - UPRIGHT[orientation](stored)).mean() < 2
    assert Image.open(io.BytesIO(image)).getexif().get(ORIENTATION_TAG, 1) == 1


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_image_annotated_unturned_keeps_its_pixels_and_loses_its_tag(
    make_scenes: MakeScenes, out: Path, orientation: int
) -> None:
    scenes = make_scenes(n=1)
    path = scenes / "images/training/training_0000.jpg"
    image, _, kinds = pack_one(scenes, out, lambda path: save_oriented(path, smooth(), orientation))
    assert kinds == ["orientation tag dropped"]
    assert np.array_equal(pixels(image), pixels(path))
    assert Image.open(io.BytesIO(image)).getexif().get(ORIENTATION_TAG, 1) == 1


def test_a_gray_image_turned_by_its_tag_comes_out_turned_and_rgb(make_scenes: MakeScenes, out: Path) -> None:
    stored = smooth(WIDTH, HEIGHT)[..., 0]
    image, _, kinds = pack_one(make_scenes(n=1), out, lambda path: save_oriented(path, stored, 6))
    assert kinds == ["grayscale JPEG to RGB", "turned upright by its orientation tag"]
    assert np.abs(pixels(image)[..., 0].astype(int) - np.rot90(stored, -1)).mean() < 2


def labels(highest: int = 5) -> NDArray[np.uint8]:
    return (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) // 7 % (highest + 1)).astype(np.uint8)


def _palette_mask(path: Path) -> None:
    picture = Image.fromarray(labels()).convert("L")
    picture.putpalette([255 - i // 3 for i in range(768)])
    assert picture.mode == "P"
    picture.save(path)


def _bits_mask(bits: int) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        # Pillow writes small gray depths only through its encoder option; raw samples are packed by hand.
        rows = labels(min(5, 2**bits - 1))
        packed = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes() for row in rows]
        write_png(path, bits, 0, b"".join(b"\0" + row for row in packed))

    return save


def write_png(path: Path, bits: int, colour_type: int, raw: bytes, interlace: int = 0) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, colour_type, 0, 0, interlace)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _interlaced_mask(path: Path) -> None:
    # Adam7: https://www.w3.org/TR/png-3/#8Interlace
    raw = b""
    for x, y, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        raw += b"".join(b"\0" + row.tobytes() for row in labels()[y::dy, x::dx])
    write_png(path, 8, 0, raw, interlace=1)


def _oriented_mask(path: Path) -> None:
    save_oriented(path, labels(), 3, "PNG")


@pytest.mark.parametrize(
    ("save", "highest", "kind"),
    [
        (_palette_mask, 5, "palette mask to its indices"),
        (_bits_mask(1), 1, "1-bit mask to 8-bit"),
        (_bits_mask(2), 3, "2-bit mask to 8-bit"),
        (_bits_mask(4), 5, "4-bit mask to 8-bit"),
        (lambda path: Image.fromarray(labels().astype(np.uint16)).save(path), 5, "16-bit mask to 8-bit"),
        (_interlaced_mask, 5, "interlaced mask to plain"),
        (lambda path: Image.fromarray(labels()).save(path, transparency=0), 5, "mask without its transparency"),
        (
            lambda path: Image.fromarray(np.stack([labels(), 255 - labels()], -1), "LA").save(path),
            5,
            "mask without its transparency",
        ),
        (_oriented_mask, 5, "mask without its orientation tag"),
    ],
)
def test_masks_of_other_forms_keep_every_label(
    make_scenes: MakeScenes, out: Path, save: Callable[[Path], object], highest: int, kind: str
) -> None:
    _, mask, kinds = pack_one(make_scenes(n=1), out, None, save)
    assert kinds == [kind]
    assert np.array_equal(pixels(mask), labels(highest))
    packed = Image.open(io.BytesIO(mask))
    assert isinstance(packed, PngImagePlugin.PngImageFile)
    assert "transparency" not in packed.info
    assert not packed.info.get("interlace")
    assert packed.getexif().get(ORIENTATION_TAG, 1) == 1


def test_scenes_are_shrunk_to_a_short_side_and_smaller_ones_are_kept(make_scenes: MakeScenes, out: Path) -> None:
    scenes = make_scenes(n=2, size=(60, 91))
    small = scenes / "images/training/training_0000.jpg"
    Image.fromarray(smooth(30, 50)).save(small)
    Image.fromarray(np.full((30, 50), 2, np.uint8)).save(scenes / "annotations/training/training_0000.png")
    shard_set, _ = pack(scenes, out, workers=1, short_side=40, keep_order=True)
    kept, shrunk = shard_set.read(0), shard_set.read(1)
    assert kept.image == small.read_bytes()
    assert pixels(shrunk.image).shape == (40, 61, 3)
    whole = pixels(scenes / "annotations/training/training_0001.png")
    rows, columns = ((np.arange(n) + 0.5) * size / n for n, size in ((40, 60), (61, 91)))
    assert np.array_equal(pixels(shrunk.mask), whole[rows.astype(int)[:, None], columns.astype(int)])
    assert shard_set.created_by["options"]["short_side"] == 40
    assert shard_set.created_by["conversions"]["shrunk to a short side of 40"]["keys"] == ["training_0001"]
