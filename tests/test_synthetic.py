"""Synthetic scenes: what is rendered, and the folder it is written to."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from fcn_dist.commands.synthesize import main
from fcn_dist.data.scenes.class_info import read_classes, read_colours
from fcn_dist.data.synthetic import CLASSES, draw_scene, render
from fcn_dist.errors import UserError


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 scenes, small so that they are quick."""
    out = tmp_path_factory.mktemp("scenes") / "made" / "here"
    render(out, training=48, validation=12, size=(96, 120), seed=5)
    return out


def read(path: Path) -> NDArray[np.uint8]:
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert picture is not None, path
    assert picture.dtype == np.uint8
    return np.asarray(picture, np.uint8)


def masks(scenes: Path, split: str) -> dict[str, NDArray[np.uint8]]:
    return {path.stem: read(path) for path in sorted((scenes / "annotations" / split).iterdir())}


def digest(folder: Path) -> str:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = (str(path.relative_to(folder)).encode() + path.read_bytes() for path in paths)
    return hashlib.sha256(b"".join(contents)).hexdigest()


def test_the_same_arguments_give_the_same_folder_byte_for_byte_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        render(tmp_path / name, training=3, validation=2, size=(60, 72), seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_a_scene_does_not_depend_on_how_many_are_rendered(tmp_path: Path) -> None:
    render(tmp_path / "few", training=2, validation=1, size=(60, 72))
    render(tmp_path / "more", training=4, validation=3, size=(60, 72))
    few = [path for kind in ("images", "annotations") for path in (tmp_path / "few" / kind).rglob("*.*")]
    assert len(few) == 6
    for path in few:
        assert path.read_bytes() == (tmp_path / "more" / path.relative_to(tmp_path / "few")).read_bytes()


def test_no_two_scenes_are_alike_over_seeds_splits_and_numbers() -> None:
    scenes = [
        draw_scene(seed, split, number, (60, 72)).labels.tobytes()
        for seed in (0, 1)
        for split in ("training", "validation")
        for number in (1, 4)  # the same kind
    ]
    assert len(set(scenes)) == 8


def test_images_and_masks_come_in_pairs_of_one_size_in_three_channels_and_one(rendered: Path) -> None:
    for split, count in (("training", 48), ("validation", 12)):
        labels = masks(rendered, split)
        assert len(labels) == count
        assert {path.stem for path in (rendered / "images" / split).glob("*.jpg")} == set(labels)
        for stem, mask in labels.items():
            image = read(rendered / "images" / split / f"{stem}.jpg")
            assert mask.dtype == np.uint8 and mask.ndim == 2
            assert image.shape == (*mask.shape, 3)
    assert len({mask.shape for mask in labels.values()}) > 6, "sizes are to vary between scenes"


def test_labels_are_in_range_every_class_occurs_and_other_makes_up_a_few_per_cent(rendered: Path) -> None:
    flat = np.concatenate([m.ravel() for split in ("training", "validation") for m in masks(rendered, split).values()])
    counts = np.bincount(flat)
    assert len(counts) == len(CLASSES) + 1
    assert (counts[1:] > 0.002 * flat.size).all()
    assert 0.005 < counts[0] / flat.size < 0.06


def test_object_info_says_what_the_masks_hold(rendered: Path) -> None:
    lines = (rendered / "objectInfo150.txt").read_text().splitlines()
    assert lines[0] == "Idx\tRatio\tTrain\tVal\tName"
    training, validation = (list(masks(rendered, split).values()) for split in ("training", "validation"))
    total = sum(mask.size for mask in training + validation)
    assert len(lines) == len(CLASSES) + 1
    for label, line in enumerate(lines[1:], start=1):
        pixels = sum(int((mask == label).sum()) for mask in training + validation)
        images = [str(sum(bool((mask == label).any()) for mask in split)) for split in (training, validation)]
        assert line.split("\t") == [str(label), f"{pixels / total:.4f}", *images, CLASSES[label - 1]]


def test_the_toolkit_reads_its_classes_and_colours_back(rendered: Path) -> None:
    assert read_classes(rendered) == CLASSES
    colours = read_colours(rendered, len(CLASSES))
    assert len(set(colours)) == len(CLASSES)
    assert colours[CLASSES.index("sky")] == (110, 178, 240)


def test_scene_categories_name_every_scene_once(rendered: Path) -> None:
    lines = [line.split(" ") for line in (rendered / "sceneCategories.txt").read_text().splitlines()]
    stems = [*masks(rendered, "training"), *masks(rendered, "validation")]
    assert [stem for stem, _ in lines] == stems
    assert {category for _, category in lines} == {"street", "bedroom", "valley"}


def test_classes_have_the_colours_that_people_know_them_by(rendered: Path) -> None:
    pixels: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in CLASSES}
    for stem, mask in masks(rendered, "training").items():
        image = read(rendered / "images" / "training" / f"{stem}.jpg")
        for label, name in enumerate(CLASSES, start=1):
            pixels[name].append(image[mask == label])
    mean = {name: np.concatenate(parts).mean(axis=0) for name, parts in pixels.items()}  # blue, green, red
    assert mean["sky"][0] > 140 and mean["sky"][0] == mean["sky"].max()
    assert mean["ceiling"].min() > 140 > 120 > mean["road, route"].max()
    for green in ("grass", "tree"):
        assert mean[green][1] == mean[green].max()
    assert mean["water"][2] == mean["water"].min()
    assert mean["floor, flooring"][2] == mean["floor, flooring"].max()
    assert 60 < mean["mountain, mount"].mean() < 150


def test_a_class_looks_alike_from_scene_to_scene_so_that_it_can_be_learned(rendered: Path) -> None:
    """Held-out pixels find their class among the training scenes' mean colours and heights far above chance."""

    def features(split: str) -> tuple[NDArray[np.float32], ...]:
        rows, labels = [], []
        for stem, mask in masks(rendered, split).items():
            image = read(rendered / "images" / split / f"{stem}.jpg").astype(np.float32)
            height = np.broadcast_to(np.linspace(0, 255, len(mask))[:, None], mask.shape)
            spread = cv2.blur(np.abs(image - cv2.blur(image, (5, 5))), (9, 9)).mean(axis=2) * 4
            stacked = np.dstack([cv2.blur(image, (5, 5)), height, spread]).astype(np.float32)
            rows.append(stacked[mask > 0])
            labels.append(mask[mask > 0].astype(np.float32))
        return np.concatenate(rows), np.concatenate(labels)

    (seen, seen_labels), (held_out, truth) = features("training"), features("validation")
    means = np.stack([seen[seen_labels == label].mean(axis=0) for label in range(1, len(CLASSES) + 1)])
    nearest = ((held_out[::7, None] - means) ** 2).sum(axis=2).argmin(axis=1) + 1
    assert (nearest == truth[::7]).mean() > 0.35  # chance: 0.07; the largest class: 0.15


@pytest.mark.parametrize("size", [(48, 48), (50, 400), (300, 60)])
def test_scenes_of_odd_shapes_can_be_drawn(size: tuple[int, int]) -> None:
    for number in (1, 2, 3):
        scene = draw_scene(0, "training", number, size)
        assert scene.image.shape == (*scene.labels.shape, 3)
        assert all(0.84 * s <= n <= 1.16 * s for s, n in zip(size, scene.labels.shape, strict=True))
        assert len(np.unique(scene.labels)) > 3
        assert (scene.labels == 0).mean() < 0.2, "nothing is to stay unpainted"


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty \(it holds thesis.txt\)"):
        render(tmp_path, training=1, validation=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        render(tmp_path / "thesis.txt", training=1, validation=0)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--training", "0"], "at least 1 and 0 are needed"),
        (["--validation", "-1"], "at least 1 and 0 are needed"),
        (["--size", "160"], "write it as 160x208"),
        (["--size", "20x208"], "at least 48 on each side"),
        (["--seed", "-1"], "seed -1 is negative"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        main([str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_the_command_renders_as_asked_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path), "--training", "2", "--validation", "0", "--size", "48x64", "--seed", "9"])
    assert "2 training and 0 validation scenes, 15 classes" in capsys.readouterr().out
    image = read(tmp_path / "images" / "training" / "SYN_train_00000002.jpg")
    assert image.shape == draw_scene(9, "training", 2, (48, 64)).image.shape
