"""Overlays, legends and sheets: their pixels where these are fixed, their sizes, and how they are written."""

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest

from fcn_dist.deploy import pictures
from fcn_dist.deploy.colours import distinct
from fcn_dist.deploy.pictures import Labels, Picture, Row, overlay, picture_with_legend, sheet, write_png
from fcn_dist.errors import UserError

CLASSES = ("wall", "sky, heaven", "person; individual; someone")
COLOURS = ((200, 10, 40), (0, 100, 250), (30, 220, 90))


def noisy(height: int, width: int) -> Picture:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def quarters(height: int = 40, width: int = 60) -> Labels:
    """Labels 0, 1, 2, 3, one in each quarter."""
    return (np.arange(4, dtype=np.uint8).reshape(2, 2)).repeat(height // 2, 0).repeat(width // 2, 1)


def holds(picture: Picture, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(axis=2).any())


def test_an_overlay_leaves_label_0_as_it_was() -> None:
    image, labels = noisy(40, 60), quarters()
    labels[30:34, 40:44] = 0  # a hole in another class
    assert (overlay(image, labels, COLOURS)[labels == 0] == image[labels == 0]).all()


@pytest.mark.parametrize("opacity", [0.0, 0.6, 1.0])
def test_an_overlay_mixes_image_and_colour_by_its_opacity_away_from_outlines(opacity: float) -> None:
    image, labels = noisy(40, 60), quarters()
    mixed = overlay(image, labels, COLOURS, opacity)
    for label, inside in ((1, np.s_[2:18, 32:58]), (2, np.s_[22:38, 2:28]), (3, np.s_[22:38, 32:58])):
        expected = (1 - opacity) * image[inside].astype(float) + opacity * np.array(COLOURS[label - 1])
        assert np.abs(mixed[inside] - expected).max() <= 0.5 + 1e-3


def test_regions_are_parted_by_dark_outlines_one_pixel_wide() -> None:
    image = np.full((20, 30, 3), 200, np.uint8)
    labels = np.ones((20, 30), np.uint8)
    labels[:, 12:] = 2
    labels[15:, :6] = 0
    plain = 0.4 * 200 + 0.6 * np.array([(0, 0, 0), *COLOURS])[labels]
    drawn = overlay(image, labels, COLOURS)
    dark = np.abs(drawn - 0.45 * plain).max(axis=2) <= 1
    expected = np.zeros((20, 30), bool)
    expected[:, 12] = True  # between 1 and 2
    expected[14, :6] = expected[15:, 6] = True  # around "other", on the labelled side
    assert (dark == expected).all()


def test_overlays_and_legends_of_nothing_but_other_can_be_drawn() -> None:
    image, labels = noisy(30, 500), np.zeros((30, 500), np.uint8)
    assert (overlay(image, labels, COLOURS) == image).all()
    picture = picture_with_legend(image, labels, CLASSES, COLOURS)
    assert picture.shape[0] > 30 and picture.shape[1] > 500


def test_a_legend_lists_the_classes_found_from_the_largest_down_and_other_last() -> None:
    labels = np.zeros((10, 10), np.uint8)
    labels[:2], labels[2:5], labels[9] = 3, 1, 3
    drawn = pictures.legend(labels, CLASSES, COLOURS)
    first = {colour: np.argwhere((drawn == colour).all(axis=2)) for colour in COLOURS}
    assert len(first[COLOURS[1]]) == 0, "a class that does not occur has no swatch"
    # Three tenths each: the earlier label stands first.
    assert first[COLOURS[0]][:, 0].max() < first[COLOURS[2]][:, 0].min()
    labels[8] = 3
    drawn = pictures.legend(labels, CLASSES, COLOURS)
    first = {colour: np.argwhere((drawn == colour).all(axis=2)) for colour in COLOURS}
    assert first[COLOURS[2]][:, 0].max() < first[COLOURS[0]][:, 0].min()
    # Two lines for two classes, and one for "other".
    assert len(drawn) == 3 * round(18 * 1.55)


def test_a_legend_line_shows_first_synonym_and_share_of_all_pixels() -> None:
    labels = np.zeros((80, 100), np.uint8)
    labels[:20], labels[20, 0] = 2, 3
    assert pictures._entries([[labels]], CLASSES, COLOURS) == [
        ("sky", COLOURS[1], ("25.0 %",)),
        ("person", COLOURS[2], ("<0.1 %",)),
        ("other", None, ("75.0 %",)),
    ]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("person, individual, someone", "person"),
        ("bed ", "bed"),
        ("door;double door", "door"),
        ("x" * 60, "x" * 25 + "..."),
        (", odd", ", odd"),
    ],
)
def test_a_class_is_called_by_its_first_synonym_cut_to_length(name: str, short: str) -> None:
    assert pictures.short_name(name) == short


def test_a_tiny_image_is_enlarged_by_a_whole_factor_before_anything_is_drawn() -> None:
    labels = np.ones((20, 30), np.uint8)
    labels[:, 15:] = 2
    picture = picture_with_legend(np.zeros((20, 30, 3), np.uint8), labels, CLASSES, COLOURS)
    flat = (picture == np.round(0.6 * np.array(COLOURS[0]))).all(axis=2)
    rows, columns = np.nonzero(flat)
    # 16 times: 480 wide, half of it the first class.
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (320, 240)


@pytest.mark.parametrize(("height", "width"), [(512, 683), (1200, 500), (90, 1600), (3, 2)])
def test_a_picture_holds_its_image_whole_with_a_legend_beside_or_below(height: int, width: int) -> None:
    labels = np.ones((height, width), np.uint8)
    colours = [(index, 255 - index, 77) for index in range(150)]
    labels.ravel()[: min(25, labels.size)] = np.arange(min(25, labels.size)) + 1
    picture = picture_with_legend(noisy(height, width), labels, ["a fairly long name"] * 150, colours)
    assert picture.shape[0] > height and picture.shape[1] > width
    assert picture.shape[0] - height > 200 or picture.shape[1] - width > 150, "there is to be room for a legend"


def test_wide_pictures_have_the_legend_below_and_usual_ones_beside() -> None:
    wide = picture_with_legend(noisy(100, 1500), quarters(100, 1500), CLASSES, COLOURS)
    assert wide.shape[1] - 1500 < 100 < wide.shape[0] - 100
    usual = picture_with_legend(noisy(480, 640), quarters(480, 640), CLASSES, COLOURS)
    assert usual.shape[0] - 480 < 50 < 150 < usual.shape[1] - 640


def test_the_accuracy_is_over_the_pixels_that_the_truth_labels() -> None:
    truth = np.array([[0, 0, 1, 1], [2, 2, 2, 3]], np.uint8)
    prediction = np.array([[1, 0, 1, 2], [2, 2, 1, 3]], np.uint8)
    assert pictures.accuracy(truth, prediction) == pytest.approx(4 / 6)
    assert pictures.accuracy(truth * 0, prediction) is None


def test_a_sheet_has_three_tiles_a_row_and_two_if_nothing_is_predicted() -> None:
    image, truth = np.zeros((40, 60, 3), np.uint8), quarters()
    rows = [Row(image, truth, None, "a")] * 2
    two = sheet(rows, CLASSES, COLOURS)
    three = sheet([Row(image, truth, truth), *rows], CLASSES, COLOURS)
    one = sheet(rows[:1], CLASSES, COLOURS)
    assert three.shape[1] - two.shape[1] >= 480
    # Another 480 x 320 tile; a lone row has its legend below, where it is a line or two high.
    assert 250 < two.shape[0] - one.shape[0] < 400
    for picture in (one, two, three):
        assert all(holds(picture, colour) for colour in COLOURS), "the legend shows each class's pure colour"


def test_a_sheet_names_classes_that_only_the_prediction_has() -> None:
    truth, prediction = np.ones((40, 60), np.uint8), np.full((40, 60), 3, np.uint8)
    drawn = pictures.triple(np.zeros((40, 60, 3), np.uint8), truth, prediction, CLASSES, COLOURS)
    assert [holds(drawn, colour) for colour in COLOURS] == [True, False, True]


def test_scenes_of_any_shape_fit_into_a_sheet() -> None:
    shapes = [(20, 30), (700, 900), (900, 100), (1, 800)]
    rows = [Row(noisy(h, w), np.ones((h, w), np.uint8), np.zeros((h, w), np.uint8)) for h, w in shapes]
    assert sheet(rows, CLASSES, COLOURS).shape[1] >= 3 * 480
    with pytest.raises(UserError, match="at least 1 is needed"):
        sheet([], CLASSES, COLOURS)


def test_colours_that_repeat_become_different_ones_and_all_others_stay() -> None:
    shared = ((140, 140, 140), (1, 2, 3), (140, 140, 140), (255, 0, 0), (140, 140, 140))
    result = distinct(shared)
    assert len(set(result)) == 5
    assert [result[i] for i in (0, 1, 3)] == [shared[i] for i in (0, 1, 3)]
    assert result == distinct(list(shared)), "the same on every call"
    for index in (2, 4):
        others = np.array(result[:index] + result[index + 1 :])
        assert np.linalg.norm(others - np.array(result[index]), axis=1).min() > 100
    assert distinct(COLOURS) == COLOURS


def test_a_class_whose_colour_is_hardly_told_from_an_earlier_one_s_has_another() -> None:
    near = [(200, 10, 40), (0, 100, 250), (202, 11, 39), (30, 220, 90), (0, 100, 243)]
    result = distinct(near)
    assert [result[i] for i in (0, 1, 3)] == [near[i] for i in (0, 1, 3)]
    assert apart([near[0], near[2]]) < 2 and apart([near[1], near[4]]) < 5
    assert apart([*result, (0, 0, 0)]) > 40


def apart(colours: Sequence[tuple[int, int, int]]) -> float:
    """The smallest distance of two in CIE L*a*b*, white D65, from the standards' formulas."""
    linear = [
        [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (x / 255 for x in c)] for c in colours
    ]
    matrix = [(0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227)]
    shades = []
    for colour in linear:
        x, y, z = (sum(m * v for m, v in zip(row, colour, strict=True)) / sum(row) for row in matrix)
        fx, fy, fz = (t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z))
        shades.append((116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)))
    return min(math.dist(one, other) for one, other in combinations(shades, 2))


@pytest.mark.real_data
def test_any_two_of_the_benchmark_s_classes_can_be_told_apart() -> None:
    from scipy.io import loadmat

    path = Path(__file__).resolve().parents[2] / "shared" / "data" / "ade20k" / "color150.mat"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    colours = [(int(r), int(g), int(b)) for r, g, b in loadmat(path)["colors"]]
    assert colours[6] == colours[48]
    assert sum(apart(pair) < 2 for pair in combinations(colours, 2)) == 28
    assert apart(distinct(colours)) > 4.9
    assert distinct(colours)[:27] == tuple(colours[:27])


def test_what_cannot_be_drawn_is_refused_with_the_value_found() -> None:
    image, labels = noisy(40, 60), quarters()
    with pytest.raises(UserError, match=r"label 3 has no colour: there are 2"):
        overlay(image, labels, COLOURS[:2])
    with pytest.raises(UserError, match=r"\(20, 30\) do not fit an image of \(40, 60\)"):
        overlay(image, labels[:20, :30], COLOURS)
    with pytest.raises(UserError, match="float64"):
        overlay(image / 255, labels, COLOURS)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="int64"):
        pictures.legend(labels.astype(np.int64), CLASSES, COLOURS)


def test_a_png_is_written_whole_in_rgb_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"an older one")
    picture = noisy(20, 30)
    write_png(path, picture)
    written = cv2.imread(str(path))
    assert written is not None
    assert (written[..., ::-1] == picture).all()
    assert [each.name for each in tmp_path.iterdir()] == ["picture.png"]


def test_a_write_that_fails_leaves_the_older_picture_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"an older one")

    def full(self: Path, payload: bytes) -> int:
        with self.open("wb") as file:
            file.write(payload[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_png(path, noisy(20, 30))
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("picture.png", b"an older one")]
