"""Names on regions: where they stand, that they can be read, and that none hides another."""

import numpy as np
import pytest
from numpy.typing import NDArray

from fcn_dist.deploy import naming
from fcn_dist.deploy.naming import draw_names, regions

NAMES = ("sky", "sea", "sand")


def changed(picture: NDArray[np.uint8], labels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The picture with names, and which pixels they changed."""
    named = draw_names(picture, labels, NAMES, 20)
    return named, (named != picture).any(axis=2)


def blank(labels: NDArray[np.uint8], colour: int = 120) -> NDArray[np.uint8]:
    return np.full((*labels.shape, 3), colour, np.uint8)


def test_a_name_stands_where_its_region_is_widest() -> None:
    labels = np.ones((200, 300), np.uint8)
    labels[80:140, 180:280] = 2  # its centre: row 110, column 230
    labels[105:115, :180] = 2  # a long thin arm, which moves its centre of mass to the left
    found = {region.label: region for region in regions(labels)}
    assert abs(found[2].centre[1] - 110) <= 1 and 208 <= found[2].centre[0] <= 252
    assert found[2].radius == pytest.approx(30, abs=1)
    _, where = changed(blank(labels), labels)
    rows, _ = np.nonzero(where[80:140, 180:280])
    assert len(rows) and abs(rows.mean() - 30) <= 4
    assert not where[100:120, :170].any()


@pytest.mark.parametrize("colour", [0, 120, 255])
def test_names_are_light_with_a_dark_edge_on_any_colour(colour: int) -> None:
    labels = np.ones((100, 200), np.uint8)
    named, where = changed(blank(labels, colour), labels)
    shades = named[where].mean(axis=1)
    ground = named.reshape(-1, 3)[~where.ravel()]
    assert (ground == colour).all()
    if colour != 255:
        assert (named == 255).all(axis=2).sum() > 30
    if colour:
        assert (shades < 40).sum() > 30


def test_names_stay_within_the_picture_and_touch_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.zeros((120, 400), np.uint8)
    for number in range(20):
        labels[:, number * 20 : number * 20 + 20] = number % 3 + 1
    boxes: list[naming.Box] = []
    box_of = naming._box
    monkeypatch.setattr(naming, "_box", lambda *arguments: boxes.append(box_of(*arguments)) or boxes[-1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(naming, "REACH", 3)  # all want more room than there is
    _, where = changed(blank(labels), labels)
    assert len(boxes) == 20 and all(left >= 0 and top >= 0 and right <= 400 for left, top, right, _ in boxes)
    # What was drawn lies in boxes of which no two overlap, so between any two drawn names there is a gap.
    drawn = where.any(axis=0)
    runs = np.flatnonzero(np.diff(drawn.astype(int)) == 1).size
    assert runs >= 3 and drawn.mean() < 1


def test_regions_that_are_too_small_and_other_get_no_name() -> None:
    labels = np.zeros((200, 200), np.uint8)
    labels[:8, :8] = 1  # 0.16 per cent
    labels[50:54, :] = 2  # too thin for text
    picture = blank(labels)
    assert (draw_names(picture, labels, NAMES, 20) == picture).all()


def test_two_regions_of_one_class_have_a_name_each() -> None:
    labels = np.zeros((100, 300), np.uint8)
    labels[:, :100] = labels[:, 200:] = 3
    _, where = changed(blank(labels), labels)
    assert where[:, :100].any() and where[:, 200:].any() and not where[:, 100:200].any()
