"""What a scenes folder may hold, and what is refused by name before anything is written."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from conftest import MakeScenes
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from fcn_dist.data.packing.run import pack
from fcn_dist.data.scenes.class_info import read_classes, read_colours
from fcn_dist.data.scenes.listing import find_pairs, sample_key
from fcn_dist.errors import UserError
from fcn_dist.palette import palette

IMAGE, MASK = "images/training/training_0001.jpg", "annotations/training/training_0001.png"


def refusal(scenes: Path, **options: object) -> str:
    """The message with which packing refuses `scenes`; asserts that it wrote neither a set nor a shard with damage.

    All damage that these tests do is in the training split, which is one shard.
    """
    out = scenes.parent / f"out-{scenes.name}"
    with pytest.raises(UserError) as caught:
        pack(scenes, out, workers=1, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert not [*out.rglob("index.json"), *out.rglob("*.partial"), *out.rglob("training-*")]
    if "1 of 2 shards are finished and kept" in message:
        assert len([*out.rglob("validation-000000.*")]) == 3, "tar, member records, receipt"
    else:
        assert not out.exists()
    return message


def save_png(path: Path, array: NDArray[np.uint8], mode: str | None = None) -> None:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


def test_pairs_are_found_by_their_stems_in_the_order_of_their_names(make_scenes: MakeScenes) -> None:
    pairs, problems = find_pairs(make_scenes(n=3), "training")
    assert [pair.key for pair in pairs] == ["training_0000", "training_0001", "training_0002"]
    assert all(pair.image.path.stem == pair.mask.path.stem == pair.key for pair in pairs)
    assert not problems


def test_keys_hold_no_dot_and_differ_where_stems_differ() -> None:
    stems = ["a.b", "a%2Eb", "a%b", "ab", "ä.ö"]
    keys = [sample_key(stem) for stem in stems]
    assert not any("." in key for key in keys)
    assert len(set(keys)) == len(stems)
    assert keys[:3] == ["a%2Eb", "a%252Eb", "a%25b"]


def test_suffixes_count_in_any_case_and_hidden_files_are_ignored(make_scenes: MakeScenes) -> None:
    scenes = make_scenes(n=3)
    folder = scenes / "images" / "training"
    (folder / "training_0000.jpg").rename(folder / "training_0000.JPG")
    (folder / "training_0001.jpg").rename(folder / "training_0001.Jpeg")
    (folder / ".DS_Store").write_text("x")
    pairs, problems = find_pairs(scenes, "training")
    assert len(pairs) == 3
    assert not problems


def _truncate(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def _progressive_then_truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG", progressive=True)
    _truncate(path, 0.9)


def _flip_byte_in_pixel_data(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 12] ^= 0x10
    path.write_bytes(bytes(data))


def _label_six(path: Path) -> None:
    labels = np.asarray(Image.open(path)).copy()
    labels[:2, :3] = 6
    save_png(path, labels)


def _sixteen_bit_label(path: Path) -> None:
    Image.fromarray(np.full((24, 32), 300, np.uint16)).save(path)


def _gray_jpeg(path: Path) -> None:
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(path, "JPEG")


def _half_transparent(path: Path) -> None:
    Image.fromarray(np.full((24, 32, 4), 128, np.uint8)).save(path, "PNG")


def _animated(path: Path) -> None:
    frames = [Image.fromarray(np.full((24, 32, 3), i, np.uint8)) for i in (0, 200)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (MASK, Path.unlink, ["image without mask", "annotations/training/training_0001.png"]),
        (IMAGE, Path.unlink, ["mask without image", "images/training/training_0001.jpg"]),
        (MASK, lambda p: save_png(p, np.zeros((32, 24), np.uint8)), ["size mismatch", "32x24", "24x32"]),
        (MASK, _label_six, ["label above 5", "label 6 (6 pixels"]),
        (MASK, _sixteen_bit_label, ["label above 5", "label 300"]),
        (MASK, lambda p: save_png(p, np.zeros((24, 32, 3), np.uint8)), ["mask in colour", "RGB"]),
        (MASK, lambda p: save_png(p, np.zeros((24, 32, 4), np.uint8)), ["mask in colour", "RGBA"]),
        (MASK, _gray_jpeg, ["mask that is no PNG", "JPEG"]),
        (MASK, lambda p: _truncate(p, 0.6), ["undecodable or truncated"]),
        (MASK, lambda p: p.write_bytes(p.read_bytes()[:-12]), ["undecodable or truncated"]),
        (MASK, _flip_byte_in_pixel_data, ["undecodable or truncated"]),
        (MASK, lambda p: p.write_bytes(b""), ["undecodable or truncated"]),
        (IMAGE, lambda p: _truncate(p, 0.9), ["undecodable or truncated"]),
        (IMAGE, _progressive_then_truncated, ["undecodable or truncated"]),
        (IMAGE, lambda p: p.write_text("<html>not found</html>"), ["undecodable or truncated"]),
        (IMAGE, _half_transparent, ["transparent image"]),
        (IMAGE, _animated, ["several frames"]),
        (IMAGE, lambda p: shutil.copy(p, p.with_suffix(".jpeg")), ["two files for one sample", ".jpeg"]),
        (IMAGE, lambda p: shutil.copy(p, p.with_suffix(".JPG")), ["two files for one sample"]),
        (IMAGE, lambda p: p.with_suffix(".txt").write_text(""), ["foreign file", "training_0001.txt"]),
        (MASK, lambda p: (p.parent / "more").mkdir(), ["foreign file or folder", "annotations/training/more"]),
        (IMAGE, lambda p: p.with_name("broken.jpg").symlink_to("nowhere"), ["foreign file", "broken.jpg"]),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(
    make_scenes: MakeScenes, file: str, damage: Callable[[Path], object], words: list[str]
) -> None:
    scenes = make_scenes()
    damage(scenes / file)
    message = refusal(scenes)
    assert all(word in message for word in words), message
    assert message.startswith(str(scenes))
    assert "; 1 problem" in message, message


def test_all_problems_come_out_in_one_run(make_scenes: MakeScenes) -> None:
    scenes = make_scenes(n=14)
    for number in range(12):
        _truncate(scenes / f"images/training/training_{number:04d}.jpg", 0.5)
    _label_six(scenes / "annotations/training/training_0000.png")
    (scenes / "annotations/validation/validation_0000.png").unlink()
    message = refusal(scenes)
    for word in ("14 problems", "12 x undecodable", "1 x label above 5", "1 x image without mask", "and 4 more"):
        assert word in message, message


def test_a_picture_with_too_many_pixels_is_refused_from_its_header(make_scenes: MakeScenes) -> None:
    scenes = make_scenes()
    huge = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(huge, "PNG")
    data = bytearray(huge.getvalue())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = crc32(data[12:29]).to_bytes(4, "big")
    (scenes / IMAGE).write_bytes(bytes(data))
    message = refusal(scenes)
    assert "60000x60000 are 3600000000, at most 67108864" in message
    assert "too many pixels" in refusal(make_scenes(name="small"), max_pixels=24 * 32 - 1)


def test_the_pixel_cap_can_be_raised_above_pillows_own(
    make_scenes: MakeScenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    scenes = make_scenes(n=1)
    assert len(pack(scenes, scenes.parent / "out", workers=1)) == 2
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize(
    ("remove", "words"),
    [
        ("images", ["no folder 'images'", "annotations/SPLIT"]),
        ("annotations", ["no folder 'annotations'"]),
        ("images/validation", ["no split 'validation'", "it has training"]),
        ("annotations/training", ["no split 'training'", "it has validation"]),
    ],
)
def test_a_missing_folder_is_named_with_those_that_are_there(
    make_scenes: MakeScenes, remove: str, words: list[str]
) -> None:
    scenes = make_scenes()
    shutil.rmtree(scenes / remove)
    message = refusal(scenes)
    assert all(word in message for word in words), message


def test_an_empty_split_is_refused(make_scenes: MakeScenes) -> None:
    assert "are empty" in refusal(make_scenes(n=0))


def test_a_split_that_is_no_folders_name_is_refused(make_scenes: MakeScenes) -> None:
    for split in ("../training", "", ".", "a/b"):
        assert "no folder's name" in refusal(make_scenes(name=f"s{len(split)}"), splits=(split,))


def test_classes_are_read_with_their_commas_and_semicolons(tmp_path: Path) -> None:
    text = "\ufeffIdx\tRatio\tTrain\tVal\tName\r\n2\t0.1\t1\t1\tscreen;crt, tube\r\n\r\n1\t0.2\t1\t1\twall\r\n"
    (tmp_path / "objectInfo150.txt").write_bytes(text.encode())
    assert read_classes(tmp_path) == ("wall", "screen;crt, tube")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no objectInfo file", "tab-separated"]),
        ("", ["no classes"]),
        ("Idx\tRatio\tTrain\tVal\tName\n", ["no classes"]),
        ("1 0.1 10 1 wall\n", ["line 1", "5 tab-separated columns"]),
        ("one\t0.1\t1\t1\twall\n", ["line 1", "whole number"]),
        ("1\t0.1\t1\t1\t\n", ["line 1"]),
        ("1\t0.1\t1\t1\ta\n1\t0.1\t1\t1\tb\n", ["line 2", "index 1", "twice"]),
        ("1\t0.1\t1\t1\ta\n3\t0.1\t1\t1\tb\n", ["2 classes with indices such as 3"]),
        ("0\t0.1\t1\t1\ta\n1\t0.1\t1\t1\tb\n", ["indices such as 0"]),
        ("".join(f"{i}\t0\t1\t1\tc\n" for i in range(1, 257)), ["256 classes", "8-bit"]),
    ],
)
def test_an_object_info_that_makes_no_sense_is_refused(tmp_path: Path, text: str | None, words: list[str]) -> None:
    if text is not None:
        (tmp_path / "objectInfo150.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        read_classes(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value


def test_colours_come_from_the_matlab_file_only_if_it_fits(tmp_path: Path) -> None:
    assert read_colours(tmp_path, 3) == palette(3)
    savemat(tmp_path / "color150.mat", {"colors": np.array([[1, 2, 3], [4, 5, 6]], np.uint8)})
    assert read_colours(tmp_path, 2) == ((1, 2, 3), (4, 5, 6))
    assert read_colours(tmp_path, 3) == palette(3)
    (tmp_path / "color150.mat").write_text("garbage")
    with pytest.raises(UserError, match=r"color150\.mat cannot be read"):
        read_colours(tmp_path, 3)


def test_palette_colours_are_distinct_and_never_black() -> None:
    colours = palette(254)
    assert len(set(colours)) == 254
    assert all(max(colour) >= 80 for colour in colours)
    assert colours[:20] == palette(20)
    neighbours = np.array(palette(40), int)
    assert np.abs(np.diff(neighbours, axis=0)).sum(1).min() > 60
