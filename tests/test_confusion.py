"""The picture of a confusion matrix: every cell's colour, what is absent, and sizes for few and many classes."""

from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from fcn_dist.deploy.confusion import HATCH, colours_of, draw_confusion
from fcn_dist.deploy.pictures import Picture

Matrix = NDArray[np.int64]


def names(count: int) -> list[str]:
    return [f"class {number}; a synonym" for number in range(1, count + 1)]


def counts(classes: int, score_other: bool = False) -> Matrix:
    """Random, with zeros; no class is absent."""
    matrix = np.random.default_rng(classes).integers(0, 50, (classes + 1, classes + 1))
    matrix[matrix < 20] = 0
    if not score_other:
        matrix[:, 0] = 0
    np.fill_diagonal(matrix[1:, 1:], 400)
    return matrix


def top_left_of_cells(classes: Sequence[str], shown: int, score_other: bool) -> tuple[NDArray[np.int64], Matrix]:
    """The rows and columns of the cells' first pixels, of a matrix without errors: all depends on the names alone."""
    right = np.diag(np.r_[int(score_other), np.ones(len(classes), np.int64)])
    full = (draw_confusion(right, classes) == colours_of(np.ones(()))).all(-1).astype(np.uint8)
    _, _, boxes, _ = cv2.connectedComponentsWithStats(full, connectivity=4)
    squares = boxes[1:][boxes[1:, cv2.CC_STAT_WIDTH] == boxes[1:, cv2.CC_STAT_HEIGHT]]
    found = squares[squares[:, cv2.CC_STAT_WIDTH] == squares[:, cv2.CC_STAT_WIDTH].max()]
    assert len(found) == shown
    rows, columns = np.sort(found[:, cv2.CC_STAT_TOP]), np.sort(found[:, cv2.CC_STAT_LEFT])
    assert len(set(np.diff(rows))) <= 1 and (np.diff(rows) == np.diff(columns)).all()
    return rows.astype(np.int64), columns.astype(np.int64)


@pytest.mark.parametrize("score_other", [False, True])
@pytest.mark.parametrize("classes", [2, 11, 40, 150])
def test_each_cell_has_the_colour_of_its_share_of_the_true_class(classes: int, score_other: bool) -> None:
    """In the order of labels; "other" is one of them where it is predicted."""
    matrix = counts(classes, score_other)
    first = 0 if score_other else 1
    rows, columns = top_left_of_cells(names(classes), classes + score_other, score_other)
    picture = draw_confusion(matrix, names(classes))
    for i, row in enumerate(matrix[first:, first:]):
        wanted = colours_of(row / row.sum())
        assert (picture[rows[i], columns] == wanted).all(), i


def test_a_class_that_is_absent_from_the_truth_is_hatched_and_no_other() -> None:
    matrix = counts(11)
    matrix[4] = 0
    rows, columns = top_left_of_cells(names(11), 11, score_other=False)
    picture, side = draw_confusion(matrix, names(11)), rows[1] - rows[0] - 1
    for i, row in enumerate(rows):
        for column in columns:
            cell = picture[row : row + side, column : column + side].reshape(-1, 3)
            found = {tuple(colour) for colour in cell.tolist()}
            assert (found == set(HATCH)) == (i == 3) and (set(HATCH) <= found) == (i == 3)


@pytest.mark.parametrize(("classes", "numbered"), [(2, True), (11, True), (30, True), (31, False), (150, False)])
def test_shares_are_written_where_there_is_room(classes: int, numbered: bool) -> None:
    rows, columns = top_left_of_cells(names(classes), classes, score_other=False)
    picture, side = draw_confusion(counts(classes), names(classes)), rows[1] - rows[0] - 1
    for row, column in zip(rows, columns, strict=True):
        cell = picture[row : row + side, column : column + side].reshape(-1, 3)
        assert (len(np.unique(cell, axis=0)) > 1) == numbered


def test_names_stand_on_both_axes_beside_their_own_cells_and_long_ones_are_cut() -> None:
    classes = ["wall", "a name of more than twenty-eight letters, and a synonym", "il", *names(147)]
    rows, columns = top_left_of_cells(classes, 150, score_other=False)
    picture = draw_confusion(counts(150), classes)
    assert max(picture.shape) < 2600
    bright = picture.max(-1) > 120
    left, top = bright[:, : columns[0] - 1], bright[60 : rows[0] - 1]
    side = rows[1] - rows[0]
    lengths = [np.ptp(np.nonzero(left[row : row + side].any(0))[0]) for row in rows]
    upright = [np.ptp(np.nonzero(top[:, column : column + side].any(1))[0]) for column in columns]
    assert lengths[1] == max(lengths) < 250 and lengths[2] == min(lengths) > 2
    assert abs(np.subtract(lengths, upright)).max() <= 1


def test_colours_grow_lighter_evenly_with_the_square_root_of_the_share() -> None:
    """By the lightness of CIE L*a*b*."""
    colours: Picture = colours_of(np.linspace(0, 1, 21) ** 2)
    lightness = cv2.cvtColor(colours[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0, :, 0]
    steps = np.diff(lightness)
    assert lightness[0] < 20 and lightness[-1] > 85
    assert steps.min() > 0.5 * steps.mean() and steps.max() < 1.5 * steps.mean()
